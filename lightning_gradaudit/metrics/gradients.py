"""Gradient similarity and label recovery as torchmetrics metrics."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lightning_gradaudit.metrics.base import LeakageMetric
from lightning_gradaudit.metrics.functional.gradients import gradient_similarity, label_multiset_accuracy
from lightning_gradaudit.utils.tensors import Tensors


class _MeanMetric(LeakageMetric):
    """Mean of a scalar over updates."""

    plot_upper_bound = 1.0
    total: Tensor
    count: Tensor

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.add_state("total", default=torch.tensor(0.0), dist_reduce_fx="sum")
        self.add_state("count", default=torch.tensor(0.0), dist_reduce_fx="sum")

    def _add(self, value: Tensor) -> None:
        self.total += value.detach().float()
        self.count += 1

    def compute(self) -> Tensor:
        """Return the mean, a scalar; NaN without updates."""
        return self.total / self.count


class GradientSimilarity(_MeanMetric):
    """Mean cosine between simulated and observed gradients, in [-1, 1].

    Example:
        >>> metric = GradientSimilarity()
        >>> metric.update({"w": torch.tensor([1.0, 0.0])}, {"w": torch.tensor([1.0, 1.0])})
        >>> metric.compute()
        tensor(0.7071)
    """

    higher_is_better = False
    plot_lower_bound = -1.0

    def update(self, preds: Tensors, target: Tensors) -> None:
        """Add one pair of gradients keyed by parameter name."""
        self._add(gradient_similarity(preds, target))


class LabelMultisetAccuracy(_MeanMetric):
    """Mean share of labels recovered as a multiset, in [0, 1].

    Example:
        >>> metric = LabelMultisetAccuracy()
        >>> metric.update(torch.tensor([2, 2, 0]), torch.tensor([0, 2, 1]))
        >>> metric.compute()
        tensor(0.6667)
    """

    higher_is_better = False
    plot_lower_bound = 0.0

    def update(self, preds: Tensor, target: Tensor) -> None:
        """Add one batch of (B,) class indices."""
        self._add(label_multiset_accuracy(preds, target))

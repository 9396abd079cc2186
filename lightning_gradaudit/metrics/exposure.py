"""Exposure as a torchmetrics metric."""

from __future__ import annotations

from torch import Tensor

from lightning_gradaudit.metrics.base import ImageMetric
from lightning_gradaudit.metrics.functional.exposure import exposure


class Exposure(ImageMetric):
    """Exposure of a set of images: how far beyond a guess their reconstructions come, in [0, 1].

    Args:
        statistic: "worst" (default: the person harmed is not the average one), "p90" or "mean".

    Example:
        >>> import torch
        >>> metric = Exposure()
        >>> metric.update(similarity=torch.tensor([0.4, 0.7]), null=torch.tensor([0.4, 0.4]))
        >>> metric.compute()
        tensor(0.5000)
    """

    higher_is_better = False
    plot_lower_bound = 0.0
    plot_upper_bound = 1.0

    def update(self, similarity: Tensor, null: Tensor) -> None:
        """Add images: their similarity to the reconstructions and to the best guess, (B,) each in [0, 1]."""
        self.values.append(exposure(similarity, null))

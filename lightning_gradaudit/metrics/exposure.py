"""Exposure as a torchmetrics metric."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.utilities import dim_zero_cat

from lightning_gradaudit.errors import InvalidInputError
from lightning_gradaudit.metrics.functional.exposure import exposure

Statistic = Literal["worst", "p90", "mean"]


def exposure_statistic(values: Tensor, statistic: Statistic) -> Tensor:
    """Reduce exposures (N,) to their maximum, 90th percentile (rounded up to an observed one) or mean."""
    if statistic == "worst":
        return values.max()
    if statistic == "p90":
        return values.quantile(0.9, interpolation="higher")
    if statistic == "mean":
        return values.mean()
    raise InvalidInputError(f"statistic must be 'worst', 'p90' or 'mean', got {statistic!r}.")


class Exposure(Metric):
    """Exposure of a set of images: how far beyond a guess their reconstructions come, in [0, 1].

    Args:
        statistic: "worst" (default: the person harmed is not the average one), "p90" or "mean".

    Example:
        >>> metric = Exposure()
        >>> metric.update(similarity=torch.tensor([0.4, 0.7]), null=torch.tensor([0.4, 0.4]))
        >>> metric.compute()
        tensor(0.5000)
    """

    is_differentiable = False
    higher_is_better = False
    full_state_update = False
    plot_lower_bound = 0.0
    plot_upper_bound = 1.0
    values: list[Tensor]

    def __init__(self, statistic: Statistic = "worst", **kwargs: Any) -> None:
        super().__init__(**kwargs)
        exposure_statistic(torch.zeros(1), statistic)
        self.statistic = statistic
        self.add_state("values", default=[], dist_reduce_fx="cat")

    def update(self, similarity: Tensor, null: Tensor) -> None:
        """Add images: their similarity to the reconstructions and to the best guess, (B,) each in [0, 1]."""
        self.values.append(exposure(similarity, null))

    def compute(self) -> Tensor:
        """Return the statistic, a scalar in [0, 1]; NaN without any image."""
        values = dim_zero_cat(self.values) if self.values else torch.empty(0)
        return exposure_statistic(values, self.statistic) if len(values) else torch.tensor(torch.nan)

    def plot(self, val: Tensor | Sequence[Tensor] | None = None, ax: Any = None) -> Any:
        """Plot one value or a sequence of them; needs matplotlib."""
        return self._plot(val, ax)

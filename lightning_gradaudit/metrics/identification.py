"""Identification as a torchmetrics metric."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lightning_gradaudit.errors import InvalidInputError
from lightning_gradaudit.metrics.base import LeakageMetric
from lightning_gradaudit.metrics.functional.identification import MIN_GALLERY, excess_over_chance, identification


class Identification(LeakageMetric):
    """Share of images that their reconstructions name in a gallery, in excess of chance, in [0, 1].

    Args:
        chance: Measured hit rate of reconstructions that belong to other gradients; 0 gives the plain rate.
        min_gallery: Fewest candidates for an image to count.

    Example:
        >>> faces = torch.rand(120, 1, 8, 8, generator=torch.Generator().manual_seed(0))
        >>> metric = Identification()
        >>> metric.update(faces[:2], faces[:2], faces)
        >>> metric.compute()
        tensor(1.)
    """

    higher_is_better = False
    plot_lower_bound = 0.0
    plot_upper_bound = 1.0
    hits: Tensor
    total: Tensor

    def __init__(self, chance: float = 0.0, min_gallery: int = MIN_GALLERY, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        if not 0 <= chance < 1:
            raise InvalidInputError(f"chance must lie in [0, 1), got {chance!r}.")
        self.chance = chance
        self.min_gallery = min_gallery
        self.add_state("hits", default=torch.tensor(0.0), dist_reduce_fx="sum")
        self.add_state("total", default=torch.tensor(0.0), dist_reduce_fx="sum")

    def update(self, preds: Tensor, target: Tensor, gallery: Tensor) -> None:
        """Add images; arguments as in `functional.identification`."""
        identified, _ = identification(preds, target, gallery, min_gallery=self.min_gallery)
        self.hits += identified.nansum()
        self.total += (~identified.isnan()).sum()

    def compute(self) -> Tensor:
        """Return the excess rate, a scalar in [0, 1]; NaN when no image could be compared."""
        if self.total == 0:
            return torch.tensor(torch.nan)
        return torch.tensor(excess_over_chance(float(self.hits / self.total), self.chance))

"""Gradient similarity against data similarity as a torchmetrics metric."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torchmetrics.utilities import dim_zero_cat

from lightning_gradaudit.metrics.base import LeakageMetric
from lightning_gradaudit.metrics.functional.correlation import (
    DataDistance,
    GradientDistance,
    check_distances,
    gradient_rows,
    rows_correlation,
)
from lightning_gradaudit.utils.tensors import Tensors


class GradientDataCorrelation(LeakageMetric):
    """Spearman's coefficient of distances between gradients with distances between their images, in [-1, 1].

    Over all pairs of the images that were added, also from different updates. A description and no risk (see
    `functional.gradient_data_correlation`): it is neither better nor worse when high.

    It keeps every image and its gradient: N(p + d) numbers for p parameters and d pixels. Gradients at different
    weights do not compare: reset it when the model has moved.

    Args:
        gradient: Distance of gradients, "l2" or "cosine" (1 - cosine).
        data: Distance of images, "mse" or "ssim" (1 - SSIM).

    Example:
        >>> images = torch.rand(6, 1, 8, 8, generator=torch.Generator().manual_seed(0))
        >>> metric = GradientDataCorrelation()
        >>> metric.update({"w": 3 * images[:4]}, images[:4])
        >>> metric.update({"w": 3 * images[4:]}, images[4:])
        >>> print(f"{float(metric.compute()):.2f}")
        1.00
    """

    higher_is_better = None
    plot_lower_bound = -1.0
    plot_upper_bound = 1.0
    rows: list[Tensor]
    images: list[Tensor]

    def __init__(self, gradient: GradientDistance = "l2", data: DataDistance = "mse", **kwargs: Any) -> None:
        super().__init__(**kwargs)
        check_distances(gradient, data)
        self.gradient, self.data = gradient, data
        self.add_state("rows", default=[], dist_reduce_fx="cat")
        self.add_state("images", default=[], dist_reduce_fx="cat")

    def update(self, gradients: Tensors, images: Tensor) -> None:
        """Add images (N, C, H, W), pixels in [0, 1], with the gradient each would give alone, (N, ...) by name."""
        self.rows.append(gradient_rows(gradients, images))
        self.images.append(images.detach())

    def compute(self) -> Tensor:
        """Return the coefficient, a scalar; NaN below three images."""
        if not len(self.rows):
            return torch.tensor(torch.nan, device=self.device)
        rho = rows_correlation(dim_zero_cat(self.rows), dim_zero_cat(self.images), self.gradient, self.data)
        return rho.float().to(self.device)

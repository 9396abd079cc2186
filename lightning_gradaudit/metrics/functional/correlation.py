"""Gradient similarity against data similarity over all pairs of images: Spearman's coefficient as a description."""

from __future__ import annotations

from typing import Literal

import numpy as np
import torch
from scipy.stats import rankdata
from torch import Tensor

from lightning_gradaudit.errors import InvalidInputError
from lightning_gradaudit.metrics.functional.similarity import pairwise_similarity, usable_similarity
from lightning_gradaudit.utils.tensors import Tensors

GradientDistance = Literal["l2", "cosine"]
DataDistance = Literal["mse", "ssim"]
COLUMNS_AT_ONCE = 2**16
"""Coordinates of gradients that are in double precision at once, which bounds the memory."""


def spearman(x: np.ndarray, y: np.ndarray) -> float:
    """Return Spearman's rank correlation, in [-1, 1]; NaN where one of both is constant."""
    if len(x) < 2 or np.ptp(x) == 0 or np.ptp(y) == 0:
        return float("nan")
    return float(np.corrcoef(rankdata(x), rankdata(y))[0, 1])


def gram_distances(gram: Tensor) -> dict[GradientDistance, Tensor]:
    """Return Euclidean distances and 1 - cosine of all pairs, in the order of triu, from inner products (N, N)."""
    i, j = torch.triu_indices(len(gram), len(gram), offset=1, device=gram.device).unbind()
    squares = gram.diagonal()
    apart = (squares[i] + squares[j] - 2 * gram[i, j]).clamp_min(0)
    lengths = (squares[i] * squares[j]).sqrt().clamp_min(1e-300)
    return {"l2": apart.sqrt(), "cosine": 1 - gram[i, j] / lengths}


def image_distances(images: Tensor, measure: DataDistance) -> Tensor:
    """Return mean squared errors, or 1 - SSIM, of all pairs of images (N, C, H, W), in the order of triu.

    SSIM sees pixels clipped to [0, 1]; below 8 pixels a side 1 - NMSE stands in for it.
    """
    i, j = torch.triu_indices(len(images), len(images), offset=1, device=images.device).unbind()
    if measure == "mse":
        rows = images.flatten(1).double()
        return torch.cdist(rows, rows, compute_mode="donot_use_mm_for_euclid_dist")[i, j] ** 2 / images[0].numel()
    clipped = images.clamp(0, 1).float()
    return 1 - pairwise_similarity(clipped, clipped, usable_similarity("ssim", *images.shape[-2:]))[i, j]


def check_distances(gradient: GradientDistance, data: DataDistance) -> None:
    """Refuse distances that are not known."""
    if gradient not in ("l2", "cosine") or data not in ("mse", "ssim"):
        raise InvalidInputError(
            f"gradient and data: expected 'l2' or 'cosine' and 'mse' or 'ssim', got {gradient!r} and {data!r}."
        )


def gradient_rows(gradients: Tensors, images: Tensor) -> Tensor:
    """Flatten per-image gradients to rows (N, p), tensors in the order of their names."""
    odd = [name for name, g in gradients.items() if g.ndim < 1 or len(g) != len(images)]
    if not gradients or odd or images.ndim != 4:
        raise InvalidInputError(
            f"gradients: expected for each of {len(images)} images (N, C, H, W) a gradient of its own along the first "
            f"dimension of every tensor, got {[(n, tuple(gradients[n].shape)) for n in odd[:3]]} for images "
            f"{tuple(images.shape)}. torch.func.vmap(torch.func.grad(...)) makes such gradients."
        )
    return torch.cat([gradients[name].detach().reshape(len(images), -1) for name in sorted(gradients)], dim=1)


def rows_correlation(rows: Tensor, images: Tensor, gradient: GradientDistance, data: DataDistance) -> Tensor:
    """Return the coefficient from gradients (N, p) and images (N, C, H, W)."""
    check_distances(gradient, data)
    gram = torch.zeros((len(rows), len(rows)), dtype=torch.float64, device=rows.device)
    for block in rows.split(COLUMNS_AT_ONCE, dim=1):
        gram += block.double() @ block.double().T
    apart = gram_distances(gram)[gradient]
    rho = spearman(apart.cpu().numpy(), image_distances(images, data).cpu().numpy())
    return torch.tensor(rho, dtype=torch.float64)


def gradient_data_correlation(
    gradients: Tensors, images: Tensor, *, gradient: GradientDistance = "l2", data: DataDistance = "mse"
) -> Tensor:
    """Return how well the order of distances between gradients follows that of distances between images.

    A description and no risk: a network may keep the order and hide the images, or scramble it and give them away
    (see `analysis.similarity_relation`, which adds intervals, layers and the constants that count).

    Args:
        gradients: By parameter name, (N, ...): the gradient that each image would give alone.
        images: (N, C, H, W), pixels in [0, 1].
        gradient: "l2" or "cosine" (1 - cosine).
        data: "mse" or "ssim" (1 - SSIM).

    Returns:
        Spearman's coefficient over the N(N-1)/2 pairs, a scalar in [-1, 1]; NaN below three images.

    Example:
        >>> images = torch.rand(5, 1, 8, 8, generator=torch.Generator().manual_seed(0))
        >>> print(f'{float(gradient_data_correlation({"w": 3 * images}, images)):.2f}')
        1.00
    """
    return rows_correlation(gradient_rows(gradients, images), images, gradient, data)

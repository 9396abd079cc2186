"""Distances between gradients and between images over all pairs, and Spearman's coefficient of two such lists."""

from __future__ import annotations

from typing import Literal

import numpy as np
import torch
from scipy.stats import rankdata
from torch import Tensor

from lightning_gradaudit.metrics.functional.similarity import pairwise_similarity, usable_similarity

GradientDistance = Literal["l2", "cosine"]
DataDistance = Literal["mse", "ssim"]


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

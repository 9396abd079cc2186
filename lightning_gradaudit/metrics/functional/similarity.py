"""Similarity of images in pixel space, and the one-to-one assignment of a reconstructed batch to the true one."""

from __future__ import annotations

from typing import Literal

import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor
from torchmetrics.functional.image import (
    peak_signal_noise_ratio,
    structural_similarity_index_measure,
)

from lightning_gradaudit.errors import InvalidInputError

Similarity = Literal["ssim", "nmse"]
MAX_PSNR = 100.0
"""dB; identical images would be infinitely good, which no logger can draw."""
SMALLEST_SSIM_SIDE = 8
"""Pixels a side below which images are smaller than SSIM's window."""
PAIRS_AT_ONCE = 512
"""Pairs of images compared at once, which bounds the memory."""


def usable_similarity(wanted: Similarity, height: int, width: int) -> Similarity:
    """Return the wanted similarity, or "nmse" where images are too small for SSIM's window (side < 8)."""
    return "nmse" if min(height, width) < SMALLEST_SSIM_SIDE else wanted


def pairwise_similarity(preds: Tensor, target: Tensor, measure: Similarity = "ssim") -> Tensor:
    """Compare every reconstruction with every true image.

    Args:
        preds: (M, C, H, W) pixels in [0, 1].
        target: (N, C, H, W) pixels in [0, 1].
        measure: "ssim" (negative values count as 0), or "nmse": 1 - MSE / variance of the true image, at least 0.

    Returns:
        (M, N) in [0, 1].
    """
    if preds.shape[1:] != target.shape[1:]:
        raise InvalidInputError(
            f"preds and target must show images of one shape, got {tuple(preds.shape)} and {tuple(target.shape)}."
        )
    m, n = len(preds), len(target)
    rows = torch.arange(m, device=preds.device).repeat_interleave(n)
    columns = torch.arange(n, device=preds.device).repeat(m)
    parts = [
        similarity(preds[rows[i : i + PAIRS_AT_ONCE]], target[columns[i : i + PAIRS_AT_ONCE]], measure)
        for i in range(0, m * n, PAIRS_AT_ONCE)
    ]
    return torch.cat(parts).reshape(m, n) if parts else preds.new_zeros((m, n))


def similarity(preds: Tensor, target: Tensor, measure: Similarity = "ssim") -> Tensor:
    """Compare images pairwise in order: (B, C, H, W) twice gives (B,) in [0, 1] (see `pairwise_similarity`)."""
    if measure == "ssim":
        scores = structural_similarity_index_measure(preds, target, data_range=1.0, reduction="none")
        assert isinstance(scores, Tensor)
        return scores.reshape(-1).clamp(0, 1)
    if measure == "nmse":
        error = ((preds - target) ** 2).flatten(1).mean(1)
        return (1 - error / target.flatten(1).var(1, unbiased=False).clamp_min(1e-4)).clamp(0, 1)
    raise InvalidInputError(f"measure must be 'ssim' or 'nmse', got {measure!r}.")


def assign(similarities: Tensor) -> Tensor:
    """Give each true image one reconstruction so that the sum of 1 - similarity is least (Hungarian method).

    The cost is bounded on purpose: with a sum of squared errors one bad image rules the assignment, and a crisp
    reconstruction goes to the wrong owner.

    Args:
        similarities: (M, N) with M >= N, in [0, 1].

    Returns:
        (N,) index of the reconstruction given to each true image.

    Example:
        >>> assign(torch.tensor([[0.1, 0.9], [0.2, 0.8]])).tolist()
        [1, 0]
    """
    if similarities.shape[0] < similarities.shape[1]:
        raise InvalidInputError(
            f"similarities: expected at least as many reconstructions as images, got {tuple(similarities.shape)}."
        )
    rows, columns = linear_sum_assignment(1 - similarities.cpu().double().numpy())
    chosen = torch.empty(similarities.shape[1], dtype=torch.long)
    chosen[torch.from_numpy(columns)] = torch.from_numpy(rows)
    return chosen.to(similarities.device)


def mean_squared_error(preds: Tensor, target: Tensor) -> Tensor:
    """Return the mean squared error per image, (B,), in squared pixels of [0, 1]."""
    return ((preds - target) ** 2).flatten(1).mean(1)


def psnr(preds: Tensor, target: Tensor) -> Tensor:
    """Return the peak signal-to-noise ratio per image, (B,), in dB with data range 1, capped at 100."""
    scores = peak_signal_noise_ratio(preds, target, data_range=1.0, reduction="none", dim=(1, 2, 3))
    return scores.clamp(max=MAX_PSNR).reshape(-1)

"""Identification: is the true image the nearest neighbour of its reconstruction in a gallery?"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from lightning_gradaudit.errors import InvalidInputError

MIN_GALLERY = 100
"""Smallest number of candidates, the true image included, for which identification is reported."""
DUPLICATE = 0.95
"""Correlation of standardised pixels from which two images count as the same photograph."""
_POOLED_SIDE = 32
_SHRINKAGE = 0.1


def pooled(pixels: Tensor) -> Tensor:
    """Average images (N, C, H, W) down to at most 32 pixels a side: who it is shows there, at bounded cost."""
    height, width = pixels.shape[-2:]
    if max(height, width) <= _POOLED_SIDE:
        return pixels.float()
    size = (min(height, _POOLED_SIDE), min(width, _POOLED_SIDE))
    return nn.functional.adaptive_avg_pool2d(pixels.float(), size)


def standardised(images: Tensor) -> Tensor:
    """Flatten images (N, ...) and scale each to zero mean and unit norm; flat images become zero, (N, d)."""
    rows = images.flatten(1)
    rows = rows - rows.mean(1, keepdim=True)
    norm = rows.norm(dim=1, keepdim=True)
    return torch.where(norm > 1e-4, rows / norm.clamp_min(1e-12), torch.zeros_like(rows))


def identification(
    preds: Tensor,
    target: Tensor,
    gallery: Tensor,
    *,
    labels: Tensor | None = None,
    gallery_labels: Tensor | None = None,
    min_gallery: int = MIN_GALLERY,
) -> tuple[Tensor, Tensor]:
    """Tell for each image whether its reconstruction names it.

    The candidates are the true image, the rest of its batch and the gallery, less near copies of the true image;
    of its own class where the gallery has enough of them. The true image must be strictly nearest by correlation
    of standardised pixels, or by correlation after whitening with the gallery's mean and covariance (a matched
    filter, which finds faces that noise hides from the eye). Both chances to hit are part of what the *measured*
    chance level must repeat.

    Args:
        preds: (B, C, H, W) reconstructions in [0, 1], assigned to the true images.
        target: (B, C, H, W) true images in [0, 1].
        gallery: (N, C, H, W) other images of the same distribution, in [0, 1]; may hold the true ones.
        labels, gallery_labels: (B,) and (N,) class indices, to compare within a class.
        min_gallery: Fewest candidates for a result.

    Returns:
        (B,) 1.0 where identified, 0.0 where not, NaN with too few candidates; and (B,) the number of candidates.
    """
    if preds.shape != target.shape or preds.shape[1:] != gallery.shape[1:]:
        raise InvalidInputError(
            f"preds, target and gallery must show images of one shape, got {tuple(preds.shape)}, "
            f"{tuple(target.shape)} and {tuple(gallery.shape)}."
        )
    b = len(target)
    candidates = torch.cat([pooled(target), pooled(gallery)])
    plain = standardised(candidates)
    allowed = plain[:b] @ plain.T < DUPLICATE
    own = torch.arange(b, device=target.device)
    allowed[own, own] = True
    if labels is not None and gallery_labels is not None:
        classes = torch.cat([labels, gallery_labels.to(labels)])
        same = allowed & (labels[:, None] == classes)
        enough = same.sum(1) >= min_gallery
        allowed = torch.where(enough[:, None], same, allowed)
    sizes = allowed.sum(1)
    hit = torch.zeros(b, dtype=torch.bool, device=target.device)
    mean, whiten = _whitening(candidates.flatten(1))
    for transform in (standardised, lambda images: _unit((images.flatten(1) - mean) @ whiten)):
        scores = (transform(pooled(preds)) @ transform(candidates).T).masked_fill(~allowed, -torch.inf)
        rivals = scores.clone()
        rivals[own, own] = -torch.inf
        hit |= scores[own, own] > rivals.max(1).values
    return torch.where(sizes >= min_gallery, hit.float(), torch.full_like(sizes, torch.nan, dtype=torch.float)), sizes


def _unit(rows: Tensor) -> Tensor:
    return rows / rows.norm(dim=1, keepdim=True).clamp_min(1e-12)


def _whitening(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Return the mean and Σ^(-1/2) of a shrunk covariance, from few samples in many dimensions."""
    mean = rows.mean(0)
    _, scale, basis = torch.linalg.svd(rows - mean, full_matrices=False)
    variance = scale**2 / max(len(rows) - 1, 1)
    floor = _SHRINKAGE * variance.mean().clamp_min(1e-12)
    # Outside the span of the samples the variance is the floor: identity there, a correction inside.
    correction = (variance + floor).rsqrt() * floor.sqrt() - 1
    identity = torch.eye(rows.shape[1], device=rows.device)
    return mean, identity + (basis.T * correction) @ basis


def excess_over_chance(rate: float, chance: float) -> float:
    """Return (rate - chance) / (1 - chance), at least 0: 0 at chance level, 1 when every image is named."""
    if chance >= 1:
        return 0.0
    return max(0.0, (rate - chance) / (1 - chance))

"""Identification: is the true image the nearest neighbour of its reconstruction in a gallery?"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from lightning_gradaudit.errors import InvalidInputError

MIN_GALLERY = 100
"""Smallest number of candidates, the true image included, for which identification is reported."""
DUPLICATE = 0.95
"""Correlation of standardised pixels from which two images count as the same photograph."""
POOLED_SIDE = 32
"""Pixels a side to which images are averaged down: who it is shows there, at bounded cost."""
SHRINKAGE = 0.1
"""Variance outside the gallery's span, relative to the mean variance inside."""


def pooled(pixels: Tensor) -> Tensor:
    """Average images (N, C, H, W) down to at most 32 pixels a side: who it is shows there, at bounded cost."""
    height, width = pixels.shape[-2:]
    if max(height, width) <= POOLED_SIDE:
        return pixels.float()
    size = (min(height, POOLED_SIDE), min(width, POOLED_SIDE))
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
    identifier = Identifier(target, gallery, labels=labels, gallery_labels=gallery_labels, min_gallery=min_gallery)
    return identifier.hits(preds), identifier.sizes


class Identifier:
    """The candidates of one batch, prepared once for many reconstructions of it (see `identification`).

    Attributes:
        sizes: (B,) number of candidates of each image.
    """

    def __init__(
        self,
        target: Tensor,
        gallery: Tensor,
        *,
        labels: Tensor | None = None,
        gallery_labels: Tensor | None = None,
        min_gallery: int = MIN_GALLERY,
    ) -> None:
        b = len(target)
        candidates = torch.cat([pooled(target), pooled(gallery)])
        plain = standardised(candidates)
        self._own = torch.arange(b, device=target.device)
        allowed = plain[:b] @ plain.T < DUPLICATE
        allowed[self._own, self._own] = True
        if labels is not None and gallery_labels is not None:
            classes = torch.cat([labels, gallery_labels.to(labels)])
            same = allowed & (labels[:, None] == classes)
            enough = same.sum(1) >= min_gallery
            allowed = torch.where(enough[:, None], same, allowed)
        self.sizes = allowed.sum(1)
        self._enough = self.sizes >= min_gallery
        self._forbidden = ~allowed
        self._whiten = _Whitening(candidates.flatten(1))
        self._plain, self._white = plain, self._whiten(candidates.flatten(1))

    def hits(self, preds: Tensor) -> Tensor:
        """Return (B,): 1.0 identified, 0.0 not, NaN with too few candidates; `preds` in the order of the target."""
        rows = pooled(preds)
        hit = torch.zeros(len(self._own), dtype=torch.bool, device=preds.device)
        for guesses, candidates in ((standardised(rows), self._plain), (self._whiten(rows.flatten(1)), self._white)):
            scores = (guesses @ candidates.T).masked_fill(self._forbidden, -torch.inf)
            rivals = scores.clone()
            rivals[self._own, self._own] = -torch.inf
            hit |= scores[self._own, self._own] > rivals.max(1).values
        return torch.where(self._enough, hit.float(), torch.nan)


class _Whitening:
    """x -> Σ^(-1/2) (x - mean) / ‖·‖ with a shrunk covariance, from few samples in many dimensions, at low rank."""

    def __init__(self, rows: Tensor) -> None:
        self._mean = rows.mean(0)
        centred = rows - self._mean
        # Eigenvectors of the small Gram matrix give those of the covariance.
        energy, vectors = torch.linalg.eigh(centred.double() @ centred.double().T)
        kept = energy > 1e-9 * energy[-1].clamp_min(1e-12)
        self._basis = (vectors[:, kept].T @ centred.double() / energy[kept].sqrt()[:, None]).to(rows)
        variance = (energy[kept] / max(len(rows) - 1, 1)).to(rows)
        floor = SHRINKAGE * (variance.sum() / max(len(rows), 1)).clamp_min(1e-12)
        # Outside the span of the samples the variance is the floor: identity there, a correction inside.
        self._correction = (variance + floor).rsqrt() * floor.sqrt() - 1

    def __call__(self, rows: Tensor) -> Tensor:
        centred = rows - self._mean
        white = centred + (centred @ self._basis.T * self._correction) @ self._basis
        return white / white.norm(dim=1, keepdim=True).clamp_min(1e-12)


def excess_over_chance(rate: float, chance: float) -> float:
    """Return (rate - chance) / (1 - chance), at least 0: 0 at chance level, 1 when every image is named."""
    if chance >= 1:
        return 0.0
    return max(0.0, (rate - chance) / (1 - chance))

"""The null: the similarity that a guess without the gradient reaches, and scores of reconstructions against it."""

from __future__ import annotations

import copy
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor, nn

from lightning_gradaudit.errors import InvalidInputError
from lightning_gradaudit.metrics.functional.exposure import exposure
from lightning_gradaudit.metrics.functional.identification import (
    DUPLICATE,
    Identifier,
    pooled,
    standardised,
)
from lightning_gradaudit.metrics.functional.similarity import (
    Similarity,
    assign,
    mean_squared_error,
    pairwise_similarity,
    psnr,
    similarity,
    usable_similarity,
)

LEAST_CLASS_SIZE = 16
"""Images of a class from which its mean is a fair guess."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Scores:
    """What a reconstructed batch is worth; tensors are (B,) in the order of the true batch.

    Attributes:
        exposure: In [0, 1], against the null baseline (see `metrics.functional.exposure`).
        psnr, ssim, mse: In pixel space with data range 1; PSNR in dB, capped at 100; SSIM is NaN below 8 pixels a side.
        identified: 1, 0 or NaN (gallery too small).
        null: Similarity that a guess without the gradient reaches, in [0, 1].
        gallery: Fewest candidates an image was compared with.
        chance_hits, chance_trials: Identification by reconstructions of other audits, summed over the batch.
        null_complete: Whether the reservoir of other audits' reconstructions was full.
        measure: Similarity behind `exposure` and `null`: "ssim" or "nmse".
        null_exposure: (B,) the exposure that the luckiest guess without the gradient reaches: the mean image, or any
            reconstruction of another audit; None: nothing to guess with.
    """

    exposure: Tensor
    psnr: Tensor
    ssim: Tensor
    mse: Tensor
    identified: Tensor
    null: Tensor
    gallery: int
    chance_hits: float
    chance_trials: int
    null_complete: bool
    measure: Similarity
    null_exposure: Tensor | None = None

    def as_fields(self) -> dict[str, Any]:
        """Return the fields above by name."""
        return {each.name: getattr(self, each.name) for each in fields(Scores)}


@dataclass(frozen=True, kw_only=True, eq=False)
class AssignedScores(Scores):
    """Scores of a batch whose order the attack did not know.

    Attributes:
        order: Which reconstruction was given to each true image.
        similarity: Of the two, in [0, 1].
    """

    order: Tensor
    similarity: Tensor

    def unmeasured(self) -> AssignedScores:
        """Return the scores where no reconstruction was made: NaN, but for the null."""
        missing: dict[str, Any] = dict.fromkeys(RECONSTRUCTION_SCORES, torch.full_like(self.exposure, torch.nan))
        nothing = missing["exposure"]
        return replace(self, **missing, similarity=nothing, chance_hits=0.0, chance_trials=0)


RECONSTRUCTION_SCORES = ("exposure", "psnr", "ssim", "mse", "identified")
"""The scores that measure a reconstruction, and not its baseline."""


class Baseline:
    """Gallery, mean image and a reservoir of other audits' reconstructions.

    The null of an image is the larger of two similarities to it: that of the mean image (of the gallery, or of the
    image's class where the gallery has enough of it), and a fixed quantile over the reservoir, whose batches are
    assigned just as the reconstruction is; so it does not depend on how many members there are. Near copies
    of the image itself never count towards its null: in a small data set, or when an image is audited twice, they
    would hide its exposure.

    A reconstruction that is no nearer to the image than a flat picture of its mean colour has exposure 0. The colour
    may come from the gradient, but one number per channel shows nothing of the picture; for a smooth image it counted
    as exposure of up to .15. It is no part of the null, because it would lower the exposure of pictures that do show
    something.

    Args:
        gallery_size: Most gallery images kept (averaged down to 32 pixels a side).
        reservoir_size: Number of reconstructed images kept, the newest; at least one batch.
        quantile: Of the reservoir's similarities.
        measure: Similarity for exposure and assignment; "nmse" replaces "ssim" below 8 pixels a side.
    """

    def __init__(
        self,
        *,
        gallery_size: int = 256,
        reservoir_size: int = 64,
        quantile: float = 0.95,
        measure: Similarity = "ssim",
    ) -> None:
        if reservoir_size < 1 or gallery_size < 0 or not 0 < quantile <= 1:
            raise InvalidInputError(
                "Baseline: expected reservoir_size >= 1, gallery_size >= 0 and quantile in (0, 1], got "
                f"{reservoir_size}, {gallery_size} and {quantile}."
            )
        self.gallery_size = gallery_size
        self.reservoir_size = reservoir_size
        self.quantile = quantile
        self.measure: Similarity = measure
        self.gallery: Tensor | None = None
        self.gallery_labels: Tensor | None = None
        self._guesses: list[tuple[Tensor, Tensor]] = []

    @property
    def gallery_full(self) -> bool:
        """Whether further images would be ignored."""
        return self.gallery is not None and len(self.gallery) >= self.gallery_size

    @property
    def guesses(self) -> int:
        """Number of reconstructions in the reservoir."""
        return len(self._guesses)

    def observe(self, pixels: Tensor, labels: Tensor | None = None) -> None:
        """Add images of the training distribution, (N, C, H, W) in [0, 1], until the gallery is full."""
        room = self.gallery_size - (0 if self.gallery is None else len(self.gallery))
        pixels = pooled(pixels[:room].detach().cpu())
        if not len(pixels) or (self.gallery is not None and self.gallery.shape[1:] != pixels.shape[1:]):
            return
        classes = torch.full((len(pixels),), -1)
        if labels is not None and labels.ndim == 1 and not labels.is_floating_point():
            classes = labels[:room].detach().cpu().long()
        if self.gallery is None or self.gallery_labels is None:
            self.gallery, self.gallery_labels = pixels, classes
        else:
            self.gallery = torch.cat([self.gallery, pixels])
            self.gallery_labels = torch.cat([self.gallery_labels, classes])

    def remember(self, reconstruction: Tensor, truth: Tensor) -> None:
        """Add an audit's reconstructions with the true images they were made for, (B, C, H, W) in [0, 1]."""
        pairs = zip(reconstruction.detach().cpu(), truth.detach().cpu(), strict=True)
        # Never less than a batch, or large batches would have nothing to be compared with.
        self._guesses = [*self._guesses, *pairs][-max(self.reservoir_size, len(truth)) :]

    def frozen(self) -> Baseline:
        """Return a copy that later additions do not change; tensors are shared, never written to."""
        return copy.copy(self)

    def score(self, reconstruction: Tensor, truth: Tensor, labels: Tensor | None = None) -> AssignedScores:
        """Assign a reconstructed batch to the true one and measure it against the null.

        Args:
            reconstruction: (B, C, H, W) pixels in [0, 1], any order.
            truth: (B, C, H, W) pixels in [0, 1].
            labels: (B,) class indices, to identify within a class.
        """
        truth, reconstruction = truth.cpu().float(), reconstruction.cpu().float()
        labels = None if labels is None or labels.ndim != 1 or labels.is_floating_point() else labels.cpu()
        measure = usable_similarity(self.measure, *truth.shape[-2:])
        pairs = pairwise_similarity(reconstruction, truth, measure)
        order = assign(pairs)
        matched = reconstruction[order]
        reached = pairs[order, torch.arange(len(truth))]
        identifier = self._identifier(truth, labels)
        null, hits, trials, lucky = self._null(truth, labels, measure, identifier)
        unknown = torch.full((len(truth),), torch.nan)
        too_small = usable_similarity("ssim", *truth.shape[-2:]) != "ssim"
        return AssignedScores(
            order=order,
            similarity=reached,
            exposure=exposure(reached, null).masked_fill(reached <= flat_similarity(truth, measure), 0.0),
            null=null,
            psnr=psnr(matched, truth),
            ssim=torch.full_like(reached, torch.nan) if too_small else similarity(matched, truth),
            mse=mean_squared_error(matched, truth),
            identified=unknown if identifier is None else identifier.hits(pooled(matched)),
            gallery=1 if identifier is None else int(identifier.sizes.min()),
            chance_hits=hits,
            chance_trials=trials,
            null_complete=len(self._guesses) >= self.reservoir_size,
            measure=measure,
            null_exposure=None if lucky is None else exposure(lucky, null),
        )

    def _identifier(self, truth: Tensor, labels: Tensor | None) -> Identifier | None:
        if self.gallery is None or not self._comparable(truth):
            return None
        return Identifier(pooled(truth), self.gallery, labels=labels, gallery_labels=self.gallery_labels)

    def _null(
        self, truth: Tensor, labels: Tensor | None, measure: Similarity, identifier: Identifier | None
    ) -> tuple[Tensor, float, int, Tensor | None]:
        """Return the null similarity (B,), and identification hits and trials by mismatched reconstructions.

        Last comes the largest similarity (B,) that any of these reaches; None: there are none.
        """
        lucky: Tensor | None = None
        null = self._mean_image_similarity(truth, labels, measure)
        b = len(truth)
        members = [(guess, owner) for guess, owner in self._guesses if guess.shape == truth.shape[1:]]
        members = members[len(members) % b :]
        hits, trials, reached = 0.0, 0, []
        if members:
            guesses = torch.stack([guess for guess, _ in members])
            owners = torch.stack([owner for _, owner in members])
            own = near_copies(owners, truth)
            similarities = pairwise_similarity(guesses, truth, measure).masked_fill(own, 0.0)
            lucky = similarities.amax(0)
            for chunk in torch.arange(len(members)).split(b):
                order = chunk[assign(similarities[chunk])]
                reached.append(similarities[order, torch.arange(b)])
                if identifier is not None:
                    identified = identifier.hits(pooled(guesses[order]))
                    # A guess made from this very image is no guess.
                    counted = ~identified.isnan() & ~own[order].any(1)
                    hits, trials = hits + float(identified[counted].sum()), trials + int(counted.sum())
            level = torch.stack(reached).quantile(self.quantile, dim=0, interpolation="higher")
            null = torch.maximum(null, level)
        return null, hits, trials, lucky

    def _mean_image_similarity(self, truth: Tensor, labels: Tensor | None, measure: Similarity) -> Tensor:
        """Similarity of each image to the mean of the gallery's other images, or of its class; 0 without any."""
        best = torch.zeros(len(truth))
        if self.gallery is None or self.gallery_labels is None or not self._comparable(truth):
            return best
        others = ~near_copies(self.gallery, pooled(truth)).T
        groups = [(others, 1)]
        if labels is not None:
            groups.append((others & (labels[:, None] == self.gallery_labels), LEAST_CLASS_SIZE))
        for members, least in groups:
            counts = members.sum(1)
            means = (members.float() @ self.gallery.flatten(1)) / counts.clamp_min(1)[:, None]
            images = nn.functional.interpolate(
                means.reshape(-1, *self.gallery.shape[1:]), truth.shape[-2:], mode="bilinear"
            )
            best = torch.where(counts >= least, torch.maximum(best, similarity(images, truth, measure)), best)
        return best

    def _comparable(self, truth: Tensor) -> bool:
        return self.gallery is not None and self.gallery.shape[1:] == pooled(truth[:1]).shape[1:]


def flat_similarity(truth: Tensor, measure: Similarity = "ssim") -> Tensor:
    """Compare each image (B, C, H, W) with a flat picture of its mean colour: (B,) in [0, 1]; 0 for flat images."""
    flat = truth.mean((2, 3), keepdim=True).expand_as(truth)
    return similarity(flat, truth, measure).masked_fill(near_copies(flat, truth).diagonal(), 0.0)


def near_copies(images: Tensor, truth: Tensor) -> Tensor:
    """Tell which images (M, ...) show the same photograph as which true ones (N, ...): (M, N) booleans."""
    correlated = standardised(images) @ standardised(truth).T >= DUPLICATE
    distance = torch.cdist(images.flatten(1), truth.flatten(1)) / images[0].numel() ** 0.5
    return correlated | (distance < 2 / 255)

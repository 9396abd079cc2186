"""Gaussian priors of images: a formula, and a fit to public images.

In whitened coordinates x = μ + L w with w ~ N(0, I) the negative log-prior is ½‖w‖², and a step of equal length is
equally plausible in every direction.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass, field

import torch
from torch import Tensor

from lightning_gradaudit.attacks.matching.parametrizations import Parametrization
from lightning_gradaudit.errors import InvalidInputError
from lightning_gradaudit.simulation.observation import Observation


@dataclass(frozen=True, kw_only=True)
class FitSettings:
    """How the formula and the shrinkage of a fit are chosen by cross-validation.

    Attributes:
        folds: Parts of the images, of which each is left out once.
        most_images: Images that take part.
        shrinkages: Weights of the formula's covariance to choose from.
    """

    folds: int = 5
    most_images: int = 200
    shrinkages: tuple[float, ...] = (0.02, 0.05, 0.1, 0.2, 0.4, 0.7, 1.0)


SETTINGS = FitSettings()


class ImagePrior(ABC):
    """A Gaussian over images in pixel space: mean μ and a square root L of the covariance."""

    @abstractmethod
    def images(self, white: Tensor) -> Tensor:
        """Return μ + L w for w (B, C, H, W), pixels of the same shape; affine in w, not clipped."""

    @abstractmethod
    def white(self, images: Tensor) -> Tensor:
        """Return w for pixels μ + L w, both (B, C, H, W)."""


@dataclass(frozen=True, kw_only=True)
class PowerLawPrior(ImagePrior):
    """A formula for natural images: amplitudes 1 / (f² + f₀²)^(falloff/2), mid-grey mean, correlated channels.

    The amplitude spectrum of photographs falls as 1/f (Field, 1987), that of smooth ones faster. Frequencies are those
    of the cosine transform, f = √(u² + v²) in half-cycles per image, so opposite borders are not neighbours. All pairs
    of channels have the correlation `colour`.

    Args:
        contrast: Standard deviation of a pixel, in [0, 1] units.
        corner: f₀, the frequency below which the power is flat.
        falloff: Exponent of the amplitude's decay.
        colour: Correlation of two channels, in [0, 1).
    """

    contrast: float = 0.25
    corner: float = 1.0
    falloff: float = 1.0
    colour: float = 0.9

    def __post_init__(self) -> None:
        if not (self.contrast > 0 and self.corner > 0 and self.falloff > 0 and 0 <= self.colour < 1):
            raise InvalidInputError(
                f"PowerLawPrior needs contrast, corner and falloff > 0 and colour in [0, 1), got {self!r}."
            )

    def images(self, white: Tensor) -> Tensor:
        height, width = white.shape[2:]
        smooth = _cosines(height, white).T @ (white * self._amplitude(white)) @ _cosines(width, white)
        mean = smooth.mean(1, keepdim=True)
        common, own = self._colours(white.shape[1])
        return 0.5 + common * mean + own * (smooth - mean)

    def white(self, images: Tensor) -> Tensor:
        height, width = images.shape[2:]
        mean = images.mean(1, keepdim=True) - 0.5
        common, own = self._colours(images.shape[1])
        smooth = mean / common + (images - 0.5 - mean) / own
        return (_cosines(height, images) @ smooth @ _cosines(width, images).T) / self._amplitude(images)

    def log_volume(self, like: Tensor) -> float:
        """Return log |det L| for images of the shape (C, H, W) of `like`."""
        channels, height, width = like.shape
        common, own = self._colours(channels)
        colours = math.log(common) + (channels - 1) * math.log(own)
        return channels * float(self._amplitude(like[None]).log().sum()) + height * width * colours

    def _amplitude(self, like: Tensor) -> Tensor:
        u = torch.arange(like.shape[2], device=like.device, dtype=like.dtype)[:, None]
        v = torch.arange(like.shape[3], device=like.device, dtype=like.dtype)
        amplitude = (u**2 + v**2 + self.corner**2) ** (-self.falloff / 2)
        return amplitude * (self.contrast / (amplitude**2).mean().sqrt())

    def _colours(self, channels: int) -> tuple[float, float]:
        # Eigenvalues of the channels' correlation: 1 + (C - 1) r along their mean, 1 - r across it.
        return math.sqrt(1 + (channels - 1) * self.colour), math.sqrt(1 - self.colour)


@dataclass(frozen=True, kw_only=True, eq=False)
class FittedPrior(ImagePrior):
    """Mean and covariance of public images, the covariance shrunk towards a formula. Build it with `fit`.

    Attributes:
        mean: (C, H, W).
        base: The formula. In its white coordinates the covariance is `rest`² I but along some directions.
        rest: Standard deviation in all other directions.
        directions: (K, C·H·W) orthonormal.
        gains: (K,) standard deviations along them.
    """

    mean: Tensor = field(repr=False)
    base: PowerLawPrior
    rest: float
    directions: Tensor = field(repr=False)
    gains: Tensor = field(repr=False)

    @classmethod
    def fit(cls, pixels: Tensor, *, shrinkage: float | None = None, base: PowerLawPrior | None = None) -> FittedPrior:
        """Fit on public images: never on those that are audited.

        Args:
            pixels: (N, C, H, W) in [0, 1], at least two.
            shrinkage: Weight of the formula's covariance, in (0, 1]; few images need more. None: chosen by
                likelihood in five-fold cross-validation.
            base: The formula, scaled to the images; None: chosen in the same way among `FORMULAS`.

        Raises:
            InvalidInputError: When there are too few images, or the weight is out of range.
        """
        if pixels.ndim != 4 or len(pixels) < 2:
            raise InvalidInputError(f"pixels: expected at least 2 images (N, C, H, W), got {tuple(pixels.shape)}.")
        if shrinkage is not None and not 0 < shrinkage <= 1:
            raise InvalidInputError(f"shrinkage must lie in (0, 1] or be None, got {shrinkage!r}.")
        images = pixels.detach().double()
        weights = SETTINGS.shrinkages if shrinkage is None else (shrinkage,)
        formulas = FORMULAS if base is None else (base,)
        choices = [(formula, weight) for formula in formulas for weight in weights]
        formula, weight = choices[0] if len(choices) == 1 else _likeliest(images, choices)
        spectrum = _Spectrum.of(formula.white(images).flatten(1))
        return cls(
            mean=images.mean(0).float(),
            base=formula,
            rest=math.sqrt(weight * spectrum.level),
            directions=spectrum.directions.float(),
            gains=spectrum.variances(weight).sqrt().float(),
        )

    def images(self, white: Tensor) -> Tensor:
        self._check(white)
        stretched = self._stretch(white, self.gains.to(white), self.rest)
        return self.base.images(stretched) - 0.5 + self.mean.to(white)

    def white(self, images: Tensor) -> Tensor:
        self._check(images)
        white = self.base.white(images - self.mean.to(images) + 0.5)
        return self._stretch(white, 1 / self.gains.to(images), 1 / self.rest)

    def _stretch(self, white: Tensor, gains: Tensor, rest: float) -> Tensor:
        flat, directions = white.flatten(1), self.directions.to(white)
        return (rest * flat + (flat @ directions.T * (gains - rest)) @ directions).reshape(white.shape)

    def _check(self, images: Tensor) -> None:
        if images.shape[1:] != self.mean.shape:
            raise InvalidInputError(
                f"prior: fitted on images of shape {tuple(self.mean.shape)}, the audited ones are "
                f"{tuple(images.shape[1:])}. Fit it on images of the same shape."
            )


@dataclass(frozen=True)
class _Spectrum:
    """Mean and covariance of flat images (N, d): `eigenvalues` (K,) along `directions` (K, d), their mean `level`."""

    mean: Tensor
    eigenvalues: Tensor
    directions: Tensor
    level: float

    @classmethod
    def of(cls, flat: Tensor) -> _Spectrum:
        mean = flat.mean(0)
        centred = (flat - mean) / math.sqrt(len(flat) - 1)
        values, vectors = torch.linalg.eigh(centred @ centred.T)
        values, vectors = values[1:].clamp_min(0), vectors[:, 1:]  # N images span N - 1 directions about their mean
        level = max(float(values.sum()) / flat.shape[1], 1e-12)
        kept = values > 1e-9 * values[-1:]
        return cls(mean, values[kept], (centred.T @ vectors[:, kept] / values[kept].sqrt()).T, level)

    def variances(self, shrinkage: float) -> Tensor:
        """Return the variances (K,) along the directions; in others it is `shrinkage * level`."""
        return (1 - shrinkage) * self.eigenvalues + shrinkage * self.level

    def log_likelihood(self, flat: Tensor, shrinkage: float) -> float:
        """Return the log-density of flat images (M, d), summed, up to a constant."""
        centred = flat - self.mean
        along = (centred @ self.directions.T).square()
        elsewhere = centred.square().sum() - along.sum()
        variances, rest = self.variances(shrinkage), shrinkage * self.level
        volume = variances.log().sum() + (flat.shape[1] - len(variances)) * math.log(rest)
        return -0.5 * float(len(flat) * volume + (along / variances).sum() + elsewhere / rest)


FORMULAS = tuple(
    PowerLawPrior(corner=corner, falloff=falloff, colour=colour)
    for falloff, corner in ((1.0, 1.0), (1.5, 1.0), (2.0, 3.0), (3.0, 8.0))  # from rough to smooth
    for colour in (0.9, 0.99)
)


def _likeliest(images: Tensor, choices: list[tuple[PowerLawPrior, float]]) -> tuple[PowerLawPrior, float]:
    """Return the choice with the largest likelihood of images (N, C, H, W) in cross-validation."""
    images = images[torch.linspace(0, len(images) - 1, min(len(images), SETTINGS.most_images)).long()]
    fold = torch.arange(len(images), device=images.device) % min(SETTINGS.folds, len(images))
    outside = [fold == k for k in fold.unique() if int((fold != k).sum()) > 1]
    found = dict.fromkeys(choices, 0.0)
    for formula in {formula: None for formula, _ in choices}:
        white = formula.white(images).flatten(1)
        spectra = [(_Spectrum.of(white[~out]), white[out]) for out in outside]
        volume = len(images) * formula.log_volume(images[0])
        for choice in choices:
            if choice[0] == formula:
                found[choice] = sum(s.log_likelihood(left, choice[1]) for s, left in spectra) - volume
    return max(choices, key=lambda choice: found[choice])


def _cosines(size: int, like: Tensor) -> Tensor:
    """Return the orthonormal cosine transform, (size, size): row k is the k-th frequency."""
    k = torch.arange(size, device=like.device, dtype=like.dtype)[:, None]
    n = torch.arange(size, device=like.device, dtype=like.dtype)
    matrix = torch.cos(math.pi * k * (2 * n + 1) / (2 * size)) * math.sqrt(2 / size)
    return torch.where(k == 0, matrix / math.sqrt(2), matrix)


@dataclass(frozen=True, kw_only=True)
class Whitened(Parametrization):
    """Images as x = μ + L w of a Gaussian prior; w starts at its mean, 0, and costs ½‖w‖² times `weight`.

    Args:
        prior: The Gaussian prior.
        weight: 1 for the log-prior in nats; 0: only the coordinates are used.
        spread: Standard deviation of w at the start.
    """

    prior: ImagePrior = PowerLawPrior()
    weight: float = 1.0
    spread: float = 0.1

    def start(self, observation: Observation, generator: torch.Generator) -> list[Tensor]:
        return [self.spread * torch.randn(observation.shape, generator=generator).to(observation.device)]

    def images(self, variables: list[Tensor], observation: Observation) -> Tensor:
        return observation.normalization.from_pixels(self.prior.images(variables[0]))

    def variables(self, images: Tensor, observation: Observation) -> list[Tensor]:
        return [self.prior.white(observation.normalization.to_pixels(images))]

    def penalty(self, variables: list[Tensor]) -> Tensor | None:
        return 0.5 * self.weight * (variables[0] ** 2).sum() if self.weight else None

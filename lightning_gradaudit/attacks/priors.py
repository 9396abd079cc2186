"""Gaussian priors of images, and the maximum a posteriori attack on a noisy gradient.

Under Gaussian noise of known strength the best guess minimises the squared error over twice the noise's variance plus
the negative log-prior (Balunović et al., arXiv:2111.04706). In whitened coordinates x = μ + L w with w ~ N(0, I) that
prior is ½‖w‖², and a step of equal length is equally plausible in every direction.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass, field

import torch
from torch import Tensor

from lightning_gradaudit.attacks.gradient_matching import GradientMatching
from lightning_gradaudit.attacks.iterative import IterativeAttack, Run
from lightning_gradaudit.attacks.objectives import SquaredError
from lightning_gradaudit.attacks.optimizers import LBFGS, Optimizer
from lightning_gradaudit.attacks.parametrizations import Parametrization
from lightning_gradaudit.defences import GaussianNoise, global_norm
from lightning_gradaudit.errors import InvalidInputError
from lightning_gradaudit.observation import Observation
from lightning_gradaudit.reconstruction import Reconstruction


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
    """Natural images by formula: spectral power 1 / (f² + f₀²), mid-grey mean, correlated channels.

    The amplitude spectrum of photographs falls as 1/f (Field, 1987). Frequencies are those of the cosine transform,
    f = √(u² + v²) in half-cycles per image, so no border is wrapped around. Between channels the correlation is
    `colour`, whatever their number.

    Args:
        contrast: Standard deviation of a pixel, in [0, 1] units.
        corner: f₀, the frequency below which the power is flat.
        colour: Correlation of two channels, in [0, 1).
    """

    contrast: float = 0.25
    corner: float = 1.0
    colour: float = 0.9

    def __post_init__(self) -> None:
        if not (self.contrast > 0 and self.corner > 0 and 0 <= self.colour < 1):
            raise InvalidInputError(f"PowerLawPrior needs contrast > 0, corner > 0 and colour in [0, 1), got {self!r}.")

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

    def _amplitude(self, like: Tensor) -> Tensor:
        u = torch.arange(like.shape[2], device=like.device, dtype=like.dtype)[:, None]
        v = torch.arange(like.shape[3], device=like.device, dtype=like.dtype)
        amplitude = (u**2 + v**2 + self.corner**2).rsqrt()
        return amplitude * (self.contrast / (amplitude**2).mean().sqrt())

    def _colours(self, channels: int) -> tuple[float, float]:
        # Eigenvalues of the channels' correlation: 1 + (C - 1) r along their mean, 1 - r across it.
        return math.sqrt(1 + (channels - 1) * self.colour), math.sqrt(1 - self.colour)


@dataclass(frozen=True, kw_only=True, eq=False)
class FittedPrior(ImagePrior):
    """Mean and covariance of public images, the covariance shrunk towards a formula. Build it with `fit`.

    Attributes:
        mean: (C, H, W).
        root: (d, d) lower Cholesky factor of the covariance, d = C·H·W.
    """

    mean: Tensor = field(repr=False)
    root: Tensor = field(repr=False)

    @classmethod
    def fit(cls, pixels: Tensor, *, shrinkage: float = 0.2, base: ImagePrior | None = None) -> FittedPrior:
        """Fit on public images: never on those that are audited.

        Args:
            pixels: (N, C, H, W) in [0, 1], at least two.
            shrinkage: Weight of the formula's covariance, in (0, 1]; few images need more.
            base: The formula, scaled to the images' variance; None: `PowerLawPrior()`.

        Raises:
            InvalidInputError: When there are too few images, or the weight is out of range.
        """
        if pixels.ndim != 4 or len(pixels) < 2:
            raise InvalidInputError(f"pixels: expected at least 2 images (N, C, H, W), got {tuple(pixels.shape)}.")
        if not 0 < shrinkage <= 1:
            raise InvalidInputError(f"shrinkage must lie in (0, 1], got {shrinkage!r}.")
        flat = pixels.detach().double().flatten(1)
        dimension = flat.shape[1]
        centred = flat - flat.mean(0)
        white = torch.eye(dimension, dtype=torch.double, device=flat.device).reshape(-1, *pixels.shape[1:])
        prior = PowerLawPrior() if base is None else base
        columns = (prior.images(white) - prior.images(torch.zeros_like(white[:1]))).flatten(1)
        formula = columns.T @ columns
        empirical = centred.T @ centred / (len(flat) - 1)
        formula = formula * (empirical.trace() / formula.trace()).clamp_min(1e-6)
        root = torch.linalg.cholesky((1 - shrinkage) * empirical + shrinkage * formula)
        return cls(mean=flat.mean(0).reshape(pixels.shape[1:]).float(), root=root.float())

    def images(self, white: Tensor) -> Tensor:
        self._check(white)
        root, mean = self.root.to(white), self.mean.to(white)
        return mean + (white.flatten(1) @ root.T).reshape(white.shape)

    def white(self, images: Tensor) -> Tensor:
        self._check(images)
        centred = (images - self.mean.to(images)).flatten(1)
        return torch.linalg.solve_triangular(self.root.to(images), centred.T, upper=False).T.reshape(images.shape)

    def _check(self, images: Tensor) -> None:
        if images.shape[1:] != self.mean.shape:
            raise InvalidInputError(
                f"prior: fitted on images of shape {tuple(self.mean.shape)}, the audited ones are "
                f"{tuple(images.shape[1:])}. Fit it on images of the same shape."
            )


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
        prior: The Gaussian.
        weight: 1 for the log-prior in nats; 0 uses the coordinates alone.
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


@dataclass(frozen=True, kw_only=True)
class MaximumAPosteriori(IterativeAttack):
    """Minimise ‖g' - g‖²/2σ² + ½‖w‖² in the whitened coordinates of an image prior (arXiv:2111.04706).

    Applies where the gradient carries Gaussian noise whose strength is known: declared in the threat model, or given.

    Args:
        prior: What images look like; fit one on public images where there are some (`FittedPrior.fit`).
        noise: Standard deviation per coordinate, in units of the gradient; None: as `known_noise` finds it.
        optimizer: Of w.
    """

    prior: ImagePrior = PowerLawPrior()
    noise: float | None = None
    optimizer: Optimizer = LBFGS(line_search="strong_wolfe")

    def __post_init__(self) -> None:
        if self.noise is not None and not self.noise > 0:
            raise InvalidInputError(f"noise must be > 0 or None, got {self.noise!r}.")

    def start(
        self, observation: Observation, generator: torch.Generator, *, at: Tensor | None = None
    ) -> Run | Reconstruction:
        # Where the gradient was scaled or limited before it left, its simulation is not, and the squares mean nothing.
        if others := [d for d in observation.threat_model.defences if not isinstance(d, GaussianNoise)]:
            return Reconstruction.not_applicable(observation, f"simulated gradients lack {others[0]!r}")
        sigma = known_noise(observation) if self.noise is None else self.noise
        if sigma is None:
            return Reconstruction.not_applicable(observation, "no Gaussian noise of known strength on the gradient")
        matching = GradientMatching(
            objective=SquaredError(scale=1 / (2 * sigma**2)),
            parametrization=Whitened(prior=self.prior),
            optimizer=self.optimizer,
            label=self.name,
        )
        return matching.start(observation, generator, at=at)

    def energy(self, observation: Observation, result: Reconstruction) -> float:
        """Return the negative log-posterior of a reconstruction, up to a constant: lower is likelier."""
        sigma = known_noise(observation) if self.noise is None else self.noise
        if sigma is None or result.labels is None or not math.isfinite(result.matching_loss):
            return math.inf
        simulated = observation.simulate(result.inputs.to(observation.input_dtype), result.labels)
        misfit = SquaredError(scale=1 / (2 * sigma**2))(simulated, observation.gradients)
        white = self.prior.white(observation.normalization.to_pixels(result.inputs.float()))
        return float(misfit + 0.5 * (white**2).sum())


def known_noise(observation: Observation) -> float | None:
    """Return the deviation per coordinate of the Gaussian noise that the adversary knows to be there, or None.

    The strength of relative noise refers to the clean gradient; independent noise adds in squares, so the clean norm
    follows from that of the shared one.
    """
    coordinates = sum(g.numel() for g in observation.gradients.values())
    square = float(global_norm(observation.gradients)) ** 2
    variance = observation.noise_std**2
    for defence in reversed(observation.threat_model.defences):  # the last one acted last: undo it first
        if not isinstance(defence, GaussianNoise):
            return None
        if defence.std is not None:
            added = defence.std**2 * coordinates
        else:
            assert defence.relative is not None
            added = square * defence.relative**2 / (1 + defence.relative**2)
            variance += added / coordinates
        square = max(square - added, 0.0)
    return math.sqrt(variance) if variance > 0 else None

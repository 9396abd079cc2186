"""Match a batch inside the span that the gradient of a linear layer fed by the image reveals.

dL/dW = D Xᵀ and dL/db = D 1, so every image of the batch is a combination of the B leading right singular vectors of
[dL/dW, dL/db], with weights such that the last coordinate is 1: instead of B·C·H·W pixels, B (B - 1) numbers are
unknown. Unlike the exact inversions of such a layer this tolerates noise: the error of a singular vector is about σ/s
per coordinate, where s is its singular value, and s is large because it sums over all rows. For one image nothing
remains unknown.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from lightning_gradaudit.attacks.budget import Budget, Meter
from lightning_gradaudit.attacks.closed_form.image_layer import ImageLayer, image_layers
from lightning_gradaudit.attacks.iterative import IterativeAttack, Run, advance_share
from lightning_gradaudit.attacks.matching.gradient_matching import GradientMatching
from lightning_gradaudit.attacks.matching.objectives import (
    CosineDistance,
    Objective,
    SensitivityWeightedError,
    SquaredError,
)
from lightning_gradaudit.attacks.matching.optimizers import LBFGS, Adam, CosineDecay, Optimizer
from lightning_gradaudit.attacks.matching.parametrizations import Parametrization
from lightning_gradaudit.attacks.matching.priors import ImagePrior
from lightning_gradaudit.attacks.maximum_a_posteriori import MaximumAPosteriori, known_noise, prior_of
from lightning_gradaudit.attacks.reconstruction import Reconstruction
from lightning_gradaudit.errors import InvalidInputError
from lightning_gradaudit.simulation.defences import ClipNorm, GaussianNoise
from lightning_gradaudit.simulation.observation import Observation


@dataclass(frozen=True)
class SpanMatchingSettings:
    """Settings of `SpanMatching`."""

    most_rows: int = 2048  # of the gradient looked at, those of the largest norm
    least_relative_value: float = 1e-6  # of a singular value: below this share of the largest it is rounding
    coordinate_unit_pixels: float = 0.125  # half of what images usually deviate from their mean
    start_deviation: float = 0.3  # of the coordinates
    denoising_iterations: int = 100  # without a simulated gradient


SETTINGS = SpanMatchingSettings()


@dataclass(frozen=True, eq=False)
class AffineSpan:
    """Layer inputs as points origin + c @ basis.

    Attributes:
        layer: The layer, which maps its inputs back to images.
        origin: (d,) the point nearest to 0.
        basis: (r - 1, d) orthogonal rows of equal length, about what images differ by.
        vectors: (r, d + 1) right singular vectors, the bias last.
        values: (r,) singular values, descending.
    """

    layer: ImageLayer
    origin: Tensor = field(repr=False)
    basis: Tensor = field(repr=False)
    vectors: Tensor = field(repr=False)
    values: Tensor = field(repr=False)

    @classmethod
    def of(cls, observation: Observation, layer: ImageLayer, noise: float) -> AffineSpan | None:
        """Find the span of a batch; None where all is noise (a standard deviation per coordinate) or rounding."""
        assert layer.bias is not None
        gradients = observation.gradients
        whole = torch.cat([gradients[layer.weight], gradients[layer.bias][:, None]], dim=1)
        whole = whole[whole.norm(dim=1).topk(min(SETTINGS.most_rows, len(whole))).indices].double()
        squares, left = torch.linalg.eigh(whole @ whole.T)
        values, left = squares.clamp_min(0).sqrt().flip(0), left.flip(1)
        # The largest singular value of noise alone is about σ (√m + √n).
        floor = max(noise * sum(math.sqrt(n) for n in whole.shape), SETTINGS.least_relative_value * float(values[0]))
        rank = min(int((values > floor).sum()), observation.batch_size)
        if not rank:
            return None
        vectors = (left[:, :rank].T @ whole) / values[:rank, None]
        ones = vectors[:, -1]
        size = SETTINGS.coordinate_unit_pixels * float(_contrast(observation, layer).norm())
        across = torch.linalg.svd(ones[None])[2][1:] @ vectors[:, :-1]  # combinations that leave the bias's 1 alone
        directions = torch.linalg.qr(across.T)[0].T * size
        origin = ones @ vectors[:, :-1] / (ones @ ones).clamp_min(1e-30)
        return cls(layer, origin.float(), directions.float(), vectors, values[:rank])

    def deviation(self, inputs: Tensor, noise: float) -> Tensor:
        """Return by how much noise displaces layer inputs (B, d), per coordinate: (B,) standard deviations."""
        whole = torch.cat([inputs.double(), torch.ones_like(inputs[:, :1]).double()], dim=1)
        return (noise * ((whole @ self.vectors.T) / self.values).norm(dim=1)).float()


def _contrast(observation: Observation, layer: ImageLayer) -> Tensor:
    """Return by how much each layer input (d,) changes from a black to a white image."""
    low, high = observation.box
    return layer.inputs(high.expand(observation.input_shape)) - layer.inputs(low.expand(observation.input_shape))


@dataclass(frozen=True, kw_only=True, eq=False)
class InSpan(Parametrization):
    """Images of an `AffineSpan` as functions of their coordinates c (B, r - 1).

    Args:
        span: Where images lie.
        observation: Whose pixels the prior judges.
        prior: What images look like.
        weight: Of the negative log-prior, ½‖w‖².
    """

    span: AffineSpan
    observation: Observation = field(repr=False)
    prior: ImagePrior
    weight: float = 1.0

    def start(self, observation: Observation, generator: torch.Generator) -> list[Tensor]:
        drawn = torch.randn((observation.batch_size, len(self.span.basis)), generator=generator)
        return [SETTINGS.start_deviation * drawn.to(observation.device)]

    def images(self, variables: list[Tensor], observation: Observation) -> Tensor:
        return self.span.layer.image(self.span.origin + variables[0] @ self.span.basis, observation)

    def variables(self, images: Tensor, observation: Observation) -> list[Tensor]:
        inputs = torch.stack([self.span.layer.inputs(image) for image in images])
        basis = self.span.basis
        return [(inputs - self.span.origin) @ basis.T / (basis**2).sum(1)]

    def penalty(self, variables: list[Tensor]) -> Tensor | None:
        if not self.weight:
            return None
        pixels = self.observation.normalization.to_pixels(self.images(variables, self.observation))
        return 0.5 * self.weight * (self.prior.white(pixels) ** 2).sum()


@dataclass(frozen=True, kw_only=True)
class SpanMatching(IterativeAttack):
    """Gradient matching inside the row span of a biased linear layer that is fed by the image.

    Applies to any batch smaller than the layer, at any stage of training, to a clean gradient and to one with noise.
    Under noise of known strength the images found are denoised by the prior (the noise that is left on them is known,
    too) and go on outside the span as `MaximumAPosteriori` does. Our own; the span itself is that of SPEAR (Dimitrov et
    al., arXiv:2403.03945).

    Args:
        prior: What images look like, where noise leaves room for it; None: as `MaximumAPosteriori` takes it.
        optimizer: Of the coordinates.
        polish: What goes on from where `optimizer` ended, on the last part of the budget.
        share: Part of the budget that `optimizer` gets.
    """

    prior: ImagePrior | None = None
    optimizer: Optimizer = Adam(lr=0.03, schedule=CosineDecay())
    polish: Optimizer = LBFGS(line_search="strong_wolfe")
    share: float = 0.6

    def __post_init__(self) -> None:
        if not 0 < self.share < 1:
            raise InvalidInputError(f"share must lie in (0, 1), got {self.share!r}.")

    def start(
        self, observation: Observation, generator: torch.Generator, *, at: Tensor | None = None
    ) -> Run | Reconstruction:
        if observation.protocol.optimizer is not None:
            return Reconstruction.not_applicable(observation, "what is shared is not a gradient")
        others = [d for d in observation.threat_model.defences if not isinstance(d, (GaussianNoise, ClipNorm))]
        if others:
            return Reconstruction.not_applicable(observation, f"{others[0]!r} need not keep the span of the gradient")
        layers = image_layers(observation, generator)
        if not layers or layers[0].bias is None:
            return Reconstruction.not_applicable(
                observation, "no linear layer that shares the gradients of its weight and bias is fed by the image"
            )
        layer, noise = layers[0], known_noise(observation)
        span = AffineSpan.of(observation, layer, noise or 0.0)
        if span is None:
            return Reconstruction.not_applicable(observation, f"the gradient of {layer.name!r} is all noise")
        if min(observation.gradients[layer.weight].shape) <= observation.batch_size:
            return Reconstruction.not_applicable(observation, f"{layer.name!r} is not larger than the batch")
        prior = prior_of(observation) if self.prior is None else self.prior
        inside = InSpan(span=span, observation=observation, prior=prior, weight=0.0 if noise is None else 1.0)
        matching = GradientMatching(
            objective=_objective(observation, noise),
            parametrization=inside,
            optimizer=self.optimizer,
            label=self.name,
        )
        started = matching.start(observation, generator, at=at)
        return started if isinstance(started, Reconstruction) else _SpanRun(self, matching, started, noise, generator)


def _objective(observation: Observation, noise: float | None) -> Objective:
    if any(not isinstance(d, GaussianNoise) for d in observation.threat_model.defences):
        return CosineDistance()  # simulated gradients lack that defence, so only directions are comparable
    return SensitivityWeightedError() if noise is None else SquaredError(scale=1 / (2 * noise**2))


class _SpanRun:
    """Coordinates in the span first; then `polish`, under noise outside the span."""

    def __init__(
        self,
        attack: SpanMatching,
        matching: GradientMatching,
        inside: Run,
        noise: float | None,
        generator: torch.Generator,
    ) -> None:
        self.attack, self.matching, self.noise, self.generator = attack, matching, noise, generator
        inspan = matching.parametrization
        assert isinstance(inspan, InSpan)
        self.span, self.observation, self.prior = inspan.span, inspan.observation, inspan.prior
        self.inside: Run = inside
        self.outside: Run | None = None
        self.ended = False

    def advance(self, budget: Budget) -> None:
        meter = Meter(budget)
        if self.outside is None:
            unknown = len(self.span.basis) > 0
            advance_share(self.inside, meter, self.attack.share if unknown else 0.0)
            if not self.inside.finished and not meter.exhausted:
                self.outside = self._start_outside(self.inside.result())
                self.ended = self.outside is None
        if self.outside is not None:
            advance_share(self.outside, meter, 1.0)

    def _start_outside(self, found: Reconstruction) -> Run | None:
        observation = replace(self.observation, labels=found.labels)
        started: Run | Reconstruction
        if not isinstance(self.matching.objective, SquaredError):
            if not len(self.span.basis):
                return None
            polish = replace(self.matching, optimizer=self.attack.polish)
            started = polish.start(observation, self.generator, at=found.inputs)
        else:
            assert self.noise is not None
            posterior = MaximumAPosteriori(prior=self.prior, noise=self.noise, optimizer=self.attack.polish)
            started = posterior.start(observation, self.generator, at=self._denoise(found.inputs, self.noise))
        return None if isinstance(started, Reconstruction) else started

    def _denoise(self, images: Tensor, noise: float) -> Tensor:
        """Return the most probable images given points of the span and how far noise displaces them."""
        to_pixels, layer, prior = self.observation.normalization.to_pixels, self.span.layer, self.prior
        inputs = torch.stack([layer.inputs(image) for image in images])
        displaced = self.span.deviation(inputs, noise)
        white = prior.white(to_pixels(images)).requires_grad_()
        optimizer = torch.optim.LBFGS([white], max_iter=SETTINGS.denoising_iterations, line_search_fn="strong_wolfe")

        def closure() -> Tensor:
            optimizer.zero_grad()
            candidates = self.observation.normalization.from_pixels(prior.images(white))
            moved = torch.stack([layer.inputs(candidate) for candidate in candidates])
            energy = 0.5 * (((moved - inputs) / displaced[:, None]) ** 2).sum() + 0.5 * (white**2).sum()
            energy.backward()
            return energy

        optimizer.step(closure)
        with torch.no_grad():
            return self.observation.normalization.from_pixels(prior.images(white)).detach()

    @property
    def evaluations(self) -> int:
        return self.inside.evaluations + (0 if self.outside is None else self.outside.evaluations)

    @property
    def finished(self) -> bool:
        return self.ended or (self.inside if self.outside is None else self.outside).finished

    def result(self) -> Reconstruction:
        last = self.inside if self.outside is None or not self.outside.evaluations else self.outside
        return replace(last.result(), attack=self.attack.name, evaluations=self.evaluations)

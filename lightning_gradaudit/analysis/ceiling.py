"""The analysis of one audited step: what its gradient gives away whatever the attack, at the cost of one attack."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any

import torch
from torch import Tensor

from lightning_gradaudit.analysis.certificates import exact_leaks
from lightning_gradaudit.analysis.first_step import FirstStep, first_step, searched
from lightning_gradaudit.analysis.image_covariance import NaturalImages, Prior
from lightning_gradaudit.analysis.jacobian import LOCAL, InPixels, Jacobian
from lightning_gradaudit.analysis.reach import bending, reach
from lightning_gradaudit.analysis.resolution import Resolved, bracket_width, layer_shares, resolved_from
from lightning_gradaudit.analysis.spectrum import Krylov, bidiagonalise, rademacher
from lightning_gradaudit.errors import InvalidInputError, UnsupportedError
from lightning_gradaudit.simulation.defences import ClipNorm, GaussianNoise
from lightning_gradaudit.simulation.observation import Observation
from lightning_gradaudit.simulation.snapshot import Snapshot
from lightning_gradaudit.utils.tensors import plain_json
from lightning_gradaudit.utils.time_limit import time_left

MAX_BASIS = 2**28
"""Most numbers a Krylov basis may hold (1 GiB in float32)."""
PROBES_SHARE = 0.4
"""Of a limited time, what the probes may take: about as much is spent on the first step and the bending."""


@dataclass(frozen=True, kw_only=True)
class Analysis:
    """Settings of `analyse`.

    Args:
        precision: Relative precision ρ of the attacker's match: two images whose gradients differ by less than
            ρ‖g‖ are the same to them. The noise that decides is the declared one and this together. As g is what is
            shared, sharing less of it also makes what is left of it sharper: to compare defences that drop tensors,
            hold the noise fixed instead (`resolution.resolved`).
        curve: Further precisions at which leak-R² is reported; they cost nothing.
        prior: What the adversary knows of images beforehand.
        steps: Most Krylov steps of a probe; two products each.
        tolerance: A probe ends as soon as its bounds of leak-R² at `precision`, from above and below, lie within this
            of each other; 0: always all steps.
        probes: Random images of the prior.
        hidden: Leak-R² that counts as hidden, for `noise_to_hide`.
        rays: Directions along which the gradient's bending is measured, for `reach`: a product and six simulated
            gradients each.
        double: Compute in float64. In float32 precisions below 1e-6 mean nothing.

    Raises:
        InvalidInputError: When an argument is out of range.
    """

    precision: float = 1e-4
    curve: tuple[float, ...] = (1e-2, 1e-3, 1e-4, 1e-5, 1e-6)
    prior: Prior = field(default_factory=NaturalImages)
    steps: int = 40
    tolerance: float = 0.02
    probes: int = 1
    hidden: float = 0.1
    rays: int = 3
    double: bool = False

    def __post_init__(self) -> None:
        if not all(0 < rho <= 1 for rho in (self.precision, *self.curve)) or not 0 < self.hidden < 1:
            raise InvalidInputError(
                "Analysis: expected precision, every value of curve and hidden in (0, 1], got "
                f"{self.precision}, {self.curve}, {self.hidden}."
            )
        if self.steps < 1 or self.probes < 1 or self.rays < 1:
            raise InvalidInputError(
                f"Analysis: expected steps, probes and rays >= 1, got {self.steps}, {self.probes} and {self.rays}."
            )
        if not 0 <= self.tolerance < 1:
            raise InvalidInputError(f"Analysis: expected tolerance in [0, 1), got {self.tolerance!r}.")


@dataclass(frozen=True, kw_only=True, eq=False)
class Leakage:
    """What the analysis found; tensors are (B,) in the order of the batch.

    Attributes:
        leak_r2: Share of each image's variance that an attacker of the stated precision resolves, from above.
        leak_r2_low: The same from below: what as many steps of an iterative attacker are sure to resolve.
        curve: (precision, leak-R² from above, from below), means over the batch.
        reach: Share of each image's variance that an attacker who starts from afar is expected to resolve: where the
            error stops (see `analysis.reach`) times what a search finds whose first step is worth `first_step` (see
            `analysis.first_step`). A prediction of attacks, no bound. NaN in records of earlier versions, and where the
            gradient of a grey image is not finite.
        first_step: How well one linear solve at grey draws each image, as a correlation of details in [0, 1] (see
            `analysis.first_step`); 1 where a closed form recovers the image from the gradient
            without noise: no search is needed.
        noise_to_hide: Noise relative to the gradient's norm (as `GaussianNoise(relative=)` takes it) that would bring
            leak-R² down to `hidden`.
        hidden: That level.
        layers: Share of leak-R² each layer contributes, largest first; they sum to 1.
        precision: ρ.
        declared_noise: Noise of the declared defences relative to the gradient's norm.
        products: Products with the Jacobian.
        training_steps: The cost of the whole batch in forward and backward passes of its training step: by the time of
            this thread on the CPU, which other work does not touch, else by the clock.
        seconds: By the clock.
        assumptions: What must hold.
    """

    leak_r2: Tensor
    leak_r2_low: Tensor
    curve: tuple[tuple[float, float, float], ...]
    reach: Tensor
    first_step: Tensor
    noise_to_hide: Tensor
    hidden: float
    layers: dict[str, float]
    precision: float
    declared_noise: float
    products: int
    training_steps: float
    seconds: float
    assumptions: tuple[str, ...]

    @property
    def leaking_layer(self) -> str:
        """The layer that contributes most."""
        return next(iter(self.layers), "")

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON; what is not finite becomes None."""
        return {each.name: plain_json(getattr(self, each.name)) for each in fields(self)}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Leakage:
        """Read what `to_dict` wrote; None stands for what was not finite."""
        known = {each.name: each.type for each in fields(cls)}
        restored: dict[str, Any] = {
            name: math.nan if value is None else value for name, value in values.items() if name in known
        }
        for name in (name for name, kind in known.items() if kind == "Tensor"):
            numbers = values.get(name, [None] * len(values["leak_r2"]))
            restored[name] = torch.tensor([math.nan if v is None else v for v in numbers])
        restored["curve"] = tuple((float(rho), float(high), float(low)) for rho, high, low in values["curve"])
        restored["assumptions"] = tuple(values["assumptions"])
        return cls(**restored)


def analyse(snapshot: Snapshot, settings: Analysis, *, generator: torch.Generator) -> Leakage:
    """Analyse one step at its true images; it uses the truth, so it is no attack.

    All images of the batch are analysed in one run, so its cost does not grow with their number. Where its time is
    limited (`time_limit`) the probes end early: their bounds hold at every number of steps, they are only wider.

    Raises:
        TimeIsUpError: When the time does not suffice.
        DoubleBackwardError: When the model has an operation without a second derivative.
        UnsupportedError: When the shared gradient has no Jacobian here, or the batch is too large.
        InvalidInputError: When a product is not finite.
    """
    start = time.monotonic()
    clock = time.thread_time if snapshot.observation.device.type == "cpu" else time.monotonic
    began = clock()
    # The dropout mask is the real one, whatever the adversary knows of it: that can only raise the ceiling.
    observation = replace(snapshot.observation, protocol=snapshot.protocol)
    _require_memory(snapshot.truth.inputs.numel(), settings.steps)
    jacobian = Jacobian(observation, snapshot.truth.inputs, snapshot.truth.labels, double=settings.double)
    jacobian.check_adjoint(generator)
    linear = InPixels(jacobian, snapshot.truth.inputs.shape, observation.normalization, settings.prior)
    norm = float(jacobian.gradient.norm())
    noise, unmodelled = declared_noise(observation, norm, jacobian.rows)

    def sigma(precision: float) -> float:
        return math.hypot(noise, precision * norm)

    runs = _krylov_runs(linear, settings, sigma(settings.precision), generator)
    found = resolved_from(runs, blocks=jacobian.batch_size)
    bent = bending(
        jacobian, observation, snapshot.truth.inputs, prior=settings.prior, rays=settings.rays, generator=generator
    )
    shares = layer_shares(jacobian, linear, runs[0], sigma=sigma(settings.precision), group=layer_of)
    assumptions = _assumptions(settings, jacobian.note, runs, unmodelled)
    gradient, rows, products = jacobian.split(jacobian.gradient), jacobian.rows, jacobian.products
    del jacobian, linear  # it holds a graph, and there may be another
    first = _first_step(observation, snapshot, gradient, noise, settings, generator)
    taken, seconds = clock() - began, time.monotonic() - start
    return Leakage(
        leak_r2=found.leak_r2(sigma(settings.precision)).float(),
        leak_r2_low=found.leak_r2_low(sigma(settings.precision)).float(),
        curve=tuple(_point(found, rho, sigma(rho)) for rho in settings.curve),
        reach=reach(found, bent, sigma(min(settings.precision, *settings.curve))).cpu() * searched(first.worth),
        first_step=first.worth,
        noise_to_hide=_relative(found.noise_to_hide(settings.hidden), rows, norm),
        hidden=settings.hidden,
        layers=dict(sorted(shares.items(), key=lambda item: -item[1])),
        precision=settings.precision,
        declared_noise=noise * rows**0.5 / norm if norm > 0 else math.nan,
        products=products + first.products,
        training_steps=taken / _time_of_a_step(observation, snapshot, clock),
        seconds=seconds,
        assumptions=assumptions,
    )


def _require_memory(size: int, steps: int) -> None:
    if size * (steps + 1) > MAX_BASIS:
        raise UnsupportedError(
            f"A batch of {size} numbers is too large to analyse in {steps} steps: lower Analysis(steps=) to "
            f"at most {MAX_BASIS // size - 1}, or audit smaller batches."
        )


def _krylov_runs(linear: InPixels, settings: Analysis, sigma: float, generator: torch.Generator) -> list[Krylov]:
    """Run a probe of each random image, until its bounds of leak-R² at noise σ meet."""
    keep = (1 - PROBES_SHARE) * time_left()
    limited = math.isfinite(keep)

    def enough(run: Krylov) -> bool:
        return (limited and time_left() <= keep) or bracket_width(run, sigma) <= settings.tolerance

    return [
        bidiagonalise(
            linear,
            linear.root(rademacher(linear, generator)),
            settings.steps,
            enough=enough if settings.tolerance or limited else None,
        )
        for _ in range(settings.probes)
    ]


def _first_step(
    observation: Observation,
    snapshot: Snapshot,
    gradient: dict[str, Tensor],
    noise: float,
    settings: Analysis,
    generator: torch.Generator,
) -> FirstStep:
    """Return the worth of the first step; 1 for images that closed forms recover from the gradient without noise."""
    undefended = {name: part.reshape(observation.gradients[name].shape) for name, part in gradient.items()}
    clean = replace(snapshot, observation=replace(snapshot.observation, gradients=undefended))
    needless = exact_leaks(clean, generator=generator)
    if bool(needless.all()):
        return FirstStep(torch.ones(len(needless)), 0)
    truth, labels, shared = snapshot.truth.inputs, snapshot.truth.labels, torch.cat(list(gradient.values()))
    of_noise = torch.Generator().manual_seed(int(torch.randint(2**62, (), generator=generator)))
    if noise:  # from a generator of its own, so that the start is the same with noise and without
        shared = shared + noise * torch.randn(len(shared), generator=of_noise).to(shared)
    try:
        found = first_step(
            observation, truth, labels, shared, prior=settings.prior, generator=generator, double=settings.double
        )
    except InvalidInputError:  # a model may be undefined at grey; the ceiling does not depend on it
        return FirstStep(torch.where(needless, 1.0, torch.nan), 0)
    return replace(found, worth=torch.where(needless, 1.0, found.worth))


def declared_noise(observation: Observation, norm: float, rows: int) -> tuple[float, tuple[str, ...]]:
    """Return the standard deviation per coordinate of the declared noise, in units of the undefended gradient.

    Args:
        norm: Of the undefended gradient.
        rows: Its number of coordinates.

    Returns:
        The deviation, and the defences that are not modelled. Leaving one out can only raise the ceiling: what is done
        to a gradient afterwards adds no information to it.
    """
    variance, scale, unmodelled = 0.0, 1.0, []
    for defence in observation.threat_model.defences:
        if isinstance(defence, ClipNorm):
            scale *= min(1.0, defence.max_norm / max(scale * norm, 1e-30))
        elif isinstance(defence, GaussianNoise):
            std = defence.std if defence.relative is None else defence.relative * scale * norm / rows**0.5
            variance += ((std or 0.0) / scale) ** 2
        else:
            unmodelled.append(repr(defence))
    return math.sqrt(variance), tuple(unmodelled)


def layer_of(parameter: str) -> str:
    """Return the module a parameter belongs to; the parameter itself at the top level."""
    return parameter.rpartition(".")[0] or parameter


def _point(found: Resolved, rho: float, sigma: float) -> tuple[float, float, float]:
    return rho, float(found.leak_r2(sigma).mean()), float(found.leak_r2_low(sigma).mean())


def _relative(sigma: Tensor, rows: int, norm: float) -> Tensor:
    return (sigma * rows**0.5 / norm if norm > 0 else torch.full_like(sigma, torch.nan)).float()


def _assumptions(settings: Analysis, note: str, runs: list[Krylov], unmodelled: tuple[str, ...]) -> tuple[str, ...]:
    said = [
        LOCAL,
        f"a Gaussian attacker who matches the gradient to a relative precision of {settings.precision:g}",
        f"prior: {settings.prior!r}; Krylov steps of each probe: {', '.join(str(run.steps) for run in runs)}",
    ]
    if note:
        said.append(note)
    if unmodelled:
        said.append(f"not modelled, which can only raise the ceiling: {', '.join(unmodelled)}")
    return tuple(said)


def _time_of_a_step(observation: Observation, snapshot: Snapshot, clock: Callable[[], float]) -> float:
    """Time a training step's forward and backward pass: the median of three, after one that warms things up."""
    taken = []
    leaves = observation.leaves()
    for _ in range(4):
        start = clock()
        float(next(iter(observation.simulate(snapshot.truth.inputs, snapshot.truth.labels, leaves).values())).sum())
        taken.append(clock() - start)
    return max(statistics.median(taken[1:]), 1e-9)

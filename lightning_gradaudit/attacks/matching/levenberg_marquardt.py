"""Matching as a zero-residual least-squares problem: Levenberg-Marquardt without any matrix.

A gradient has far more coordinates than an image has pixels, and at the truth all residuals are zero. Near a solution
Gauss-Newton steps then converge fast, where first-order methods are slow because JᵀJ is ill-conditioned.
Products with J = ∂g/∂x and its transpose come from the derivatives of one loss, as Jᵀu = ∇_x⟨∇_θℓ, u⟩ and
Jv = ∇_θ⟨∇_xℓ, v⟩ (Pearlmutter, 1994); conjugate gradients solve for the step.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from lightning_gradaudit.attacks.base import check_second_derivatives, input_gradient
from lightning_gradaudit.attacks.budget import Budget, Meter
from lightning_gradaudit.attacks.iterative import IterativeAttack, Run
from lightning_gradaudit.attacks.labels.recovery import noise_images, recover_labels
from lightning_gradaudit.attacks.matching.objectives import SensitivityWeightedError
from lightning_gradaudit.attacks.matching.parametrizations import Parametrization
from lightning_gradaudit.attacks.matching.priors import Whitened
from lightning_gradaudit.attacks.reconstruction import Outcome, Reconstruction
from lightning_gradaudit.errors import InvalidInputError
from lightning_gradaudit.metrics.functional.gradients import relative_squared_error
from lightning_gradaudit.simulation.defences import GaussianNoise
from lightning_gradaudit.simulation.observation import Observation


@dataclass(frozen=True, kw_only=True)
class DampingSettings:
    """How the damping λ follows the quality of the linear model.

    Attributes:
        good_ratio, poor_ratio: Actual over predicted decrease above or below which λ falls or grows.
        good_factor, poor_factor, refused_factor: Of λ after a step of a good or poor ratio, and after a refused step.
        largest_growth: Growth of λ in all after which no step is found any more.
        solved_ratio: Squared residual of a step's equations, relative to the first, at which they count as solved.
    """

    good_ratio: float = 0.75
    poor_ratio: float = 0.25
    good_factor: float = 1 / 3
    poor_factor: float = 2.0
    refused_factor: float = 4.0
    largest_growth: float = 1e12
    solved_ratio: float = 1e-6


SETTINGS = DampingSettings()


@dataclass(frozen=True, kw_only=True)
class LevenbergMarquardt(IterativeAttack):
    """Minimise Σ_l w_l ‖g'_l - g_l‖² by damped Gauss-Newton steps in the variables of a parametrization.

    Each step solves (JᵀWJ + λI) s = -JᵀWr by conjugate gradients and is kept if the loss falls; λ follows the
    ratio of the actual decrease to the predicted one (Marquardt, 1963). Weights are those of
    `SensitivityWeightedError`. One product with J and one with Jᵀ together cost less than an evaluation and are
    counted as one. Applies where what is shared is the gradient of one loss, with Gaussian noise at most.

    Args:
        parametrization: What the images are a function of; whitened coordinates precondition the problem.
        power: Exponent of the tensor weights, see `SensitivityWeightedError`.
        iterations: Most iterations of conjugate gradients for one step.
        damping: First λ, relative to the curvature along the first gradient.
        tolerance: Stop when the weighted squared error (about 1 for noise images) falls below it.
    """

    parametrization: Parametrization = Whitened(weight=0.0)
    power: float = 0.5
    iterations: int = 60
    damping: float = 1e-4
    tolerance: float = 1e-13

    def __post_init__(self) -> None:
        if self.iterations < 1 or not self.damping > 0:
            raise InvalidInputError(f"LevenbergMarquardt needs iterations >= 1 and damping > 0, got {self!r}.")

    def start(
        self, observation: Observation, generator: torch.Generator, *, at: Tensor | None = None
    ) -> Run | Reconstruction:
        protocol = observation.protocol
        if protocol.optimizer is not None or protocol.private is not None or protocol.clip is not None:
            return Reconstruction.not_applicable(observation, "what is shared is not the gradient of one loss")
        if others := [d for d in observation.threat_model.defences if not isinstance(d, GaussianNoise)]:
            return Reconstruction.not_applicable(observation, f"simulated gradients lack {others[0]!r}")
        if observation.labels is None:
            estimate = recover_labels(observation, generator=generator)
            if estimate.labels is None:
                return Reconstruction.not_applicable(observation, f"labels unknown: {estimate.reason}")
            observation = replace(observation, labels=estimate.labels)
        given = None if at is None else self.parametrization.variables(at, observation)
        variables = self.parametrization.start(observation, generator) if given is None else given
        objective = SensitivityWeightedError(power=self.power)
        references = [noise_images(observation, generator) for _ in range(objective.references)]
        return _Run(self, observation, objective, variables, references)


class _Linearised:
    """The residual r = √W (g' - g) at a point, as one vector, and products with its Jacobian."""

    def __init__(self, run: _Run, point: Tensor) -> None:
        observation, names = run.observation, list(run.observation.gradients)
        self.point = point.detach().requires_grad_()
        leaves = observation.leaves()
        self._weights = [leaves[name] for name in names]
        self._roots = [run.roots[name] for name in names]
        loss = observation.loss(run.images(self.point), run.labels, leaves)
        self._by_point, *self._by_weights = torch.autograd.grad(
            loss, [self.point, *self._weights], create_graph=True, allow_unused=True, materialize_grads=True
        )
        if not run.checked:
            check_second_derivatives(dict(zip(names, self._by_weights, strict=True)))
            run.checked = True
        observed = observation.gradients.values()
        self.residual = self._join([g.detach() - o for g, o in zip(self._by_weights, observed, strict=True)])

    def _join(self, parts: list[Tensor]) -> Tensor:
        return torch.cat([root * part.flatten() for root, part in zip(self._roots, parts, strict=True)])

    def multiply(self, direction: Tensor) -> Tensor:
        """Return the product of the Jacobian with a direction of the variables."""
        if not self._by_point.requires_grad:
            return torch.zeros_like(self.residual)
        return self._join(input_gradient([self._by_point], self._weights, [direction], keep=True))

    def multiply_transpose(self, residual: Tensor) -> Tensor:
        """Return the product of the Jacobian's transpose with a residual."""
        parts = residual.split([w.numel() for w in self._weights])
        scaled = [
            (root * part).reshape(w.shape) for root, part, w in zip(self._roots, parts, self._weights, strict=True)
        ]
        return input_gradient(self._by_weights, [self.point], scaled, keep=True)[0]


class _Run:
    """The current point, and the damping of the next step."""

    def __init__(
        self,
        attack: LevenbergMarquardt,
        observation: Observation,
        objective: SensitivityWeightedError,
        variables: list[Tensor],
        references: list[Tensor],
    ) -> None:
        assert observation.labels is not None
        self.attack, self.observation, self.labels = attack, observation, observation.labels
        self.objective, self.references = objective, references
        self.shapes = [v.shape for v in variables]
        self.point = torch.cat([v.detach().flatten() for v in variables])
        self.roots: dict[str, Tensor] = {}
        self.checked = self.finished = False
        self.evaluations, self.loss, self.damping, self.first_damping = 0, math.inf, 0.0, 0.0
        self.trajectory: list[tuple[int, float]] = []

    def images(self, point: Tensor) -> Tensor:
        """Decode a flat vector of variables."""
        parts = point.split([shape.numel() for shape in self.shapes])
        variables = [part.reshape(shape) for part, shape in zip(parts, self.shapes, strict=True)]
        return self.attack.parametrization.images(variables, self.observation)

    def advance(self, budget: Budget) -> None:
        meter = Meter(budget)
        if not self.roots:
            self._calibrate(meter)
        while not meter.exhausted and not self.finished:
            self._step(meter)
            self.trajectory.append((self.evaluations + meter.evaluations, self.loss))
        self.evaluations += meter.evaluations

    def _calibrate(self, meter: Meter) -> None:
        seen = []
        for images in self.references:
            if meter.remaining > 1:
                seen.append(self.observation.simulate(images, self.labels))
                meter.spend()
        weights = self.objective.calibrated(seen, self.observation.gradients).weights
        assert weights is not None
        self.roots = {name: weight.sqrt() for name, weight in weights.items()}

    def _step(self, meter: Meter) -> None:
        """Linearise, and try damped steps until one lowers the loss."""
        meter.spend()
        here = _Linearised(self, self.point)
        self.loss = float(here.residual @ here.residual)
        self.finished = not math.isfinite(self.loss) or self.loss <= self.attack.tolerance
        if self.finished or meter.exhausted:
            return
        meter.spend()
        gradient = here.multiply_transpose(here.residual)
        size = float(gradient @ gradient)
        if not (size > 0 and math.isfinite(size)):  # the loss does not change in any direction
            self.finished = True
            return
        if not self.damping:
            curvature = float(here.multiply(gradient).square().sum()) / size
            self.damping = self.first_damping = self.attack.damping * max(curvature, 1e-30)
        while not meter.exhausted:
            step, predicted = self._solve(here, gradient, meter)
            if meter.exhausted:  # out of budget: a step that was not tried does not count
                return
            meter.spend()
            loss = self._loss(self.point + step)
            if loss < self.loss:
                ratio = (self.loss - loss) / max(predicted, 1e-300)
                self.point, self.loss = (self.point + step).detach(), loss
                if ratio > SETTINGS.good_ratio:
                    self.damping *= SETTINGS.good_factor
                elif ratio < SETTINGS.poor_ratio:
                    self.damping *= SETTINGS.poor_factor
                return
            self.damping *= SETTINGS.refused_factor
            if self.damping > SETTINGS.largest_growth * self.first_damping:
                self.finished = True
                return

    def _loss(self, point: Tensor) -> float:
        with torch.no_grad():
            images = self.images(point)
        simulated = self.observation.simulate(images, self.labels)
        return sum(
            float((self.roots[n] * (simulated[n] - g)).square().sum()) for n, g in self.observation.gradients.items()
        )

    def _solve(self, here: _Linearised, gradient: Tensor, meter: Meter) -> tuple[Tensor, float]:
        """Return the step, and by how much the linear model says the loss falls."""
        step, rest = torch.zeros_like(gradient), -gradient
        direction, norm = rest, float(rest @ rest)
        start = norm
        for _ in range(self.attack.iterations):
            solved = norm <= SETTINGS.solved_ratio * start
            if solved or meter.exhausted or meter.remaining < 2:  # 2: the step must be tried, too
                break
            meter.spend()
            image = here.multiply(direction)
            curvature = float(image @ image) + self.damping * float(direction @ direction)
            length = norm / max(curvature, 1e-300)
            step = step + length * direction
            rest = rest - length * (here.multiply_transpose(image) + self.damping * direction)
            before, norm = norm, float(rest @ rest)
            direction = rest + (norm / before) * direction
        # (JᵀWJ + λI) s = -gradient - rest, so the quadratic model needs no further product.
        predicted = float((rest - gradient) @ step) + self.damping * float(step @ step)
        return step, predicted

    def result(self) -> Reconstruction:
        with torch.no_grad():
            images = self.images(self.point)
        simulated = self.observation.simulate(images, self.labels)
        matching = float(relative_squared_error(simulated, self.observation.gradients))
        finite = math.isfinite(matching) and bool(images.isfinite().all())
        outcome = Outcome.CONVERGED if self.loss <= self.attack.tolerance else Outcome.BUDGET_SPENT
        return Reconstruction(
            inputs=images,
            labels=self.labels,
            matching_loss=matching if finite else math.inf,
            evaluations=self.evaluations,
            outcome=outcome if finite else Outcome.NONFINITE,
            attack=self.attack.name,
            trajectory=tuple(self.trajectory),
        )

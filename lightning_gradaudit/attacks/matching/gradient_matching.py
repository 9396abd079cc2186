"""The one optimisation loop: find images whose simulated gradient matches the observed one.

Best-so-far, non-finite values, budgets and restarts are handled here and nowhere else; recipes only compose.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from lightning_gradaudit.attacks.budget import Budget, Meter
from lightning_gradaudit.attacks.iterative import IterativeAttack, Run, part_of, progress_of
from lightning_gradaudit.attacks.labels.recovery import LabelEstimate, noise_images, recover_labels
from lightning_gradaudit.attacks.matching.objectives import CosineDistance, Objective
from lightning_gradaudit.attacks.matching.optimizers import Adam, Optimizer
from lightning_gradaudit.attacks.matching.parametrizations import Parametrization, Pixels
from lightning_gradaudit.attacks.matching.problem import LossAndGradient, MatchingProblem, SoftLabelsRefusedError
from lightning_gradaudit.attacks.matching.regularizers import GroupConsistency, Penalty
from lightning_gradaudit.attacks.reconstruction import Outcome, Reconstruction
from lightning_gradaudit.errors import InvalidInputError, described
from lightning_gradaudit.metrics.functional.gradients import relative_squared_error
from lightning_gradaudit.simulation.observation import Observation

_HOST_READS_EVERY = 50  # evaluations between two looks of the host at device values
_PATH_GROWTH = 1.3  # ratio of the evaluations at two images that are kept of a run


class _BudgetSpentError(Exception):
    """Leaves an optimizer's inner loop exactly at the budget."""


@dataclass(frozen=True, kw_only=True)
class GradientMatching(IterativeAttack):
    """Minimise objective(simulate(x, y), observed) + Σ penalties over images x (and soft labels).

    Args:
        objective: Distance between gradients.
        regularizers: Penalties on the images and on what they activate.
        parametrization: What the images are a function of, where they start and where they must stay.
        optimizer: Settings of the optimizer.
        labels: Where labels come from when they are not given: "recovered" by counting (see `attacks.labels`),
            or "joint": one soft label per sample optimised along with its image.
        consensus: Pull restarts, which then take turns, towards their mean.
        restarts: Independent starts that share the budget; the lowest loss wins.
        tolerance: Stop when the objective falls below it.
        label: Name in tables.
        max_batch: Largest batch the method was published for; beyond it, it does not apply. None: any.
        exact: Always differentiate twice. False: compiled evaluations of optimizers that do not compare gradients take
            derivatives by difference, a quarter cheaper, wherever the first of them is within 2 % of the exact one.
    """

    objective: Objective = CosineDistance()
    regularizers: tuple[Penalty, ...] = ()
    parametrization: Parametrization = Pixels()
    optimizer: Optimizer = Adam(signed=True)
    labels: Literal["recovered", "joint"] = "recovered"
    consensus: GroupConsistency | None = None
    restarts: int = 1
    tolerance: float = 1e-11
    label: str = "GradientMatching"
    max_batch: int | None = None
    exact: bool = False

    def __post_init__(self) -> None:
        if self.restarts < 1:
            raise InvalidInputError(f"restarts must be >= 1, got {self.restarts}.")
        if self.labels not in ("recovered", "joint"):
            raise InvalidInputError(f"labels must be 'recovered' or 'joint', got {self.labels!r}.")
        if self.labels == "joint" and self.objective.references:
            raise InvalidInputError(
                f"objective: {self.objective!r} is calibrated on the labels, got labels='joint'. "
                "Use labels='recovered' or another objective."
            )

    @property
    def name(self) -> str:
        return self.label

    def start(
        self, observation: Observation, generator: torch.Generator, *, at: Tensor | None = None
    ) -> Run | Reconstruction:
        if self.max_batch is not None and observation.batch_size > self.max_batch:
            return Reconstruction.not_applicable(
                observation, f"{self.label} is defined for at most {self.max_batch} image(s) a batch"
            )
        estimate = self._labels(observation, generator)
        joint = estimate.labels is None and self.labels == "joint" and estimate.classes > 0
        if estimate.labels is None and not joint:
            return Reconstruction.not_applicable(observation, f"labels unknown: {estimate.reason}")
        known = replace(observation, labels=estimate.labels)
        exact = self.exact or self.optimizer.exact
        evaluation = MatchingProblem(known, self.objective, self.regularizers, exact=exact)
        starts = [
            _Start(self, known, evaluation, estimate.classes if joint else 0, generator, at)
            for _ in range(self.restarts)
        ]
        references = [noise_images(known, generator) for _ in range(self.objective.references)]
        return _Restarts(self, starts, references)

    def _labels(self, observation: Observation, generator: torch.Generator) -> LabelEstimate:
        if observation.labels is not None:
            return LabelEstimate(observation.labels)
        estimate = recover_labels(observation, generator=generator)
        return replace(estimate, labels=None) if self.labels == "joint" else estimate


class _Candidate(NamedTuple):
    """Variables, and the images and labels they stand for, with a graph."""

    variables: list[Tensor]
    images: Tensor
    labels: Tensor


class _Start:
    """One candidate: its variables, and the best of them so far with the loss they had before the step after."""

    def __init__(
        self,
        attack: GradientMatching,
        observation: Observation,
        evaluation: MatchingProblem,
        soft_classes: int,
        generator: torch.Generator,
        at: Tensor | None,
    ) -> None:
        self.attack, self.observation, self.evaluation = attack, observation, evaluation
        given = None if at is None else attack.parametrization.variables(at, observation)
        drawn = attack.parametrization.start(observation, generator) if given is None else given
        self.variables = [v.detach().clone() for v in drawn]
        self.soft = soft_classes > 0
        if self.soft:
            logits = torch.randn((observation.batch_size, soft_classes), generator=generator)
            self.variables.append(logits.to(observation.device))
        self.loss = torch.full((), torch.inf, device=observation.device)
        self.best = [v.clone() for v in self.variables]
        self.evaluations = 0
        self.finished = False
        self.refused = ""
        self.trajectory: list[tuple[int, float]] = []
        self.path: list[tuple[int, Tensor]] = []
        self.consensus: Tensor | None = None
        self.scale: Tensor | None = None

    def images(self, variables: list[Tensor]) -> Tensor:
        """Decode variables."""
        return self.attack.parametrization.images(variables[:-1] if self.soft else variables, self.observation)

    def labels(self, variables: list[Tensor]) -> Tensor:
        """Return class indices or what they were given as; (B, classes) probabilities where they are optimised."""
        if self.soft:
            return variables[-1].softmax(1)
        assert self.observation.labels is not None
        return self.observation.labels

    def begin(self, budget: Budget) -> None:
        """Begin a cycle of the schedule, at the best point so far."""
        self.meter = Meter(budget)
        self.variables = [v.detach().clone().requires_grad_() for v in self.best]
        self.optimizer = self.attack.optimizer.build(self.variables)
        self.scale = None
        self._looked = -_HOST_READS_EVERY

    def advance(self) -> None:
        """Go through the cycle."""

        def closure() -> Tensor:
            if self.meter.exhausted:
                raise _BudgetSpentError
            return self._evaluate()

        while not self.finished:
            self._set_rate()
            before = self.meter.evaluations
            try:
                loss = self.optimizer.step(closure)  # type: ignore[arg-type]
            except _BudgetSpentError:
                break
            except SoftLabelsRefusedError as error:
                self.refuse(error)
                break
            self._after_step(loss, self.meter.evaluations - before)  # type: ignore[arg-type]
        self._look(final=True)

    def refuse(self, error: SoftLabelsRefusedError) -> None:
        """Give up: the loss wants classes."""
        self.refused, self.finished = f"the loss does not accept soft labels ({described(error)})", True

    def _set_rate(self) -> None:
        if (rate := self.attack.optimizer.learning_rate(progress_of(self.meter))) is not None:
            self.optimizer.param_groups[0]["lr"] = rate

    def _after_step(self, loss: Tensor, evaluations: int) -> None:
        images = self.variables[:-1] if self.soft else self.variables
        self.attack.parametrization.project(images, self.observation)
        if self.meter.evaluations - self._looked >= _HOST_READS_EVERY:
            self._looked = self.meter.evaluations
            self._look()
            self.finished = not math.isfinite(float(loss)) or float(self.loss) <= self.attack.tolerance
        self.finished = self.finished or self.attack.optimizer.stalled(evaluations)

    def _look(self, *, final: bool = False) -> None:
        """Note where the run stands; images at times that grow apart, so that long runs stay light."""
        self.trajectory.append((self.evaluations, float(self.loss)))
        last = self.path[-1][0] if self.path else 0
        if self.evaluations > last and (final or self.evaluations >= _PATH_GROWTH * last):
            with torch.no_grad():
                self.path.append((self.evaluations, self.images(self.best).detach().cpu().clone()))

    def candidate(self, variables: list[Tensor]) -> _Candidate:
        """Return what variables stand for."""
        return _Candidate(variables, self.images(variables), self.labels(variables))

    def _evaluate(self) -> Tensor:
        """Evaluate the variables, leave their gradient in place, and remember them if they are the best."""
        candidate = self.candidate(self.variables)
        return self._take(candidate, self.evaluation(candidate.images, candidate.labels, soft=self.soft))

    def _take(self, candidate: _Candidate, found: LossAndGradient) -> Tensor:
        loss, gradients = self._pulled_back(candidate, found)
        self._offer(loss)
        if self.scale is None:
            scale = self.attack.optimizer.scale(gradients)
            self.scale = torch.ones_like(loss) if scale is None else scale
        progress = progress_of(self.meter)
        for variable, gradient in zip(self.variables, gradients, strict=True):
            transformed = self.attack.optimizer.transform(self.scale * gradient, progress)
            # Laid out as the variable is: layers in channels_last hand on a gradient in that order, and fused
            # optimizers take both for one.
            variable.grad = torch.empty_like(variable).copy_(transformed)
        return self.scale * loss

    def _pulled_back(self, candidate: _Candidate, found: LossAndGradient) -> tuple[Tensor, list[Tensor]]:
        """Return the loss, with what the variables cost themselves, and its derivatives with respect to them."""
        self.meter.spend()
        self.evaluations += 1
        variables, images, labels = candidate
        loss, outputs, weights = found.loss, [images], [found.inputs_gradient]
        if found.labels_gradient is not None:
            outputs, weights = [*outputs, labels], [*weights, found.labels_gradient]
        decoded = variables[:-1] if self.soft else variables
        for penalty in (self.attack.parametrization.penalty(decoded), self._pull(images)):
            if penalty is not None:
                loss = loss + penalty.detach()
                outputs, weights = [*outputs, penalty], [*weights, torch.ones_like(penalty)]
        return loss, list(torch.autograd.grad(outputs, variables, weights))

    def _pull(self, images: Tensor) -> Tensor | None:
        if self.attack.consensus is None or self.consensus is None:
            return None
        return self.attack.consensus(images, self.consensus)

    def _offer(self, loss: Tensor) -> None:
        """Keep the variables if their loss is finite and lower, without a synchronisation with the device."""
        better = loss < self.loss  # false for NaN
        self.loss = torch.where(better, loss, self.loss)
        self.best = [torch.where(better, new.detach(), old) for new, old in zip(self.variables, self.best, strict=True)]


class _Restarts:
    """Independent starts that share a budget, one after the other."""

    def __init__(self, attack: GradientMatching, starts: list[_Start], references: list[Tensor]) -> None:
        self.attack, self.starts, self.references = attack, starts, references
        self.spent_on_references = 0

    @property
    def evaluations(self) -> int:
        return self.spent_on_references + sum(start.evaluations for start in self.starts)

    @property
    def finished(self) -> bool:
        return all(start.finished for start in self.starts)

    def advance(self, budget: Budget) -> None:
        meter = Meter(budget)
        if self.references:
            self._calibrate(meter)
        rounds = 1 if self.attack.consensus is None else self.attack.consensus.rounds
        for turn in range(rounds):
            if turn:
                self._meet()
            self._in_turn(meter, rounds - turn)

    def _in_turn(self, meter: Meter, rounds: int) -> None:
        for index, start in enumerate(self.starts):
            if not meter.exhausted and not start.finished:
                before = start.evaluations
                start.begin(part_of(meter, 1 / (rounds * len(self.starts) - index)))
                start.advance()
                meter.spend(start.evaluations - before)

    def _calibrate(self, meter: Meter) -> None:
        """Show the objective what noise images give, as many as leave at least one evaluation for the attack."""
        start = self.starts[0]
        seen = []
        for images in self.references:
            if meter.remaining > 1:
                seen.append(start.evaluation.simulate(images, start.labels(start.best)))
                meter.spend()
        self.spent_on_references, self.references = len(seen), []
        start.evaluation.calibrate(seen)

    def _meet(self) -> None:
        with torch.no_grad():
            assert self.attack.consensus is not None
            mean = self.attack.consensus.mean([start.images(start.best) for start in self.starts])
        for start in self.starts:
            start.consensus = mean

    def result(self) -> Reconstruction:
        losses = [float(start.loss) for start in self.starts]
        best = self.starts[losses.index(min(losses))]
        observation = best.observation
        if best.refused:
            return Reconstruction.not_applicable(observation, best.refused, evaluations=self.evaluations)
        with torch.no_grad():
            images, labels = best.images(best.best), best.labels(best.best)
        finite = math.isfinite(min(losses))
        matching = relative_squared_error(observation.simulate(images, labels), observation.gradients)
        outcome = Outcome.CONVERGED if min(losses) <= self.attack.tolerance else Outcome.BUDGET_SPENT
        return Reconstruction(
            inputs=images,
            labels=labels.argmax(1) if best.soft else labels,
            matching_loss=float(matching) if finite else math.inf,
            evaluations=self.evaluations,
            outcome=outcome if finite else Outcome.NONFINITE,
            attack=self.attack.label,
            trajectory=tuple(best.trajectory),
            path=tuple(best.path),
        )

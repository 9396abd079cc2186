"""The one optimisation loop: find images whose simulated gradient matches the observed one.

This file and `candidate` handle the best point so far, non-finite values, budgets and restarts; recipes only compose.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import partial
from typing import Literal

import torch
from torch import Tensor

from lightning_gradaudit.attacks.budget import Budget, Meter
from lightning_gradaudit.attacks.iterative import IterativeAttack, Run, part_of
from lightning_gradaudit.attacks.labels.recovery import LabelEstimate, noise_images, recover_labels
from lightning_gradaudit.attacks.matching.candidate import Candidate
from lightning_gradaudit.attacks.matching.objectives import CosineDistance, Objective
from lightning_gradaudit.attacks.matching.optimizers import Adam, Optimizer
from lightning_gradaudit.attacks.matching.parametrizations import Parametrization, Pixels
from lightning_gradaudit.attacks.matching.problem import MatchingProblem
from lightning_gradaudit.attacks.matching.regularizers import GroupConsistency, Penalty
from lightning_gradaudit.attacks.matching.shared_statistics import SharedStatistics
from lightning_gradaudit.attacks.reconstruction import Outcome, Reconstruction
from lightning_gradaudit.errors import InvalidInputError
from lightning_gradaudit.metrics.functional.gradients import relative_squared_error
from lightning_gradaudit.simulation.observation import Observation


@dataclass(frozen=True, kw_only=True)
class GradientMatching(IterativeAttack):
    """Minimise objective(simulate(x, y), observed) + Σ penalties over images x (and soft labels).

    Where the adversary holds buffers after the step, `SharedStatistics` is one of the penalties.

    Args:
        objective: Distance between gradients.
        regularizers: Penalties on the images and on what they activate.
        parametrization: What the images are a function of, where they start and where they must stay.
        optimizer: Settings of the optimizer.
        labels: Where labels come from when they are not given: "recovered" by counting (see `attacks.labels`),
            or "joint": one soft label per sample optimised along with its image.
        consensus: Pull restarts towards their mean; None: they are independent.
        restarts: Number of starts that share the budget; the lowest loss wins.
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
        penalties = SharedStatistics.added_to(self.regularizers, known, self.objective.unit(known.gradients))
        problem = MatchingProblem(known, self.objective, penalties, exact=exact)
        candidates = [
            Candidate(
                known,
                problem,
                parametrization=self.parametrization,
                optimizer=self.optimizer,
                tolerance=self.tolerance,
                soft_classes=estimate.classes if joint else 0,
                generator=generator,
                at=at,
            )
            for _ in range(self.restarts)
        ]
        references = [noise_images(known, generator) for _ in range(self.objective.references)]
        return _Restarts(self, problem, candidates, references)

    def _labels(self, observation: Observation, generator: torch.Generator) -> LabelEstimate:
        if observation.labels is not None:
            return LabelEstimate(observation.labels)
        estimate = recover_labels(observation, generator=generator)
        return replace(estimate, labels=None) if self.labels == "joint" else estimate


class _Restarts:
    """Starts that share a budget, one after the other."""

    def __init__(
        self, attack: GradientMatching, problem: MatchingProblem, candidates: list[Candidate], references: list[Tensor]
    ) -> None:
        self.attack, self.problem, self.candidates, self.references = attack, problem, candidates, references
        self.spent_on_references = 0

    @property
    def evaluations(self) -> int:
        return self.spent_on_references + sum(each.evaluations for each in self.candidates)

    @property
    def finished(self) -> bool:
        return all(each.finished for each in self.candidates)

    def advance(self, budget: Budget) -> None:
        meter = Meter(budget)
        if self.references:
            self._calibrate(meter)
        rounds = 1 if self.attack.consensus is None else self.attack.consensus.rounds
        parts = rounds * len(self.candidates)
        for part in range(parts):
            if part and part % len(self.candidates) == 0:
                self._renew_consensus()
            candidate = self.candidates[part % len(self.candidates)]
            if not meter.exhausted and not candidate.finished:
                before = candidate.evaluations
                candidate.advance(part_of(meter, 1 / (parts - part)))
                meter.spend(candidate.evaluations - before)

    def _calibrate(self, meter: Meter) -> None:
        """Show the objective gradients of noise images, as many as leave an evaluation for the attack."""
        first = self.candidates[0]
        seen = []
        for images in self.references:
            if meter.remaining > 1:
                seen.append(self.problem.simulate(images, first.labels(first.best)))
                meter.spend()
        self.spent_on_references, self.references = len(seen), []
        self.problem.calibrate(seen)

    def _renew_consensus(self) -> None:
        consensus = self.attack.consensus
        assert consensus is not None
        with torch.no_grad():
            mean = consensus.mean([each.images(each.best) for each in self.candidates])
        for each in self.candidates:
            each.pull = partial(consensus, mean=mean)

    def result(self) -> Reconstruction:
        losses = [float(each.loss) for each in self.candidates]
        best = self.candidates[losses.index(min(losses))]
        observation = best.observation
        if best.refusal:
            return Reconstruction.not_applicable(observation, best.refusal, evaluations=self.evaluations)
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

"""The attack on a defended gradient: by an adversary who knows the defence."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch

from lightning_gradaudit.attacks.base import Attack
from lightning_gradaudit.attacks.budget import Budget, Meter
from lightning_gradaudit.attacks.iterative import part_of, with_labels
from lightning_gradaudit.attacks.matching.gradient_matching import GradientMatching
from lightning_gradaudit.attacks.matching.objectives import Objective
from lightning_gradaudit.attacks.matching.recipes import InvertingGradients, Modern, WhitenedMatching
from lightning_gradaudit.attacks.matching.through_defences import ThroughDefences, objective_for
from lightning_gradaudit.attacks.reconstruction import Reconstruction
from lightning_gradaudit.attacks.sequence import SequentialAttack
from lightning_gradaudit.simulation.observation import Observation

_DIRECTIONS = SequentialAttack(stages=(Modern(), InvertingGradients()), shares=(1.0, 1.0), label="Directions")


@dataclass(frozen=True, kw_only=True)
class AdaptiveMatching(Attack):
    """Match through the defence, and without regard to it; keep what explains the defended gradient better.

    Which of the two is returned is decided by the adversary's own objective (`objective_for`), which needs no truth.

    Args:
        stages, shares: Run one after the other with the objective that fits the defence, on parts of the budget.
        plain: Compares directions, whatever the defence.
        plain_share: Of the budget, in (0, 1).
    """

    stages: tuple[GradientMatching, ...] = (InvertingGradients(), Modern(), WhitenedMatching())
    shares: tuple[float, ...] = (1.0, 1.0, 2.0)
    plain: Attack = _DIRECTIONS
    plain_share: float = 0.15

    def run(self, observation: Observation, *, budget: Budget, generator: torch.Generator) -> Reconstruction:
        objective = objective_for(observation.threat_model.defences)
        if objective is None:
            return Reconstruction.not_applicable(observation, "no declared defence that can be matched through")
        observation = with_labels(observation, generator)
        stages = tuple(_through(stage, objective) for stage in self.stages)
        adaptive = SequentialAttack(stages=stages, shares=self.shares, label="Adaptive")
        meter, found = Meter(budget), []
        for attack, share in ((self.plain, self.plain_share), (adaptive, 1.0)):
            if not meter.exhausted:
                found.append(attack(observation, budget=part_of(meter, share), generator=generator))
                meter.spend(found[-1].evaluations)
        losses = [_loss(objective, observation, each) for each in found]
        best = found[losses.index(min(losses))]
        reasons = [f"{each.attack}: {loss:.3g}" for each, loss in zip(found, losses, strict=True)]
        reason = f"defended distance of {', of '.join(reasons)}"
        return replace(best, attack=self.name, evaluations=meter.evaluations, reason=reason)


def _through(stage: GradientMatching, objective: Objective) -> GradientMatching:
    if isinstance(objective, ThroughDefences):
        return replace(stage, objective=replace(objective, inner=stage.objective))
    return replace(stage, objective=objective)


def _loss(objective: Objective, observation: Observation, found: Reconstruction) -> float:
    if found.labels is None or not math.isfinite(found.matching_loss):
        return math.inf
    simulated = observation.simulate(found.inputs.to(observation.input_dtype), found.labels)
    return float(objective(simulated, observation.gradients))

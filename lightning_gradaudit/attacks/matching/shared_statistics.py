"""Batch statistics that shared buffers give away, as a term of gradient matching."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lightning_gradaudit.attacks.matching.problem import activations
from lightning_gradaudit.attacks.matching.regularizers import ActivationRegularizer, Penalty
from lightning_gradaudit.simulation.batch_statistics import LayerStatistics
from lightning_gradaudit.simulation.observation import Observation


@dataclass(frozen=True, kw_only=True)
class StatisticsSettings:
    """How much the batch statistics count beside the gradient.

    Attributes:
        weight: In units of the objective (`Objective.unit`). On faces that no figure is from, 1 was within 1.1 dB of
            the best of 0.1, 1 and 10 for every pair of network and attack; 10 lost up to 3.2 dB, for then the
            statistics are met and the gradient is not (docs/notes/statistics.md).
    """

    weight: float = 1.0


SETTINGS = StatisticsSettings()


@dataclass(frozen=True, kw_only=True)
class SharedStatistics(ActivationRegularizer):
    """Mean squared distance of the candidates' batch statistics to those that shared buffers give away.

    Means are compared in standard deviations of the layer's inputs, standard deviations by their ratio, so that what
    rounding of the buffers has spoilt fades; layers count alike. A constant of one standard deviation costs 1. Every
    `GradientMatching` has this term where the adversary holds the buffers after the step.

    Args:
        weight: In units of the objective; see `StatisticsSettings`.
    """

    weight: float = SETTINGS.weight

    def targets(self, observation: Observation) -> dict[str, tuple[Any, ...]]:
        found = observation.statistics
        return {name: (known, observation, 1 / len(found)) for name, known in found.items()}

    def of_calls(self, activations: Sequence[Tensor], *target: Any) -> Tensor:
        known: LayerStatistics = target[0]
        observation, share = target[1:]
        passes = observation.passes(activations)
        if known.of_passes(len(passes)) is None:  # the self-test says that the replay is another step
            return torch.zeros(())
        mean, spread = known.distance(passes)
        return (mean.square().mean() + spread.square().mean()) * share

    @classmethod
    def added_to(cls, penalties: tuple[Penalty, ...], observation: Observation, unit: float) -> tuple[Penalty, ...]:
        """Return penalties with this one among them, where there are statistics and it is not there yet."""
        if not observation.statistics or any(isinstance(each, cls) for each in penalties):
            return penalties
        return (*penalties, cls(weight=SETTINGS.weight * unit))

    def distance(self, activation: Tensor, *target: Any) -> Tensor:
        return self.of_calls([activation], *target)


def statistics_distance(observation: Observation, inputs: Tensor, labels: Tensor) -> float:
    """Return `SharedStatistics` of a candidate at weight 1, >= 0; 0 where there are no statistics."""
    penalty = SharedStatistics(weight=1.0)
    targets = penalty.targets(observation)
    if not targets:
        return 0.0
    with activations(observation, targets) as seen:
        observation.simulate(inputs, labels)
    return float(penalty(seen, targets).detach())

"""Attacks one after the other, each starting from the images of the one before it."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from lightning_gradaudit.attacks.budget import Budget, Meter
from lightning_gradaudit.attacks.iterative import IterativeAttack, Run, part_of, with_labels
from lightning_gradaudit.attacks.matching.recipes import InvertingGradients, Modern, WhitenedMatching
from lightning_gradaudit.attacks.matching.shared_statistics import statistics_distance
from lightning_gradaudit.attacks.reconstruction import Reconstruction
from lightning_gradaudit.errors import InvalidInputError
from lightning_gradaudit.simulation.observation import Observation


@dataclass(frozen=True, kw_only=True)
class SequentialAttack(IterativeAttack):
    """Run attacks one after the other on shares of the budget; each starts from the images of the one before it.

    A robust but inexact method comes first, an exact one that needs a good start last. A local minimum of one stage is
    often none of the next, whose objective and coordinates differ; a stage may increase the gradient's error. The
    result of lowest error is returned, with the path of all stages.

    Args:
        stages: Attacks in their order; the first draws its own start.
        shares: Parts of the budget, one for each stage; relative to their sum.
        label: Name in tables.
    """

    stages: tuple[IterativeAttack, ...] = (InvertingGradients(), Modern(), WhitenedMatching())
    shares: tuple[float, ...] = (1.0, 1.0, 2.0)
    label: str = "SequentialAttack"

    def __post_init__(self) -> None:
        if not self.stages or len(self.shares) != len(self.stages) or min(self.shares) <= 0:
            raise InvalidInputError(
                f"SequentialAttack needs stages and as many shares > 0, got {self.stages!r} and {self.shares!r}."
            )

    @property
    def name(self) -> str:
        return self.label

    def start(
        self, observation: Observation, generator: torch.Generator, *, at: Tensor | None = None
    ) -> Run | Reconstruction:
        observation = with_labels(observation, generator)  # once for all stages
        first = self.stages[0].start(observation, generator, at=at)
        return first if isinstance(first, Reconstruction) else _SequenceRun(self, first, observation, generator)


class _SequenceRun:
    """One start; every cycle runs all stages."""

    def __init__(
        self, attack: SequentialAttack, first: Run, observation: Observation, generator: torch.Generator
    ) -> None:
        self.attack, self.observation, self.generator = attack, observation, generator
        self.first: Run | None = first
        self.last: Reconstruction | None = None
        self.best: Reconstruction | None = None
        self.error = math.inf
        self.evaluations = 0
        self.finished = False
        self.path: list[tuple[int, Tensor]] = []

    def advance(self, budget: Budget) -> None:
        meter = Meter(budget)
        ended = []
        for position, stage in enumerate(self.attack.stages):
            if meter.exhausted:
                return
            run = self._start(stage)
            if run is None:
                continue
            run.advance(part_of(meter, self.attack.shares[position] / sum(self.attack.shares[position:])))
            meter.spend(run.evaluations)
            self._add_result(run)
            ended.append(run.finished)
        self.finished = all(ended)

    def _start(self, stage: IterativeAttack) -> Run | None:
        """Start a stage from the images of the last one; None: it does not apply."""
        if (first := self.first) is not None:
            self.first = None
            return first
        started = stage.start(self.observation, self.generator, at=None if self.last is None else self.last.inputs)
        return None if isinstance(started, Reconstruction) else started

    def _add_result(self, run: Run) -> None:
        found = run.result()
        unseen = run.evaluations - found.path[-1][0] if found.path else 0  # spent before the first image
        self.path += [(self.evaluations + unseen + spent, images) for spent, images in found.path]
        self.evaluations += run.evaluations
        self.last = found
        error = found.matching_loss
        if found.labels is not None and math.isfinite(error):
            error += statistics_distance(self.observation, found.inputs, found.labels)
        if self.best is None or error < self.error:
            self.best, self.error = found, error

    def result(self) -> Reconstruction:
        assert self.best is not None
        return replace(
            self.best, attack=self.attack.name, evaluations=self.evaluations, trajectory=(), path=tuple(self.path)
        )

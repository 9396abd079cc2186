"""Attacks that can be stopped and continued, so that several of them can race within one budget."""

from __future__ import annotations

import math
from abc import abstractmethod
from dataclasses import replace
from typing import Protocol

import torch
from torch import Tensor

from lightning_gradaudit.attacks.base import Attack
from lightning_gradaudit.attacks.budget import Budget, Meter
from lightning_gradaudit.attacks.labels.recovery import known_labels
from lightning_gradaudit.attacks.reconstruction import Reconstruction
from lightning_gradaudit.simulation.observation import Observation


class Run(Protocol):
    """One start of an attack."""

    @property
    def evaluations(self) -> int:
        """Simulated gradients spent so far."""
        ...

    @property
    def finished(self) -> bool:
        """Whether more budget would change nothing."""
        ...

    def advance(self, budget: Budget) -> None:
        """Spend a budget on one whole cycle of the schedule, from the best point so far."""
        ...

    def result(self) -> Reconstruction:
        """Return the best point so far."""
        ...


class IterativeAttack(Attack):
    """An attack that improves one candidate step by step."""

    @abstractmethod
    def start(
        self, observation: Observation, generator: torch.Generator, *, at: Tensor | None = None
    ) -> Run | Reconstruction:
        """Prepare a run; a Reconstruction says why the attack does not apply.

        Args:
            observation: What the adversary knows.
            generator: Draws where the run starts.
            at: Images (B, C, H, W) of an earlier attack to start from, if the attack can; None: draw a start.
        """

    def run(self, observation: Observation, *, budget: Budget, generator: torch.Generator) -> Reconstruction:
        run = self.start(observation, generator)
        if isinstance(run, Reconstruction):
            return run
        run.advance(budget)
        return run.result()


def with_labels(observation: Observation, generator: torch.Generator) -> Observation:
    """Return the observation with its labels or recovered ones; they are None if they cannot be recovered."""
    return replace(observation, labels=known_labels(observation, generator=generator).labels)


def part_of(meter: Meter, share: float) -> Budget:
    """Return a share of what a meter has left as a budget, at least one evaluation; check `exhausted` first."""
    left = meter.left
    evaluations = None if left.evaluations is None else max(1, math.ceil(left.evaluations * share))
    return Budget(evaluations=evaluations, seconds=None if left.seconds is None else left.seconds * share)


def advance_share(run: Run, meter: Meter, share: float) -> None:
    """Spend a share of what a meter has left on a run, and record it on the meter."""
    before = run.evaluations
    run.advance(part_of(meter, share))
    meter.spend(run.evaluations - before)


def progress_of(meter: Meter) -> float:
    """Return the share of its budget that a meter has spent, by count or by time, in [0, 1]."""
    budget = meter.budget
    by_count = meter.evaluations / budget.evaluations if budget.evaluations else 0.0
    by_time = meter.seconds / budget.seconds if budget.seconds else 0.0
    return min(1.0, max(by_count, by_time))

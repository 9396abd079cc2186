"""An attack that chooses its own means: what the adversary knows decides, then a race."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch

from lightning_gradaudit.attacks.base import Attack
from lightning_gradaudit.attacks.gradient_matching import GradientMatching
from lightning_gradaudit.attacks.iterative import IterativeAttack, Run, part_of
from lightning_gradaudit.attacks.labels import recover_labels
from lightning_gradaudit.attacks.least_squares import LevenbergMarquardt
from lightning_gradaudit.attacks.objectives import MovedError, scale_free_error
from lightning_gradaudit.attacks.optimizers import LBFGS
from lightning_gradaudit.attacks.peeling import LayerPeeling
from lightning_gradaudit.attacks.priors import MaximumAPosteriori, Whitened, known_noise
from lightning_gradaudit.attacks.recipes import InvertingGradients, NetworkPrior, WhitenedMatching
from lightning_gradaudit.budget import Budget, Meter
from lightning_gradaudit.defences import GaussianNoise, global_norm
from lightning_gradaudit.errors import InvalidInputError
from lightning_gradaudit.observation import Observation
from lightning_gradaudit.reconstruction import Outcome, Reconstruction

_FIRST = 0.6  # share of the budget that equations, and the match they lead to, get where they apply
_FINAL = 0.7  # share of the race's budget that the last two left have between them
_LEAST = 25  # evaluations of a probe that tells something, times its rounds: each round picks again
_LOUD = 0.1  # noise, relative to the gradient, from which the lowest matching loss is no longer the best image
_RACERS = (
    InvertingGradients(),
    WhitenedMatching(),
    GradientMatching(
        objective=MovedError(),
        parametrization=Whitened(weight=0.0),
        optimizer=LBFGS(line_search="strong_wolfe"),
        label="LBFGS",
    ),
    LevenbergMarquardt(),
    NetworkPrior(),
)


@dataclass(frozen=True, kw_only=True)
class Auto(Attack):
    """Pick the attack by what is known, else by a race of short probes within the budget.

    Gaussian noise of known strength, a tenth of the gradient or more: `noisy`. A gradient that was scaled or limited
    otherwise: the first racer alone, which must not depend on the gradient's length. Else the larger part of the
    budget goes to `first`, if it applies, and the rest to successive halving (Jamieson and Talwalkar,
    arXiv:1502.07943) by the relative squared error of the gradient but for a factor: every racer gets a short cycle,
    the worse half leaves, and so on until two are left, which share what is left: early leaders are often overtaken.
    Small budgets race fewer. The best candidate of all is returned; `reason` says what each one reached and cost.

    Args:
        first: What needs equations and not a race.
        racers: At least one, the most important first; the first must compare directions only, as the cosine distance
            does.
        noisy: The attack under known noise.
    """

    first: Attack | None = LayerPeeling()
    racers: tuple[IterativeAttack, ...] = _RACERS
    noisy: Attack = MaximumAPosteriori()

    def __post_init__(self) -> None:
        if not self.racers:
            raise InvalidInputError("racers: expected at least one attack, got none.")

    def run(self, observation: Observation, *, budget: Budget, generator: torch.Generator) -> Reconstruction:
        if observation.labels is None:  # once for all, so that nobody wins by luckier labels
            observation = replace(observation, labels=recover_labels(observation, generator=generator).labels)
        others = [d for d in observation.threat_model.defences if not isinstance(d, GaussianNoise)]
        if not others and (noise := known_noise(observation)) is not None and _is_loud(observation, noise):
            result = self.noisy(observation, budget=budget, generator=generator)
            why = f"noise of standard deviation {noise:.3g} is known"
            return replace(result, attack=self.name, reason=f"{why}: {_report(self.noisy, result)}")
        if others:
            result = _Race(self.racers[:1], observation, generator).run(budget)
            why = f"simulated gradients lack {others[0]!r}, only directions compare: "
            return replace(result, attack=self.name, reason=why + result.reason)
        return replace(self._search(observation, budget, generator), attack=self.name)

    def _search(self, observation: Observation, budget: Budget, generator: torch.Generator) -> Reconstruction:
        meter, found, reports = Meter(budget), [], []
        if self.first is not None and meter.remaining > 1:
            found.append(self.first(observation, budget=part_of(meter, _FIRST), generator=generator))
            meter.spend(found[0].evaluations)
            reports.append(_report(self.first, found[0]))
        if not meter.exhausted and not any(result.outcome is Outcome.CONVERGED for result in found):
            race = _Race(self.racers[: _affordable(len(self.racers), meter.left)], observation, generator)
            found.append(race.run(meter.left))
            meter.spend(found[-1].evaluations)
            reports.append(found[-1].reason)
        best = min(found, key=lambda result: _error(observation, result))
        return replace(best, evaluations=meter.evaluations, reason="; ".join(reports))


def _is_loud(observation: Observation, noise: float) -> bool:
    coordinates = sum(g.numel() for g in observation.gradients.values())
    return noise * coordinates**0.5 >= _LOUD * float(global_norm(observation.gradients))


def _rounds(racers: int) -> int:
    """Return how often the worse half leaves until two are left."""
    return max(0, (racers - 1).bit_length() - 1)


def _affordable(racers: int, budget: Budget) -> int:
    """Return how many can race so that each one's first probe tells something, at least two."""
    if budget.evaluations is None:
        return racers
    probes = (1 - _FINAL) * budget.evaluations
    return next((n for n in range(racers, 2, -1) if n * _LEAST * _rounds(n) ** 2 <= probes), min(2, racers))


class _Race:
    """Racers on one observation, and the best that each of them has had."""

    def __init__(
        self, racers: tuple[IterativeAttack, ...], observation: Observation, generator: torch.Generator
    ) -> None:
        self.racers = racers
        self.runs: dict[int, Run] = {}
        self.observation = observation
        self.best: dict[int, Reconstruction] = {}
        self.errors: dict[int, float] = {}
        for index, racer in enumerate(racers):
            started = racer.start(observation, generator)
            if isinstance(started, Reconstruction):
                self.best[index] = started
            else:
                self.runs[index] = started

    def run(self, budget: Budget) -> Reconstruction:
        """Spend the budget; the answer's reason lists the racers."""
        meter = Meter(budget)
        left = list(self.runs)
        rounds = _rounds(len(left))
        for number in range(rounds):
            # Equal parts of the budget for all rounds but the last, whose part is `_FINAL`.
            self._round(left, meter, (1 - _FINAL) / rounds / (1 - (1 - _FINAL) * number / rounds))
            left = self._ranked(left)[: (len(left) + 1) // 2]
        self._round(left, meter, 1.0)
        # Whoever cannot use what is left hands it on to the next best.
        for index in self._ranked(list(self.runs)):
            self._advance(index, meter, 1.0)
        winner = self.best[self._ranked(list(self.best))[0]]
        reports = [_report(self.racers[index], self.best[index], self._cost(index)) for index in sorted(self.best)]
        return replace(winner, evaluations=sum(map(self._cost, self.best)), reason="; ".join(reports))

    def _round(self, indices: list[int], meter: Meter, share: float) -> None:
        """Give racers one cycle each, of equal parts of a share of what the meter has left."""
        each = share / max(1, len(indices))
        for position, index in enumerate(indices):
            self._advance(index, meter, each / (1 - position * each))

    def _advance(self, index: int, meter: Meter, share: float) -> None:
        """Give a racer one cycle, and keep what it had if that was better by the common measure."""
        run = self.runs[index]
        solved = any(result.outcome is Outcome.CONVERGED for result in self.best.values())
        if solved or run.finished or meter.exhausted:
            return
        before = run.evaluations
        run.advance(part_of(meter, share))
        meter.spend(run.evaluations - before)
        result = run.result()
        error = _error(self.observation, result)
        if index not in self.best or error < self.errors[index]:
            self.best[index], self.errors[index] = result, error

    def _ranked(self, indices: list[int]) -> list[int]:
        return sorted(indices, key=lambda i: self.errors.get(i, math.inf))

    def _cost(self, index: int) -> int:
        return self.runs[index].evaluations if index in self.runs else self.best[index].evaluations


def _error(observation: Observation, result: Reconstruction) -> float:
    """Return the relative squared error of the gradient but for a factor: some attacks match directions alone."""
    if result.labels is None or not math.isfinite(result.matching_loss):
        return math.inf
    simulated = observation.simulate(result.inputs.to(observation.input_dtype), result.labels)
    return float(scale_free_error(simulated, observation.gradients))


def _report(attack: Attack, result: Reconstruction, evaluations: int | None = None) -> str:
    if result.outcome is Outcome.NOT_APPLICABLE:
        return f"{attack.name}: {result.reason}"
    spent = result.evaluations if evaluations is None else evaluations
    return f"{attack.name}: {result.outcome}, relative error {result.matching_loss:.3g} after {spent} evaluations"

"""An attack that chooses its own means: what the adversary knows decides, then a race."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from lightning_gradaudit.attacks.base import Attack
from lightning_gradaudit.attacks.budget import Budget, Meter
from lightning_gradaudit.attacks.iterative import IterativeAttack, Run, part_of
from lightning_gradaudit.attacks.labels.recovery import recover_labels
from lightning_gradaudit.attacks.matching.finite_differences import has_kinks
from lightning_gradaudit.attacks.matching.gradient_matching import GradientMatching
from lightning_gradaudit.attacks.matching.levenberg_marquardt import LevenbergMarquardt
from lightning_gradaudit.attacks.matching.objectives import SensitivityWeightedError
from lightning_gradaudit.attacks.matching.optimizers import LBFGS
from lightning_gradaudit.attacks.matching.priors import Whitened
from lightning_gradaudit.attacks.matching.recipes import InvertingGradients, Modern
from lightning_gradaudit.attacks.maximum_a_posteriori import MaximumAPosteriori, choose_prior, energy, known_noise
from lightning_gradaudit.attacks.reconstruction import Outcome, Reconstruction
from lightning_gradaudit.attacks.recursive.layer_peeling import RecursiveInversion
from lightning_gradaudit.attacks.sequence import SequentialAttack
from lightning_gradaudit.attacks.span_matching import SpanMatching
from lightning_gradaudit.metrics.functional.gradients import scale_free_error
from lightning_gradaudit.simulation.defences import GaussianNoise
from lightning_gradaudit.simulation.observation import Observation
from lightning_gradaudit.utils.tensors import global_norm

_PROBES = 0.2  # share of the budget that all probes may cost together
_SINGLE_PROBE = 0.1  # what the relay's may cost where it is the only one
_PROBE = 20, 40  # evaluations of a probe: from where it tells something, and to where it tells enough
_CLEAR, _LOW = 0.1, 1e-2  # of the relay's error, and in itself: a quick method that nobody will overtake
_ENOUGH = 320  # evaluations that a relay needs and rarely gains from more
_RELAY = 0.35, 0.85  # least and largest share of what the probes leave for it
_LONG = 600  # evaluations left from which equations are worth their cost even where the relay got somewhere
_EQUATIONS = 0.6, 1.0  # least and largest share of what is left for them
_SOLVE = 400  # evaluations that they need
_HARD = 0.1  # error of the relay's probe from which matching gets nowhere, and equations come first
_LOUD = 0.1  # noise, relative to the gradient, from which the lowest matching loss is no longer the best image
_QUICK = (
    GradientMatching(
        objective=SensitivityWeightedError(),
        parametrization=Whitened(weight=0.0),
        optimizer=LBFGS(line_search="strong_wolfe"),
        label="LBFGS",
    ),
    LevenbergMarquardt(),
)


@dataclass(frozen=True, kw_only=True)
class Auto(Attack):
    """Pick the attack by what is known, else by short probes within the budget.

    - Gaussian noise of known strength, a tenth of the gradient or more: `noisy` and, where it applies, `spans` share
      the budget under one prior (`choose_prior`), and the more probable image wins.
    - Else, where a linear layer gives the span of the images away: `spans`.
    - Else, where the gradient was scaled or limited: `directions`.
    - Else a race by the relative squared error of the gradient but for a factor. The relay gets a short probe and, in
      networks without kinks, so do the quick methods; one far ahead of the relay takes all that is left. In networks
      with kinks the relay takes the whole of a budget that is too small for a probe. A probe that got nowhere (deep
      trained networks) calls for the equations, if they apply, and a match to what they gave. Then the relay runs at
      length; where that got nowhere, or much is left, it is the equations' turn. Then `finish` or `finish_kinked` goes
      on from the relay's images, or whoever else leads goes on alone.

    The best candidate of all is returned; `reason` says what each attack reached and cost.

    Args:
        relay: First-order methods, each from where the one before it got.
        quick: Methods that converge fast where they converge; each starts from where the one before it got, and the
            first, which gets a second probe, goes on from there too.
        equations: What solves equations before it matches. None: nothing does.
        finish: What refines the images of the relay.
        finish_kinked: The same in networks with kinks, where methods that trust a curvature often stall; not where the
            relay got nowhere.
        directions: Compares directions only, as the cosine distance does.
        noisy: The attack under known noise.
        spans: What knows the span of the images. None: nothing does.
    """

    relay: IterativeAttack = SequentialAttack()
    quick: tuple[IterativeAttack, ...] = _QUICK
    equations: IterativeAttack | None = RecursiveInversion(share=0.8)
    finish: IterativeAttack = LevenbergMarquardt()
    finish_kinked: IterativeAttack = SequentialAttack(
        stages=(LevenbergMarquardt(), Modern(total_variation=3e-3)), shares=(1.0, 2.0), label="Finish"
    )
    directions: IterativeAttack = SequentialAttack(
        stages=(Modern(), InvertingGradients()), shares=(1.0, 1.0), label="Directions"
    )
    noisy: MaximumAPosteriori = MaximumAPosteriori()
    spans: SpanMatching | None = SpanMatching()

    def run(self, observation: Observation, *, budget: Budget, generator: torch.Generator) -> Reconstruction:
        if observation.labels is None:  # once for all, so that nobody wins by luckier labels
            observation = replace(observation, labels=recover_labels(observation, generator=generator).labels)
        others = [d for d in observation.threat_model.defences if not isinstance(d, GaussianNoise)]
        noise = None if others else known_noise(observation)
        if noise is not None and _is_loud(observation, noise):
            result = self._posterior(observation, noise, budget, generator)
            why = f"noise of standard deviation {noise:.3g} is known: {result.reason}"
            return replace(result, attack=self.name, reason=why)
        inside = None if self.spans is None else self.spans(observation, budget=budget, generator=generator)
        if inside is not None and inside.outcome is not Outcome.NOT_APPLICABLE:
            assert self.spans is not None
            result, why = inside, _report(self.spans, inside)
        elif others:
            result = self.directions(observation, budget=budget, generator=generator)
            compared = f"simulated gradients lack {others[0]!r}, only directions compare"
            why = f"{compared}: {_report(self.directions, result)}"
        else:
            result = _Race(self, observation, generator).run(budget)
            why = result.reason
        return replace(result, attack=self.name, reason=why)

    def _posterior(
        self, observation: Observation, noise: float, budget: Budget, generator: torch.Generator
    ) -> Reconstruction:
        """Return the likelier of what the prior's mean and, where there is one, the span lead to."""
        meter = Meter(budget)
        prior = self.noisy.prior
        if prior is None:
            prior, cost = choose_prior(observation, noise, budget=budget, generator=generator, by=self.noisy)
            meter.spend(cost)
        spans = None if self.spans is None else replace(self.spans, prior=prior)
        found: list[tuple[Attack, Reconstruction]] = []
        for attack, share in ((spans, 0.5), (replace(self.noisy, prior=prior), 1.0)):
            if attack is not None and not meter.exhausted:
                found.append((attack, attack(observation, budget=part_of(meter, share), generator=generator)))
                meter.spend(found[-1][1].evaluations)
        best = min(found, key=lambda each: energy(observation, each[1], prior=prior, noise=noise))[1]
        reports = [_report(attack, each) for attack, each in found if each.outcome is not Outcome.NOT_APPLICABLE]
        reason = "; ".join([f"{prior!r}", *reports]) if reports else best.reason
        return replace(best, evaluations=meter.evaluations, reason=reason)


def _is_loud(observation: Observation, noise: float) -> bool:
    coordinates = sum(g.numel() for g in observation.gradients.values())
    return noise * coordinates**0.5 >= _LOUD * float(global_norm(observation.gradients))


class _Racer:
    """One attack's run on the observation, and the best it has had by the common measure."""

    def __init__(self, attack: IterativeAttack, observation: Observation, generator: torch.Generator) -> None:
        self.attack, self.observation, self.generator = attack, observation, generator
        self.run: Run | None = None
        self.best: Reconstruction | None = None
        self.error = math.inf
        self.spent = 0  # on runs before this one
        self.start()

    def start(self, at: Tensor | None = None) -> None:
        """Start, or start anew; from images, if they are given."""
        started = self.attack.start(self.observation, self.generator, at=at)
        if not isinstance(started, Reconstruction):
            self.spent, self.run = self.cost, started
        elif self.run is None:
            self.spent, self.best = started.evaluations, started

    @property
    def cost(self) -> int:
        return self.spent + (0 if self.run is None else self.run.evaluations)

    def advance(self, meter: Meter, share: float) -> None:
        """Run one cycle on a share of what the meter has left."""
        if self.run is None or self.run.finished or meter.exhausted:
            return
        before = self.run.evaluations
        self.run.advance(part_of(meter, share))
        meter.spend(self.run.evaluations - before)
        result = self.run.result()
        error = _error(self.observation, result)
        if self.best is None or error < self.error:
            self.best, self.error = result, error

    @property
    def solved(self) -> bool:
        return self.best is not None and self.best.outcome is Outcome.CONVERGED


class _Race:
    """Racers on one observation."""

    def __init__(self, auto: Auto, observation: Observation, generator: torch.Generator) -> None:
        self.auto, self.observation, self.generator = auto, observation, generator
        self.kinked = has_kinks(observation)
        self.relay = self._racer(auto.relay)
        self.quick: list[_Racer] = []
        self.racers = [self.relay]
        self.path: list[tuple[int, Tensor]] = []

    def _racer(self, attack: IterativeAttack) -> _Racer:
        return _Racer(attack, self.observation, self.generator)

    def _advance(self, racer: _Racer, meter: Meter, share: float) -> None:
        """Run one cycle; what led the race then is on the way to its answer, whoever gives the answer."""
        before, own = meter.evaluations, 0 if racer.run is None else racer.run.evaluations
        racer.advance(meter, share)
        if racer.best is not None and _ranked(self.racers)[0] is racer:
            self.path += [(before + at - own, images) for at, images in racer.best.path if at > own]

    def run(self, budget: Budget) -> Reconstruction:
        """Spend the budget; the answer's reason lists the racers."""
        meter = Meter(budget)
        self._probe(meter)
        if not self._solved() and not self._quick_wins():
            self._match(meter)
        # Whoever leads takes what is left, or hands it on if it is of no use there.
        for racer in _ranked(self.racers):
            if not self._solved():
                self._advance(racer, meter, 1.0)
        winner = _ranked(self.racers)[0].best
        assert winner is not None
        reports = [_report(racer.attack, racer.best, racer.cost) for racer in self.racers if racer.best is not None]
        spent = sum(racer.cost for racer in self.racers)
        path = (*(each for each in self.path if each[0] < spent), (spent, winner.inputs.detach().cpu()))
        return replace(winner, evaluations=spent, path=path, reason="; ".join(reports))

    def _probe(self, meter: Meter) -> None:
        """Give everybody one short cycle, and the first of several quick ones a second; small budgets probe fewer."""
        left = meter.left.evaluations
        if self.kinked:  # a quick method hardly ever leads there
            if left is None or left * _SINGLE_PROBE >= _PROBE[1]:
                self._advance(self.relay, meter, _SINGLE_PROBE if left is None else _PROBE[1] / left)
            return
        places = math.inf if left is None else max(2, int(_PROBES * left / _PROBE[0]))
        self.quick = [self._racer(attack) for attack in self.auto.quick[: int(min(len(self.auto.quick), places - 1))]]
        self.racers += self.quick
        heats = [*self.racers, *self.quick[: len(self.quick) > 1]]
        most = _PROBES if left is None else min(_PROBES, len(heats) * _PROBE[1] / left)
        each = (most if self.quick else 1.0) / len(heats)
        for position, racer in enumerate(heats):
            if racer in self.quick[1:] and not math.isinf(self.quick[0].error):
                before = _ranked(self.quick)[0].best
                assert before is not None
                racer.start(before.inputs)
            if not self._solved():
                self._advance(racer, meter, each / (1 - position * each))

    def _match(self, meter: Meter) -> None:
        """Run the relay at length, and equations and what may follow it; equations first where its probe was lost."""
        hard = self.kinked and self.relay.cost > 0 and self.relay.error > _HARD
        if hard:
            self._equations(meter)
        share = _part(meter, _RELAY, _ENOUGH) if self.relay.cost else 1.0  # all where even a probe was too dear
        self.relay.start()  # afresh: what so short a relay ended with is no place to begin
        self._advance(self.relay, meter, share)
        if not hard and (self.relay.error > _LOW or meter.remaining >= _LONG):
            self._equations(meter)
        if _ranked(self.racers)[0] is self.relay:
            self._finish(meter)

    def _solved(self) -> bool:
        return any(racer.solved for racer in self.racers)

    def _quick_wins(self) -> bool:
        return any(racer.error < min(_LOW, _CLEAR * self.relay.error) for racer in self.quick)

    def _equations(self, meter: Meter) -> None:
        if self.auto.equations is not None and not self._solved():
            self.racers.append(self._racer(self.auto.equations))
            self._advance(self.racers[-1], meter, _part(meter, _EQUATIONS, _SOLVE))

    def _finish(self, meter: Meter) -> None:
        """Go on from where the relay got to."""
        found = self.relay.best
        if found is None or self._solved() or meter.exhausted or not math.isfinite(found.matching_loss):
            return
        near = self.kinked and self.relay.error <= _HARD  # from afar, less of a prior only lets noise in
        last = self._racer(self.auto.finish_kinked if near else self.auto.finish)
        last.start(found.inputs)
        self.racers.append(last)
        self._advance(last, meter, 1.0)


def _part(meter: Meter, shares: tuple[float, float], evaluations: int) -> float:
    """Return the share of what is left that some evaluations are, between a least and a largest share."""
    least, largest = shares
    return min(largest, max(least, evaluations / max(1, meter.remaining)))


def _ranked(racers: list[_Racer]) -> list[_Racer]:
    return sorted(racers, key=lambda racer: racer.error)


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

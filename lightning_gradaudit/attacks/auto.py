"""The default attack: what the adversary knows chooses the method, otherwise a race of methods."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from lightning_gradaudit.attacks.adaptive import AdaptiveMatching
from lightning_gradaudit.attacks.base import Attack
from lightning_gradaudit.attacks.budget import Budget, Meter
from lightning_gradaudit.attacks.iterative import IterativeAttack, Run, advance_share, part_of, with_labels
from lightning_gradaudit.attacks.matching.finite_differences import has_kinks
from lightning_gradaudit.attacks.matching.gradient_matching import GradientMatching
from lightning_gradaudit.attacks.matching.levenberg_marquardt import LevenbergMarquardt
from lightning_gradaudit.attacks.matching.objectives import SensitivityWeightedError
from lightning_gradaudit.attacks.matching.optimizers import LBFGS
from lightning_gradaudit.attacks.matching.priors import Whitened
from lightning_gradaudit.attacks.matching.recipes import InvertingGradients, Modern
from lightning_gradaudit.attacks.matching.shared_statistics import statistics_distance
from lightning_gradaudit.attacks.matching.through_defences import objective_for
from lightning_gradaudit.attacks.maximum_a_posteriori import MaximumAPosteriori, choose_prior, energy, known_noise
from lightning_gradaudit.attacks.reconstruction import Outcome, Reconstruction
from lightning_gradaudit.attacks.recursive.recursive_inversion import RecursiveInversion
from lightning_gradaudit.attacks.sequence import SequentialAttack
from lightning_gradaudit.attacks.span_matching import SpanMatching
from lightning_gradaudit.metrics.functional.gradients import scale_free_error
from lightning_gradaudit.simulation.defences import GaussianNoise, WithholdLayers
from lightning_gradaudit.simulation.observation import Observation
from lightning_gradaudit.utils.tensors import global_norm


@dataclass(frozen=True, kw_only=True)
class RaceSettings:
    """When `Auto` probes, which errors decide, and how it divides the budget.

    Evaluations are simulated gradients; errors are relative squared errors of the gradient for the best factor.

    Attributes:
        loud_noise_ratio: Noise over the gradient from which the lowest matching loss is no longer the best image.
        probes_budget_share: Largest share of the budget for all probes together.
        single_probe_budget_share: Largest share for the relay's probe where it is the only one.
        probe_least_evaluations: Evaluations below which a probe does not tell methods apart.
        probe_most_evaluations: Evaluations above which a longer probe tells nothing more.
        low_error: Error above which the equations follow the relay, and below which a quick method may win,
        low_error_ratio: if its error is also below this part of the relay's: then no other method overtakes it.
        relay_evaluations: Evaluations that the relay needs; it rarely gains from more.
        relay_least_share, relay_largest_share: Bounds of the relay's share of what the probes leave.
        lost_error: Error of the relay's probe above which matching fails and equations come first.
        equations_evaluations: Evaluations that the equations need.
        equations_least_share, equations_largest_share: Bounds of their share of what is left.
        equations_from_evaluations: Evaluations left from which equations pay off even after a successful relay.
    """

    loud_noise_ratio: float = 0.1
    probes_budget_share: float = 0.2
    single_probe_budget_share: float = 0.1
    probe_least_evaluations: int = 20
    probe_most_evaluations: int = 40
    low_error: float = 1e-2
    low_error_ratio: float = 0.1
    relay_evaluations: int = 320
    relay_least_share: float = 0.35
    relay_largest_share: float = 0.85
    lost_error: float = 0.1
    equations_evaluations: int = 400
    equations_least_share: float = 0.6
    equations_largest_share: float = 1.0
    equations_from_evaluations: int = 600


SETTINGS = RaceSettings()
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
    """Choose the attack by what is known, otherwise by short probes within the budget.

    - Gaussian noise of known strength, a tenth of the gradient or more: `noisy` and, where it applies, `spans` share
      the budget under one prior (`choose_prior`). The more probable image is returned.
    - Otherwise, where a linear layer reveals the span of the images: `spans`.
    - Otherwise, where the client's defence can be matched through (pruning, signs, levels and the like): `adaptive`.
    - Otherwise, where the gradient was scaled or limited: `directions`.
    - Otherwise a race by the relative squared error of the gradient for the best factor. In networks without kinks the
      relay and the quick methods get a short probe, and a quick method far ahead of the relay takes all that is left.
      In networks with kinks only the relay is probed; of a budget too small for a probe it takes all. Where the probe
      failed (deep trained networks), the equations come first, if they apply. Then the relay runs at length. Where it
      failed, or much budget is left, the equations follow. At last `finish` or `finish_kinked` continues from the
      relay's images; if another method leads, it continues alone.

    The best candidate of all is returned; `reason` says what each attack reached and cost.

    Args:
        relay: First-order methods in a sequence.
        quick: Methods that converge fast where they converge; each starts from the result of the one before it. The
            first gets a second probe and continues from its own result.
        equations: An attack that solves equations before it matches. None: none.
        finish: Refines the relay's images.
        finish_kinked: The same in networks with kinks, where methods that trust a curvature often stall. Not used where
            the relay failed.
        directions: Compares directions only, as the cosine distance does.
        adaptive: The attack on a gradient whose defence is declared. None: none.
        noisy: The attack under known noise.
        spans: The attack that uses the span of the images. None: none.
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
    adaptive: Attack | None = AdaptiveMatching()
    noisy: MaximumAPosteriori = MaximumAPosteriori()
    spans: SpanMatching | None = SpanMatching()

    def run(self, observation: Observation, *, budget: Budget, generator: torch.Generator) -> Reconstruction:
        observation = _without_withheld(observation)
        observation = with_labels(observation, generator)  # once, so that all attacks compete with the same labels
        others = [d for d in observation.threat_model.defences if not isinstance(d, GaussianNoise)]
        noise = None if others else known_noise(observation)
        if noise is not None and _is_loud(observation, noise):
            result = self._maximise_posterior(observation, noise, budget, generator)
            why = f"noise of standard deviation {noise:.3g} is known: {result.reason}"
            return replace(result, attack=self.name, reason=why)
        inside = None if self.spans is None else self.spans(observation, budget=budget, generator=generator)
        if inside is not None and inside.outcome is not Outcome.NOT_APPLICABLE:
            assert self.spans is not None
            result, why = inside, _report(self.spans, inside)
        elif others and self.adaptive is not None and objective_for(observation.threat_model.defences) is not None:
            result = self.adaptive(observation, budget=budget, generator=generator)
            why = f"{_report(self.adaptive, result)}; {result.reason}"
        elif others:
            result = self.directions(observation, budget=budget, generator=generator)
            compared = f"simulated gradients lack {others[0]!r}, only directions compare"
            why = f"{compared}: {_report(self.directions, result)}"
        else:
            result = _Race(self, observation, generator).run(budget)
            why = result.reason
        return replace(result, attack=self.name, reason=why)

    def _maximise_posterior(
        self, observation: Observation, noise: float, budget: Budget, generator: torch.Generator
    ) -> Reconstruction:
        """Return the more probable result of two attacks: from the prior's mean and, where it applies, by the span."""
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


def _without_withheld(observation: Observation) -> Observation:
    """Forget about layers that are not shared: the shared ones are simulated as they are."""
    model = observation.threat_model
    kept = tuple(each for each in model.defences if not isinstance(each, WithholdLayers))
    return observation if kept == model.defences else replace(observation, threat_model=replace(model, defences=kept))


def _is_loud(observation: Observation, noise: float) -> bool:
    coordinates = sum(g.numel() for g in observation.gradients.values())
    return noise * coordinates**0.5 >= SETTINGS.loud_noise_ratio * float(global_norm(observation.gradients))


class _Racer:
    """One attack's run on the observation, and its best result by the common error."""

    def __init__(self, attack: IterativeAttack, observation: Observation, generator: torch.Generator) -> None:
        self.attack, self.observation, self.generator = attack, observation, generator
        self.run: Run | None = None
        self.best: Reconstruction | None = None
        self.error = math.inf
        self.spent_before = 0  # evaluations of runs before this one
        self.start()

    def start(self, at: Tensor | None = None) -> None:
        """Start a new run; from images, if they are given."""
        started = self.attack.start(self.observation, self.generator, at=at)
        if not isinstance(started, Reconstruction):
            self.spent_before, self.run = self.cost, started
        elif self.run is None:
            self.spent_before, self.best = started.evaluations, started

    @property
    def cost(self) -> int:
        return self.spent_before + (0 if self.run is None else self.run.evaluations)

    def advance(self, meter: Meter, share: float) -> None:
        """Run one cycle on a share of what the meter has left."""
        if self.run is None or self.run.finished or meter.exhausted:
            return
        advance_share(self.run, meter, share)
        result = self.run.result()
        error = _measure_error(self.observation, result)
        if self.best is None or error < self.error:
            self.best, self.error = result, error

    @property
    def solved(self) -> bool:
        return self.best is not None and self.best.outcome is Outcome.CONVERGED


class _Race:
    """The racers on one observation."""

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
        """Run one cycle; if the racer then leads, its images are part of the path to the answer."""
        before, own = meter.evaluations, 0 if racer.run is None else racer.run.evaluations
        racer.advance(meter, share)
        if racer.best is not None and _ranked(self.racers)[0] is racer:
            self.path += [(before + at - own, images) for at, images in racer.best.path if at > own]

    def run(self, budget: Budget) -> Reconstruction:
        """Spend the budget; the result's reason lists the racers."""
        meter = Meter(budget)
        self._probe(meter)
        if not self._solved() and not self._quick_wins():
            self._match(meter)
        # The leader takes what is left; what it cannot use goes to the next one.
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
        """Give each racer a short cycle, the first of several quick ones a second; small budgets probe fewer."""
        left = meter.left.evaluations
        most, single = SETTINGS.probe_most_evaluations, SETTINGS.single_probe_budget_share
        if self.kinked:  # a quick method hardly ever leads there
            if left is None or left * single >= most:
                self._advance(self.relay, meter, single if left is None else most / left)
            return
        share = SETTINGS.probes_budget_share
        places = math.inf if left is None else max(2, int(share * left / SETTINGS.probe_least_evaluations))
        self.quick = [self._racer(attack) for attack in self.auto.quick[: int(min(len(self.auto.quick), places - 1))]]
        self.racers += self.quick
        heats = [*self.racers, *self.quick[: len(self.quick) > 1]]
        share = share if left is None else min(share, len(heats) * most / left)
        each = (share if self.quick else 1.0) / len(heats)
        for position, racer in enumerate(heats):
            if racer in self.quick[1:] and not math.isinf(self.quick[0].error):
                before = _ranked(self.quick)[0].best
                assert before is not None
                racer.start(before.inputs)
            if not self._solved():
                self._advance(racer, meter, each / (1 - position * each))

    def _match(self, meter: Meter) -> None:
        """Run the relay at length, then equations and the last step; equations first where the relay's probe failed."""
        s = SETTINGS
        lost = self.kinked and self.relay.cost > 0 and self.relay.error > s.lost_error
        if lost:
            self._solve_equations(meter)
        share = 1.0  # where the budget was too small for a probe
        if self.relay.cost:
            share = _share_of(meter, s.relay_evaluations, s.relay_least_share, s.relay_largest_share)
        self.relay.start()  # anew: the result of so short a relay is a poor start
        self._advance(self.relay, meter, share)
        if not lost and (self.relay.error > s.low_error or meter.remaining >= s.equations_from_evaluations):
            self._solve_equations(meter)
        if _ranked(self.racers)[0] is self.relay:
            self._finish(meter)

    def _solved(self) -> bool:
        return any(racer.solved for racer in self.racers)

    def _quick_wins(self) -> bool:
        limit = min(SETTINGS.low_error, SETTINGS.low_error_ratio * self.relay.error)
        return any(racer.error < limit for racer in self.quick)

    def _solve_equations(self, meter: Meter) -> None:
        if self.auto.equations is not None and not self._solved():
            self.racers.append(self._racer(self.auto.equations))
            bounds = SETTINGS.equations_least_share, SETTINGS.equations_largest_share
            self._advance(self.racers[-1], meter, _share_of(meter, SETTINGS.equations_evaluations, *bounds))

    def _finish(self, meter: Meter) -> None:
        """Continue from the relay's images."""
        found = self.relay.best
        if found is None or self._solved() or meter.exhausted or not math.isfinite(found.matching_loss):
            return
        near = self.kinked and self.relay.error <= SETTINGS.lost_error  # from afar, a weaker prior only admits noise
        last = self._racer(self.auto.finish_kinked if near else self.auto.finish)
        last.start(found.inputs)
        self.racers.append(last)
        self._advance(last, meter, 1.0)


def _share_of(meter: Meter, evaluations: int, least: float, largest: float) -> float:
    """Return the share of what a meter has left that a number of evaluations is, within bounds."""
    return min(largest, max(least, evaluations / max(1, meter.remaining)))


def _ranked(racers: list[_Racer]) -> list[_Racer]:
    return sorted(racers, key=lambda racer: racer.error)


def _measure_error(observation: Observation, result: Reconstruction) -> float:
    """Return the relative squared error of the gradient for the best factor: some attacks match directions alone.

    Where batch statistics are known, their distance is added.
    """
    if result.labels is None or not math.isfinite(result.matching_loss):
        return math.inf
    inputs = result.inputs.to(observation.input_dtype)
    simulated = observation.simulate(inputs, result.labels)
    error = float(scale_free_error(simulated, observation.gradients))
    return error + statistics_distance(observation, inputs, result.labels)


def _report(attack: Attack, result: Reconstruction, evaluations: int | None = None) -> str:
    if result.outcome is Outcome.NOT_APPLICABLE:
        return f"{attack.name}: {result.reason}"
    spent = result.evaluations if evaluations is None else evaluations
    return f"{attack.name}: {result.outcome}, relative error {result.matching_loss:.3g} after {spent} evaluations"

"""An attack that chooses its own means: what the adversary knows decides, then a race."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from lightning_gradaudit.attacks.base import Attack
from lightning_gradaudit.attacks.gradient_matching import GradientMatching
from lightning_gradaudit.attacks.iterative import IterativeAttack, Run, part_of
from lightning_gradaudit.attacks.labels import recover_labels
from lightning_gradaudit.attacks.least_squares import LevenbergMarquardt
from lightning_gradaudit.attacks.objectives import MovedError, scale_free_error
from lightning_gradaudit.attacks.optimizers import LBFGS
from lightning_gradaudit.attacks.peeling import LayerPeeling
from lightning_gradaudit.attacks.posterior import MaximumAPosteriori, choose_prior, energy, known_noise
from lightning_gradaudit.attacks.priors import Whitened
from lightning_gradaudit.attacks.recipes import Modern, NetworkPrior, WhitenedMatching
from lightning_gradaudit.attacks.span_matching import SpanMatching
from lightning_gradaudit.budget import Budget, Meter
from lightning_gradaudit.defences import GaussianNoise, global_norm
from lightning_gradaudit.errors import InvalidInputError
from lightning_gradaudit.observation import Observation
from lightning_gradaudit.reconstruction import Outcome, Reconstruction

_PROBES = 0.25  # share of the budget that all probes may cost together
_PROBE = 20, 40  # evaluations of a probe: from where it tells something, and to where it tells enough
_CLEAR, _LOW = 0.1, 1e-2  # of the other kind's lowest error, and in itself: a leader whom nobody will overtake
_EQUATIONS = 0.45  # share of what the probes leave for equations and a first match to what they gave
_SEMIFINAL = 0.5  # share of what is left that finalists get between them before one of them gets the rest
_LOUD = 0.1  # noise, relative to the gradient, from which the lowest matching loss is no longer the best image
_STEADY = (
    replace(Modern(total_variation=1e-2), label="ModernSharp"),  # the published weight blurs what small networks show
    WhitenedMatching(),
    Modern(),
    NetworkPrior(),
)
_QUICK = (
    GradientMatching(
        objective=MovedError(),
        parametrization=Whitened(weight=0.0),
        optimizer=LBFGS(line_search="strong_wolfe"),
        label="LBFGS",
    ),
    LevenbergMarquardt(),
)


@dataclass(frozen=True, kw_only=True)
class Auto(Attack):
    """Pick the attack by what is known, else by a race of short probes within the budget.

    - Gaussian noise of known strength, a tenth of the gradient or more: `noisy` and, where it applies, `spans` share
      the budget under one prior (`choose_prior`), and the more probable image wins.
    - Else, where a linear layer gives the span of the images away: `spans`.
    - Else, where the gradient was scaled or limited: the first steady racer, which must not depend on its length.
    - Else a race by the relative squared error of the gradient but for a factor, in the spirit of successive halving
      (Jamieson and Talwalkar, arXiv:1502.07943). Every racer gets a short probe; a leader far ahead of the other kind
      takes all that is left. Otherwise two steady racers go on (the first, and the best of the others: slow ones show
      late), the best of the quick ones if it leads them (quick methods lead early whether or not they win; one that
      does not is lost), and what `equations` lead to where they apply. Half of what is left decides between them, the
      best gets the other half. Small budgets race fewer.

    The best candidate of all is returned; `reason` says what each attack reached and cost.

    Args:
        steady: First-order methods, the most important first; the first must compare directions only, as the cosine
            distance does.
        quick: Methods that converge fast where they converge; each starts from where the one before it got, and the
            first, which gets a second probe, goes on from there too.
        equations: What solves equations before it matches; starts where no racer is far ahead. None: nothing does.
        noisy: The attack under known noise.
        spans: What knows the span of the images. None: nothing does.
    """

    steady: tuple[IterativeAttack, ...] = _STEADY
    quick: tuple[IterativeAttack, ...] = _QUICK
    equations: IterativeAttack | None = LayerPeeling(share=0.8)
    noisy: MaximumAPosteriori = MaximumAPosteriori()
    spans: SpanMatching | None = SpanMatching()

    def __post_init__(self) -> None:
        if not self.steady:
            raise InvalidInputError("steady: expected at least one attack, got none.")

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
            result = _Race(self.steady[:1], (), None, observation, generator).run(budget)
            why = f"simulated gradients lack {others[0]!r}, only directions compare: {result.reason}"
        else:
            result = _Race(*self._entrants(budget), self.equations, observation, generator).run(budget)
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

    def _entrants(self, budget: Budget) -> tuple[tuple[IterativeAttack, ...], tuple[IterativeAttack, ...]]:
        """Return who can race so that each one's probe tells something: two steady ones, the quick, the others."""
        if budget.evaluations is None:
            return self.steady, self.quick
        places = max(2, int(_PROBES * budget.evaluations / _PROBE[0]))
        first = self.steady[:2]
        quick = self.quick[: max(0, places - len(first))]
        return self.steady[: max(len(first), places - len(quick))], quick


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
        self.start()

    def start(self, at: Tensor | None = None) -> None:
        """Start, or start anew from images."""
        started = self.attack.start(self.observation, self.generator, at=at)
        if isinstance(started, Reconstruction):
            self.best = started
        else:
            self.run = started

    @property
    def able(self) -> bool:
        """Whether more budget would change something."""
        return self.run is not None and not self.run.finished

    @property
    def cost(self) -> int:
        if self.run is not None:
            return self.run.evaluations
        return 0 if self.best is None else self.best.evaluations

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

    def __init__(
        self,
        steady: tuple[IterativeAttack, ...],
        quick: tuple[IterativeAttack, ...],
        equations: IterativeAttack | None,
        observation: Observation,
        generator: torch.Generator,
    ) -> None:
        self.steady, self.quick = ([_Racer(each, observation, generator) for each in kind] for kind in (steady, quick))
        self.racers = [*self.steady, *self.quick]
        self.equations = equations
        self.observation, self.generator = observation, generator

    def run(self, budget: Budget) -> Reconstruction:
        """Spend the budget; the answer's reason lists the racers."""
        meter = Meter(budget)
        self._probe(meter)
        if not self._clear_leader():
            finalists = self._finalists()
            if self.equations is not None and not self._solved():
                self.racers.append(_Racer(self.equations, self.observation, self.generator))
                self.racers[-1].advance(meter, _EQUATIONS)
            if len(finalists) > 1:
                self._share(finalists, meter, _SEMIFINAL)
        # Whoever leads takes what is left, or hands it on if it is of no use there.
        for racer in _ranked(self.racers):
            if not self._solved():
                racer.advance(meter, 1.0)
        winner = _ranked(self.racers)[0].best
        assert winner is not None
        reports = [_report(racer.attack, racer.best, racer.cost) for racer in self.racers if racer.best is not None]
        return replace(winner, evaluations=sum(racer.cost for racer in self.racers), reason="; ".join(reports))

    def _probe(self, meter: Meter) -> None:
        """Give everybody one short cycle, and the first of several quick ones a second."""
        heats = [*self.racers, *self.quick[: len(self.quick) > 1]]
        left = meter.left.evaluations
        most = _PROBES if left is None else min(_PROBES, len(heats) * _PROBE[1] / left)
        each = (most if len(heats) > 1 else 1.0) / len(heats)
        for position, racer in enumerate(heats):
            if racer in self.quick[1:] and not math.isinf(self.quick[0].error):
                before = _ranked(self.quick)[0].best
                assert before is not None
                racer.start(before.inputs)
            if not self._solved():
                racer.advance(meter, each / (1 - position * each))

    def _solved(self) -> bool:
        return any(racer.solved for racer in self.racers)

    def _finalists(self) -> list[_Racer]:
        best = _ranked(self.steady)[0]
        steady = [self.steady[0], *_ranked(self.steady[1:])[:1]]
        return steady + [racer for racer in _ranked(self.quick)[:1] if racer.error < best.error]

    def _clear_leader(self) -> bool:
        """Tell whether one is far ahead of all of the other kind; quick ones follow each other and lie close."""
        leader = _ranked(self.racers)[0]
        others = self.steady if leader in self.quick else self.quick
        return bool(others) and leader.error < min(_LOW, _CLEAR * min(racer.error for racer in others))

    def _share(self, racers: list[_Racer], meter: Meter, share: float) -> None:
        """Give racers one cycle each, of equal parts of a share of what the meter has left."""
        each = share / max(1, len(racers))
        for position, racer in enumerate(racers):
            if not self._solved():
                racer.advance(meter, each / (1 - position * each))


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

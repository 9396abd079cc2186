"""What differential privacy proves of every attacker: bounds on reconstruction and identification.

Two questions are kept apart. *This gradient*: the adversary sees one privatised sum and knows that the image is in its
batch, so that sampling hides nothing (`one_look`). *The whole run*: they see all updates, and each batch is a Poisson
sample that the image is in by chance (`whole_run`).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
from scipy.stats import binom, norm

from lightning_gradaudit.errors import InvalidInputError, UnsupportedError
from lightning_gradaudit.risk.intervals import BISECTIONS

CANDIDATES = 100
"""Images among which the identification bound lets an adversary choose."""
GRID = 256
"""Values of ε at which δ(ε) is taken; any choice gives a valid bound, more a tighter one."""
FINEST_STEP, MOST_STEPS = 1e-4, 400_000
"""Step of a discretised privacy loss, and how many steps its range may have before the step grows."""
SMALLEST_DELTA = 1e-7
"""δ at which the grid of ε ends."""
LARGEST_EPSILON = 400.0
"""ε that an accountant looks up to; from there on nothing is proven."""
MISSING = (
    "The privacy bounds need dp-accounting, which is not installed: pip install 'lightning-gradaudit[privacy]' "
    "(or pip install dp-accounting)."
)


class Looks(NamedTuple):
    """Steps of DP-SGD that are alike.

    Attributes:
        noise_multiplier: Standard deviation of the noise over the clipping norm, > 0.
        sample_rate: Probability in (0, 1] with which Poisson sampling draws an image for a step.
        steps: How many, >= 1.
    """

    noise_multiplier: float
    sample_rate: float
    steps: int


@dataclass(frozen=True)
class TradeOff:
    """Trade-off function of a mechanism, by its privacy profile δ(ε): f-DP (Dong, Roth, Su, arXiv:1905.02383).

    Attributes:
        epsilons, deltas: (N,) ε >= 0 and the δ that the mechanism has at each, in both directions of add/remove.
    """

    epsilons: np.ndarray = field(repr=False)
    deltas: np.ndarray = field(repr=False)

    def success(self, prior: float) -> float:
        """Bound the probability that an adversary succeeds, 1 - f(κ).

        The adversary aims at an event (a reconstruction beyond a limit, the right name) that a guess without the image
        in the data reaches with probability κ at most. Each (ε, δ) bounds the event by e^ε κ + δ, and its complement
        likewise (arXiv:2307.03928). For a random image the bound holds on average too, because f is convex.

        Args:
            prior: κ in [0, 1].

        Returns:
            A probability in [κ, 1].

        Raises:
            InvalidInputError: When κ is no probability.
        """
        if not 0 <= prior <= 1:
            raise InvalidInputError(f"prior: expected a probability in [0, 1], got {prior!r}.")
        above = np.exp(self.epsilons) * prior + self.deltas
        below = 1 - np.exp(-self.epsilons) * (1 - prior - self.deltas)
        return float(np.clip(np.minimum(above, below).min(), prior, 1.0))

    def excess(self, candidates: int = CANDIDATES) -> float:
        """Bound identification among n candidates in excess of chance: (1 - f(κ) - κ)/(1 - κ) with κ = 1/n.

        Args:
            candidates: n >= 2, each as likely before the gradient is seen.
        """
        if candidates < 2:
            raise InvalidInputError(f"candidates: expected at least 2, got {candidates!r}.")
        chance = 1 / candidates
        return (self.success(chance) - chance) / (1 - chance)

    def expected(self, prior_scores: np.ndarray) -> float:
        """Bound the expected score of any attacker, given scores of the guess that it could make without the image.

        E[s] = s₀ + ∫ P(s >= t) dt, and P(s >= t) is at most 1 - f(κ(t)) with κ(t) the share of guesses that reach t.
        Nothing is assumed of the attacker, in contrast to bounds for unbiased ones, or for adversaries that know
        nothing of images (as in arXiv:2402.12861). Beyond the best guess nothing is bounded, so scores must include
        their largest possible value's tail: 1 - f(0) = δ(0) weighs the range up to `top`.

        Args:
            prior_scores: (N,) finite, higher is better, bounded by 1 (exposure, similarity, 1 - MSE of pixels in
                [0, 1]).

        Returns:
            The bound, at most 1.
        """
        values = np.sort(np.asarray(prior_scores, dtype=float))
        if not len(values) or not np.isfinite(values).all() or values[-1] > 1:
            raise InvalidInputError("prior_scores: expected finite scores of at most 1, at least one.")
        edges = np.append(values, 1.0)
        reached = [self.success((len(values) - at) / len(values)) for at in range(1, len(values) + 1)]
        return float(values[0] + np.sum(np.diff(edges) * reached))


def one_look(noise_multiplier: float, *, replace: bool = False) -> TradeOff:
    """Return the trade-off of one privatised gradient whose batch is known to hold the image: N(0, 1) from N(μ, 1).

    Args:
        noise_multiplier: σ over the clipping norm C, > 0.
        replace: Neighbours differ by another image in its place (μ = 2/σ) and not by its absence (μ = 1/σ). Bounds
            against guesses made without the image need its absence.
    """
    _check(Looks(noise_multiplier, 1.0, 1))
    mu = (2 if replace else 1) / noise_multiplier
    epsilons = np.linspace(0, min(mu * (mu / 2 + 8), LARGEST_EPSILON), 8 * GRID)
    deltas = norm.cdf(mu / 2 - epsilons / mu) - np.exp(epsilons + norm.logcdf(-mu / 2 - epsilons / mu))
    return TradeOff(epsilons, np.clip(deltas, 0, 1))


def gaussian_success(prior: float, mu: float) -> float:
    """Return Φ(Φ⁻¹(κ) + μ), the success of the best attacker on N(μ, 1) from N(0, 1)."""
    return float(norm.cdf(norm.ppf(prior) + mu))


def whole_run(looks: Sequence[Looks]) -> TradeOff:
    """Return the trade-off of all steps together, by privacy loss distributions (`dp_accounting`), rounded up.

    Args:
        looks: The run's steps, at least one.

    Raises:
        UnsupportedError: When `dp_accounting` is not installed.
        InvalidInputError: When a number is out of range.
    """
    return _composed(tuple(Looks(*each) for each in looks))[1]


def epsilon(looks: Sequence[Looks], delta: float) -> float:
    """Return the run's ε at δ, by privacy loss distributions; infinite where none is found.

    Raises:
        As `whole_run`.
    """
    if not 0 < delta < 1:
        raise InvalidInputError(f"delta: expected a probability between 0 and 1, got {delta!r}.")
    return float(_composed(tuple(Looks(*each) for each in looks))[0].get_epsilon_for_delta(delta)) if looks else 0.0


@lru_cache(maxsize=32)
def _composed(looks: tuple[Looks, ...]) -> tuple[Any, TradeOff]:
    try:
        from dp_accounting.pld import privacy_loss_distribution as losses
    except ImportError as error:
        raise UnsupportedError(MISSING) from error
    if not looks:
        raise InvalidInputError("looks: expected at least one step.")
    for each in looks:
        _check(each)
    # The loss of a step ranges over about ±(μ²/2 + 8μ) √steps: a fixed number of steps keeps weak noise affordable.
    reach = sum((0.5 / noise**2 + 8 / noise) * math.sqrt(steps) for noise, _, steps in looks)
    step = max(FINEST_STEP, reach / MOST_STEPS)
    total = None
    for noise, rate, steps in looks:
        one = losses.from_gaussian_mechanism(noise, sampling_prob=rate, value_discretization_interval=step)
        part = one.self_compose(steps)
        total = part if total is None else total.compose(part)
    assert total is not None
    last = min(max(1.0, float(total.get_epsilon_for_delta(SMALLEST_DELTA))), LARGEST_EPSILON)
    epsilons = np.linspace(0, last, GRID)
    return total, TradeOff(epsilons, np.asarray(total.get_delta_for_epsilon(epsilons)))


def _check(look: Looks) -> None:
    noise, rate, steps = look
    if not (0 < noise < math.inf and 0 < rate <= 1 and steps >= 1):
        raise InvalidInputError(
            f"looks: expected a noise multiplier > 0, a sample rate in (0, 1] and steps >= 1, got {tuple(look)}."
        )


def composed_dfil(dfil: Sequence[float], sample_rate: float) -> float:
    """Return the dFIL (arXiv:2201.12383) of steps of which each draws the image with probability q: √(q Σ η²).

    Fisher information adds up over the steps of an adaptive sequence, and it is convex: the mixture of "drawn", with
    η², and "not drawn", with none, has at most q η². An *unbiased* attacker's mean squared error is at least 1/η²; one
    with a prior may do better, so this is an estimate and no part of a proof.

    Args:
        dfil: η of each step, given that the image is in its batch.
        sample_rate: q in (0, 1].
    """
    if not 0 < sample_rate <= 1 or any(not value >= 0 for value in dfil):
        raise InvalidInputError(f"composed_dfil: expected η >= 0 and a rate in (0, 1], got {dfil!r}, {sample_rate!r}.")
    return math.sqrt(sample_rate * math.fsum(value**2 for value in dfil))


def canary_p_value(correct: int, guesses: int, canaries: int, *, epsilon: float, delta: float) -> float:
    """Return the probability of so many correct guesses, at most, under (ε, δ)-differential privacy.

    Each of m canaries is in the data by a fair coin of its own; an auditor guesses r of the coins. Under pure ε the
    number of correct guesses is stochastically below Binomial(r, e^ε/(1 + e^ε)); δ adds 2 m δ max_i P(v - i <= B < v)/i
    (Steinke, Nasr, Jagielski, "Privacy auditing with one training run", arXiv:2305.08846, theorem 5.2).

    Args:
        correct: v, of the guesses.
        guesses: r, in 0 ... m; an auditor may abstain.
        canaries: m.
        epsilon: ε >= 0.
        delta: δ in [0, 1].
    """
    if not 0 <= correct <= guesses <= canaries or not epsilon >= 0 or not 0 <= delta <= 1:
        raise InvalidInputError(
            "canaries: expected 0 <= correct <= guesses <= canaries, epsilon >= 0 and delta in [0, 1], got "
            f"{correct}, {guesses}, {canaries}, {epsilon}, {delta}."
        )
    if correct == 0:
        return 1.0
    accuracy = 1 / (1 + math.exp(-epsilon))
    tail = float(binom.sf(correct - 1, guesses, accuracy))
    below = np.cumsum(binom.pmf(np.arange(correct - 1, -1, -1), guesses, accuracy))
    slope = float((below / np.arange(1, correct + 1)).max())
    return min(1.0, tail + 2 * canaries * delta * slope)


def canary_epsilon(correct: int, guesses: int, canaries: int, *, delta: float, confidence: float = 0.95) -> float:
    """Return the lower bound of ε that correct guesses of canaries demonstrate; 0 where they demonstrate nothing.

    Args:
        correct, guesses, canaries, delta: See `canary_p_value`.
        confidence: Of the bound.
    """

    def refuted(value: float) -> bool:
        return canary_p_value(correct, guesses, canaries, epsilon=value, delta=delta) < 1 - confidence

    if not refuted(0.0):
        return 0.0
    low, high = 0.0, 50.0
    for _ in range(BISECTIONS):
        middle = (low + high) / 2
        low, high = (middle, high) if refuted(middle) else (low, middle)
    return low

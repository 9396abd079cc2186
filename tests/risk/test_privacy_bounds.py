"""Bounds of differential privacy against simulated optimal attackers, closed forms and other accountants."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy.special import ndtri

from lightning_gradaudit.errors import InvalidInputError
from lightning_gradaudit.risk.privacy_bounds import (
    Looks,
    TradeOff,
    canary_epsilon,
    canary_p_value,
    composed_dfil,
    epsilon,
    gaussian_success,
    one_look,
    whole_run,
)

pytest.importorskip("dp_accounting")
DRAWS = 200_000


def likelihood_ratio(seen: np.ndarray, noise: float, rate: float) -> np.ndarray:
    """Log likelihood ratio of (N, T) looks at 1 or nothing, each drawn with this rate, against nothing."""
    return np.log1p(rate * np.expm1((seen - 0.5) / noise**2)).sum(1)


def best_success(noise: float, rate: float, steps: int, prior: float) -> float:
    """Success of the Neyman-Pearson attacker, by simulation: no attacker with this chance does better."""
    rng = np.random.default_rng(0)
    count = min(DRAWS, 4_000_000 // steps)
    without = noise * rng.standard_normal((count, steps))
    within = noise * rng.standard_normal((count, steps)) + (rng.random((count, steps)) < rate)
    threshold = np.quantile(likelihood_ratio(without, noise, rate), 1 - prior)
    return float((likelihood_ratio(within, noise, rate) > threshold).mean())


@pytest.mark.parametrize("prior", [0.01, 0.2])
@pytest.mark.parametrize(
    ("noise", "rate", "steps", "tight"),
    [(1.0, 1.0, 1, True), (4.0, 1.0, 10, True), (0.5, 1.0, 1, True), (1.0, 0.1, 10, False), (2.0, 0.05, 100, False)],
)
def test_the_best_attacker_stays_below_the_bound_and_reaches_it_where_it_is_tight(noise, rate, steps, tight, prior):
    bound = whole_run([Looks(noise, rate, steps)]).success(prior)
    reached = best_success(noise, rate, steps, prior)
    error = 3 * math.sqrt(2 * bound / min(DRAWS, 4_000_000 // steps))  # of the rate and of the threshold
    assert reached <= bound + error
    # A sampled mechanism's two directions differ, and the bound takes the worse of both.
    assert reached >= (0.95 if tight else 0.85) * bound - error


def test_an_attacker_that_names_one_of_a_hundred_stays_below_the_bound():
    rng = np.random.default_rng(1)
    for noise in (0.3, 1.0, 3.0):
        true = rng.integers(100, size=20_000)
        seen = noise * rng.standard_normal((len(true), 100))
        seen[np.arange(len(true)), true] += 1  # orthogonal gradients at the clipping norm
        named = float((seen.argmax(1) == true).mean())
        bound = one_look(noise).success(1 / 100)
        assert named <= bound + 3 * math.sqrt(bound / len(true))
        assert one_look(noise).excess(100) == pytest.approx((bound - 0.01) / 0.99)


@pytest.mark.parametrize("noise", [0.1, 0.7, 1.0, 8.0])
@pytest.mark.parametrize("prior", [1e-4, 0.01, 0.1, 0.5, 0.9])
def test_one_look_is_the_closed_form(noise, prior):
    assert one_look(noise).success(prior) == pytest.approx(gaussian_success(prior, 1 / noise), rel=1e-4)
    assert one_look(noise).success(prior) >= gaussian_success(prior, 1 / noise) - 1e-12
    assert one_look(noise, replace=True).success(prior) == pytest.approx(gaussian_success(prior, 2 / noise), rel=1e-4)


def test_looks_of_the_full_batch_compose_like_one_with_less_noise():
    run = whole_run([Looks(6.0, 1.0, 4), Looks(3.0, 1.0, 5)])
    for prior in (0.01, 0.1, 0.5):
        assert run.success(prior) == pytest.approx(gaussian_success(prior, math.sqrt(4 / 36 + 5 / 9)), rel=2e-3)


def test_the_full_batch_formula_is_no_substitute_for_sampled_looks():
    """At q = .1, T = 10, σ = 1 the formula for full batches says .97."""
    assert gaussian_success(0.1, math.sqrt(10)) == pytest.approx(0.97, abs=0.002)
    assert 0.19 < whole_run([Looks(1.0, 0.1, 10)]).success(0.1) < 0.22


@pytest.mark.parametrize(("noise", "rate", "steps"), [(1.0, 0.01, 1000), (0.8, 0.05, 200), (4.0, 0.2, 50)])
def test_the_accountants_agree(noise, rate, steps):
    opacus = pytest.importorskip("opacus")
    from dp_accounting import dp_event, rdp

    ours = epsilon([Looks(noise, rate, steps)], 1e-5)
    prv = opacus.accountants.PRVAccountant()
    prv.history = [(noise, rate, steps)]
    estimate = prv._get_dprv(eps_error=1e-3, delta_error=1e-8).compute_epsilon(1e-5, 1e-8, 1e-3)[1]
    assert ours == pytest.approx(estimate, rel=1e-3)
    renyi = opacus.accountants.RDPAccountant()
    renyi.history = [(noise, rate, steps)]
    orders = list(range(2, 64))  # at fractional ones the two compute different bounds
    theirs = rdp.RdpAccountant(orders=orders)
    theirs.compose(dp_event.PoissonSampledDpEvent(rate, dp_event.GaussianDpEvent(noise)), steps)
    assert renyi.get_epsilon(1e-5, alphas=orders) == pytest.approx(theirs.get_epsilon(1e-5), rel=1e-3)
    assert ours < renyi.get_epsilon(1e-5)


def test_the_expected_score_is_bounded_for_the_best_attacker_too():
    """A picture that is black or white: the attacker scores 1 when right, the guess half of the time."""
    rng = np.random.default_rng(2)
    white = rng.integers(2, size=DRAWS)
    seen = white + 0.8 * rng.standard_normal(DRAWS)
    reached = float(((seen > 0.5) == white).mean())
    bound = one_look(0.8).expected(np.array([0.0, 1.0]))
    assert reached <= bound <= 1
    assert one_look(1e3).expected(np.array([0.2, 0.4])) == pytest.approx(0.3, abs=0.01)
    assert one_look(0.01).expected(np.array([0.2, 0.4])) == pytest.approx(1.0, abs=0.01)


def test_fisher_information_of_sampled_steps_is_at_most_the_sum():
    assert composed_dfil([3.0, 4.0], 1.0) == 5.0
    assert composed_dfil([3.0, 4.0], 0.25) == 2.5
    # By quadrature: the location's information in a mixture of a look and pure noise.
    x = np.linspace(-12, 13, 200_001)
    noise, rate = 1.3, 0.3
    density = lambda at: np.exp(-((x - at) ** 2) / (2 * noise**2)) / math.sqrt(2 * math.pi) / noise
    mixture = rate * density(1.0) + (1 - rate) * density(0.0)
    score = rate * density(1.0) * (x - 1.0) / noise**2
    information = float((score**2 / mixture).sum() * (x[1] - x[0]))
    assert information <= composed_dfil([1 / noise], rate) ** 2


# Canaries


def test_the_bound_of_canaries_is_the_binomial_one_without_delta():
    from scipy.stats import binomtest

    for correct, guesses in ((60, 100), (80, 100), (99, 100)):
        found = canary_epsilon(correct, guesses, 200, delta=0.0)
        share = binomtest(correct, guesses, alternative="greater").proportion_ci(0.95, "exact").low
        assert found == pytest.approx(max(0.0, math.log(share / (1 - share))), abs=1e-6)
        assert canary_epsilon(correct, guesses, 200, delta=1e-3) < found
    assert canary_epsilon(50, 100, 100, delta=1e-5) == 0.0
    assert canary_p_value(0, 0, 5, epsilon=0.0, delta=0.0) == 1.0


def correct_guesses(noise: float, rng: np.random.Generator, *, canaries: int, guesses: int) -> int:
    """Gradient-space canaries in one look: orthogonal directions, each in by a coin; guess the surest ones."""
    coins = rng.integers(2, size=canaries)
    seen = coins + noise * rng.standard_normal(canaries)
    surest = np.argsort(-np.abs(seen - 0.5))[:guesses]
    return int(((seen > 0.5) == coins)[surest].sum())


def test_canaries_stay_below_theory_and_rise_above_it_with_a_tenth_of_the_noise():
    rng = np.random.default_rng(3)
    noise, delta = 2.0, 1e-5
    theory = epsilon([Looks(noise, 1.0, 1)], delta)

    def bounds(actual: float) -> list[float]:
        found = [correct_guesses(actual, rng, canaries=1000, guesses=100) for _ in range(100)]
        return [canary_epsilon(correct, 100, 1000, delta=delta) for correct in found]

    assert sum(low <= theory for low in bounds(noise)) >= 95
    assert np.mean(bounds(noise)) > 0.3
    assert min(bounds(noise / 10)) > theory


def test_the_bound_of_canaries_holds_for_randomised_response():
    """The mechanism that attains it: each coin is reported truly with probability e^ε/(1 + e^ε)."""
    rng = np.random.default_rng(4)
    for true in (0.5, 2.0):
        correct = rng.binomial(300, 1 / (1 + math.exp(-true)), size=400)
        covered = np.mean([canary_epsilon(int(v), 300, 300, delta=0.0) <= true for v in correct])
        assert 0.93 <= covered <= 0.98


@pytest.mark.parametrize(
    "wrong",
    [
        lambda: one_look(0.0),
        lambda: one_look(math.nan),
        lambda: whole_run([]),
        lambda: whole_run([Looks(1.0, 1.5, 1)]),
        lambda: whole_run([Looks(1.0, 0.5, 0)]),
        lambda: epsilon([Looks(1.0, 0.5, 1)], 0.0),
        lambda: one_look(1.0).success(1.1),
        lambda: one_look(1.0).excess(1),
        lambda: one_look(1.0).expected(np.array([])),
        lambda: composed_dfil([1.0], 0.0),
        lambda: canary_epsilon(5, 4, 10, delta=0.0),
    ],
)
def test_misuse_is_refused(wrong):
    with pytest.raises(InvalidInputError, match="expected"):
        wrong()


def test_any_grid_gives_a_valid_bound():
    fine, coarse = one_look(1.0), TradeOff(np.array([0.0, 1.0]), np.array([0.383, 0.127]))
    for prior in (0.0, 0.01, 0.5, 1.0):
        assert prior <= fine.success(prior) <= coarse.success(prior) + 1e-3
    assert fine.success(0.5) == pytest.approx(float(1 - (1 - 0.8413447)), abs=1e-4)
    assert ndtri(fine.success(0.5)) == pytest.approx(1.0, abs=1e-3)

"""Confidence bounds against plain formulas, scipy and numpy."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy.stats import binomtest

from lightning_gradaudit.risk.intervals import (
    bootstrap_by_audit,
    bounds_share,
    clopper_pearson,
    log_e_value,
    upper_share,
)

RNG = np.random.default_rng(3)
SHARES = [np.zeros(5), np.array([0.0, 0.25, 1.0, 0.5]), np.array([0.1]), RNG.random(12)]


def evidence(shares, rate, bets):
    """The product of bets, factor by factor: (share, weight of the bet) each."""
    total = 0.0
    for assumed, weight in bets:
        product = weight
        for share in shares:
            product *= share * assumed + (1 - share) * (1 - assumed * rate) / (1 - rate)
        total += product
    return total


@pytest.mark.parametrize("shares", SHARES, ids=len)
@pytest.mark.parametrize("rate", [0.05, 0.3, 0.9])
def test_the_tolerant_e_value_is_the_mixture_of_four_bets(shares, rate):
    expected = evidence(shares, rate, [(0, 0.7), (0.25, 0.1), (0.5, 0.1), (0.75, 0.1)])
    assert log_e_value(shares, rate, tolerant=True) == pytest.approx(math.log(expected), rel=1e-12)


def test_the_strict_e_value_is_all_on_clean_audits_and_is_the_default():
    assert log_e_value(np.zeros(7), 0.2) == pytest.approx(-7 * math.log(0.8))
    assert log_e_value(np.array([0.0, 0.5]), 0.2) == pytest.approx(math.log(evidence([0.0, 0.5], 0.2, [(0, 1)])))
    with np.errstate(all="raise"):  # an audit that is exposed as a whole loses the bet, without a warning
        assert log_e_value(np.array([0.0, 1.0]), 0.2) == -math.inf


@pytest.mark.parametrize(
    "bets", [[(0, 1)], [(0, 0.7), (0.25, 0.1), (0.5, 0.1), (0.75, 0.1)]], ids=["strict", "tolerant"]
)
@pytest.mark.parametrize("values", [(0, 1), (0, 0.5, 1), (0.25, 0.75)], ids=str)
def test_under_the_hypothesis_a_unit_is_worth_one_at_most(bets, values):
    rate = 0.3
    mix = np.linspace(0, 1, 101)
    low, high = min(values), max(values)
    for weight in mix:  # distributions on two of the values with a mean of at least the rate
        if weight * high + (1 - weight) * low >= rate:
            expected = weight * evidence([high], rate, bets) + (1 - weight) * evidence([low], rate, bets)
            assert expected <= 1 + 1e-12


def test_the_bound_is_reached_by_evidence_of_one_over_alpha_exactly():
    confidence = 0.875
    rate = 1 - 2.0**-3  # one clean unit is worth 8 = 1 / (1 - confidence)
    assert bounds_share(np.zeros(1), rate, confidence=confidence)
    assert not bounds_share(np.zeros(1), rate - 1e-9, confidence=confidence)
    assert not bounds_share(np.zeros(30), 0.1, confidence=0.95, tolerant=True)
    assert bounds_share(np.zeros(30), 0.1, confidence=0.95)


@pytest.mark.parametrize("shares", SHARES, ids=len)
def test_the_upper_share_is_the_root_of_the_evidence(shares):
    bound = upper_share(shares, confidence=0.95)
    assert log_e_value(shares, bound - 1e-6, tolerant=True) < math.log(20)
    assert bound == 1 or log_e_value(shares, bound, tolerant=True) >= math.log(20)


def test_without_audits_the_share_is_unbounded():
    assert upper_share(np.zeros(0), confidence=0.95) == 1


def test_bounds_of_a_proportion_hold_with_95_percent_each_by_default():
    both = binomtest(3, 40).proportion_ci(0.9, method="exact")  # 5 % on each side
    assert clopper_pearson(3, 40) == pytest.approx((both.low, both.high))


def resampled(batches, statistic):
    """Resample whole audits one by one."""
    draws = np.random.default_rng(0).integers(len(batches), size=(2000, len(batches)))
    if statistic == "mean":
        return [np.concatenate([batches[i] for i in draw]).mean() for draw in draws]
    return [np.quantile(np.concatenate([batches[i] for i in draw]), 0.9) for draw in draws[:200]]


@pytest.mark.parametrize("statistic", ["mean", "p90"])
def test_the_bootstrap_draws_whole_audits(statistic):
    batches = [RNG.random(size) for size in (2, 5, 1)]
    low, high = bootstrap_by_audit(batches, statistic, 0.9)
    values = resampled(batches, statistic)
    assert (low, high) == pytest.approx((np.quantile(values, 0.1), np.quantile(values, 0.9)), abs=0.01)
    assert low < high


def test_the_bootstrap_gives_the_same_interval_each_time():
    batches = [RNG.random(3) for _ in range(6)]
    assert bootstrap_by_audit(batches, "mean", 0.9) == bootstrap_by_audit(batches, "mean", 0.9)


def test_two_audits_are_the_fewest_that_can_be_resampled():
    assert bootstrap_by_audit([np.array([0.2, 0.4])], "mean", 0.9) == (0, 1)
    assert bootstrap_by_audit([np.array([0.2]), np.array([0.4])], "mean", 0.9) == pytest.approx((0.2, 0.4))

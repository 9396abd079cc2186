"""Which images count, each once: against sets and loops over the same records."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy.stats import binomtest
from support import record

from lightning_gradaudit import Outcome
from lightning_gradaudit.risk.intervals import upper_share
from lightning_gradaudit.risk.statistics import Chance, Criteria, audits_needed, clean, found, measure


def test_shares_are_of_the_images_of_each_audit():
    records = [record(0, (0.9, 0.1, 0.2, 0.8)), record(1, (0.0, 0.7)), record(2, (0.1,))]
    assert clean(records, "audits").shares_above(0.5).tolist() == [0.5, 0.5, 0]
    assert clean(records, "images").shares_above(0.5).tolist() == [1, 0, 0, 1, 0, 1, 0]


def test_identification_is_a_share_of_the_images_that_it_was_measured_for():
    nan = math.nan
    records = [
        record(0, (0.0,) * 4, identified=torch.tensor([1, 0, nan, nan])),
        record(1, (0.0,) * 2, identified=torch.tensor([nan, nan])),
        record(2, (0.0,) * 3, identified=torch.tensor([1, nan, 1])),
    ]
    assert clean(records, "audits").shares_identified().tolist() == [0.5, 1]


def test_images_without_identity_are_counted_and_none_of_the_others():
    anonymous = [record(step, (0.0,) * 3, digests=(), session="") for step in (3, 4)]
    named = record(0, (0.1, 0.2))
    assert clean([named], "audits").anonymous == 0
    for independent in ("audits", "images"):
        counted = clean([named, *anonymous], independent)
        assert (counted.anonymous, counted.units) == (6, {"audits": 1, "images": 2}[independent])
    assert clean(anonymous, "audits").anonymous == 6
    assert clean(anonymous, "audits").shares_identified().tolist() == []


def test_names_of_the_user_are_one_session_whatever_the_digests_say():
    records = [record(s, (0.0,), ids=(f"image {s}",), session=f"run {s}") for s in range(4)]
    records += [record(9, (0.0,), digests=("d",), session="")]
    assert clean(records, "audits").units == 4


def test_everything_that_an_attack_returned_is_evidence_of_presence_by_audit():
    records = [
        record(0, (0.1, 0.2, 0.3)),
        record(1, (0.5,), outcome=Outcome.NOT_APPLICABLE),
        record(2, (math.nan, 0.4), outcome=Outcome.BUDGET_SPENT),
        record(3, (math.nan,)),
        record(4, (0.6,)),
        record(5, (0.7, 0.8)),
    ]
    evidence = found(records)
    assert [batch.tolist() for batch in evidence.by_audit] == [
        pytest.approx([0.1, 0.2, 0.3]), pytest.approx([0.4]), pytest.approx([0.6]),
        pytest.approx([0.7, 0.8]),
    ]  # fmt: skip
    assert evidence.exposures == pytest.approx([0.1, 0.2, 0.3, 0.4, 0.6, 0.7, 0.8])


def test_without_an_attack_nothing_was_found():
    evidence = found([record(0, (0.5,), outcome=Outcome.NOT_APPLICABLE)])
    assert (evidence.by_audit, len(evidence.exposures), evidence.trials) == ([], 0, 0)


@pytest.mark.parametrize("max_risk", [0.1, 0.3])
@pytest.mark.parametrize(("hits", "chance_hits"), [(0, 0.0), (3, 0.0), (2, 10.0), (6, 32.0)])
@pytest.mark.parametrize("tail", [0.1, 0.9])
def test_the_audits_needed_are_the_fewest_that_bring_both_bounds_under_the_limit(max_risk, hits, chance_hits, tail):
    criteria = Criteria(max_risk=max_risk, statistic="worst", tail=tail, confidence=0.95, independent="audits")
    named = [1.0] * hits + [0.0] * 2
    records = [
        record(step, (0.0,), identified=torch.tensor([value]), chance_hits=chance_hits, chance_trials=64)
        for step, value in enumerate(named)
    ]
    measured = measure(records, criteria)
    chance = binomtest(round(chance_hits) * len(named), 64 * len(named), alternative="greater")
    lowest_chance = chance.proportion_ci(0.95, method="exact").low
    for more in range(1, 400):
        clean_enough = (1 - tail) ** (len(named) + more) <= 0.05
        bound = upper_share(np.append(named, np.zeros(more)), confidence=0.95)
        if clean_enough and (bound - lowest_chance) / (1 - lowest_chance) <= max_risk:
            break
    assert audits_needed(measured, criteria) == more


def test_where_anything_may_leak_only_the_tail_asks_for_audits():
    criteria = Criteria(max_risk=1.0, statistic="worst", tail=0.1, confidence=0.95, independent="audits")
    assert audits_needed(measure([record(0, (0.0,))], criteria), criteria) == 28


@pytest.mark.parametrize("confidence", [0.9, 0.95])
def test_identification_bounds_hold_beside_the_rate_that_was_seen(confidence):
    records = [
        record(step, (0.0,) * 2, identified=torch.tensor([1.0, 0.0]), chance_hits=0.0, chance_trials=64)
        for step in range(10)
    ]
    criteria = Criteria(max_risk=0.3, statistic="worst", tail=0.1, confidence=confidence, independent="audits")
    measured = measure(records, criteria)
    exact = binomtest(10, 20, alternative="greater").proportion_ci(confidence, method="exact").low
    chance = binomtest(0, 640, alternative="less").proportion_ci(confidence, method="exact").high
    assert (measured.hits, measured.trials, measured.significant) == (10, 20, exact > chance)
    assert measured.excess == pytest.approx(0.5)
    assert measured.excess_low == pytest.approx(exact)
    assert measured.excess_high == pytest.approx(upper_share(np.full(10, 0.5), confidence=confidence))
    assert (measured.risk, measured.low, measured.high) == (measured.excess, measured.excess_low, 1.0)


def test_without_mismatched_reconstructions_chance_excuses_nothing():
    assert Chance.of([record(0, chance_hits=0.0, chance_trials=0)], 0.95) == Chance(0.0, 0.0, 0.05)
    assert Chance.of([], 0.95) == Chance(0.0, 0.0, 0.05)


@pytest.mark.parametrize("confidence", [0.9, 0.95, 0.99])
def test_chance_is_bounded_with_the_gates_confidence(confidence):
    records = [record(step, chance_hits=2.0, chance_trials=30) for step in range(2)]
    low = binomtest(4, 60, alternative="greater").proportion_ci(confidence, method="exact").low
    high = binomtest(4, 60, alternative="less").proportion_ci(confidence, method="exact").high
    found_chance = Chance.of(records, confidence)
    assert (found_chance.rate, found_chance.low, found_chance.high) == pytest.approx((4 / 60, low, high))


@pytest.mark.parametrize(("statistic", "units"), [("worst", 29), ("p90", 31), ("mean", 31)])
def test_only_the_worst_case_bets_everything_on_clean_audits(statistic, units):
    criteria = Criteria(max_risk=0.3, statistic=statistic, tail=0.1, confidence=0.95, independent="audits")
    assert [criteria.bound(np.zeros(n)) for n in (units - 1, units)] == [False, True]
    assert [criteria.bound(np.zeros(n), tolerant=True) for n in (30, 31)] == [False, True]
    assert [criteria.bound(np.zeros(n), tolerant=False) for n in (28, 29)] == [False, True]
    assert criteria.bound(np.zeros(1), 0.99)

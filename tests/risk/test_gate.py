"""The gate: exact bounds against scipy, and every reason for which it must not pass."""

from __future__ import annotations

import json
import math
import re
from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy.stats import binomtest
from support import record as audit_record

from lightning_gradaudit import AuditRecord, Outcome, RiskGate, Status
from lightning_gradaudit.audit.engine_check import EngineCheck
from lightning_gradaudit.errors import InvalidInputError
from lightning_gradaudit.risk.checks import Fault, Losses
from lightning_gradaudit.risk.history import AuditHistory, make_stamp
from lightning_gradaudit.risk.intervals import clopper_pearson

PASSED = EngineCheck(passed=True, psnr={"InvertingGradients": 30.0})
NAN = math.nan


def record(exposure=(0.0,), *, identified=None, step=0, **changes) -> AuditRecord:
    """A clean audit of as many images as there are exposures, unless told otherwise."""
    named = torch.tensor([0.0] * len(exposure) if identified is None else identified)
    return audit_record(step, exposure, **({"identified": named, "chance_hits": 0.0, "chance_trials": 64} | changes))


def clean(images, *, batch=1, start=0):
    return [record((0.0,) * batch, step=start + i) for i in range(images // batch)]


def verdict(records, gate=None, **kwargs):
    now = {"step": max((r.step for r in records), default=0) + 1}
    return (gate or RiskGate()).verdict(records, **(now | kwargs))


# Bounds


@pytest.mark.parametrize("confidence", [0.9, 0.95, 0.99])
@pytest.mark.parametrize(("successes", "trials"), [(0, 1), (0, 28), (0, 29), (1, 30), (7, 20), (30, 30), (128, 200)])
def test_clopper_pearson_equals_scipys_exact_interval(successes, trials, confidence):
    low, high = clopper_pearson(successes, trials, confidence=confidence)
    upper = binomtest(successes, trials, alternative="less").proportion_ci(confidence, method="exact").high
    lower = binomtest(successes, trials, alternative="greater").proportion_ci(confidence, method="exact").low
    assert (low, high) == (pytest.approx(lower, abs=1e-12), pytest.approx(upper, abs=1e-12))


def test_without_trials_the_interval_says_nothing():
    assert clopper_pearson(0, 0) == (0.0, 1.0)


# Pass, block, unknown


@pytest.mark.parametrize(("images", "expected"), [(1, "UNKNOWN"), (28, "UNKNOWN"), (29, "PASS"), (60, "PASS")])
def test_none_among_twenty_nine_clean_images_is_the_least_that_passes(images, expected):
    assert 0.9**28 > 0.05 > 0.9**29  # a tail of 10 % would have shown itself with 95 % confidence
    assert verdict(clean(images)).status == expected


@pytest.mark.parametrize("batch", [1, 4, 10])
def test_audits_count_and_not_their_images(batch):
    """The images of a batch may all be exposed or none: only audits are independent, unless the user says otherwise."""
    few, enough = clean(28 * batch, batch=batch), clean(29 * batch, batch=batch)
    result = verdict(enough)
    assert (result.status, result.images, result.audits) == (Status.PASS, 29 * batch, 29)
    assert verdict(few).status is Status.UNKNOWN
    assert (verdict(few, RiskGate(independent="images")).status is Status.PASS) == (batch > 1)


def test_independent_images_are_an_assumption_that_the_verdict_names():
    result = verdict(clean(40, batch=10), RiskGate(independent="images"))
    assert result.status is Status.PASS
    assert "taken to be exposed independently" in str(result)


@pytest.mark.parametrize("others", [0, 28, 100])
def test_one_exposed_image_blocks_however_many_are_clean(others):
    result = verdict([record((0.31,)), *clean(others, start=1)])
    assert result.status is Status.BLOCK
    assert (result.risk, result.driver) == (pytest.approx(0.31), "exposure")
    assert result.low == pytest.approx(0.31)
    assert "0.31" in str(result)


def test_exposure_at_the_limit_does_not_block():
    records = [record((0.3,), step=i) for i in range(40)]
    assert verdict(records, RiskGate(max_risk=0.31)).status is Status.PASS
    assert verdict(records, RiskGate(max_risk=0.29)).status is Status.BLOCK


def test_identification_alone_blocks_when_no_image_looks_exposed():
    """By similarity, noise of 0.3 is a perfect defence; four faces in ten are still recognised."""
    records = [record((0.0,), identified=[float(i % 2)], step=i) for i in range(40)]
    result = verdict(records)
    assert (result.status, result.driver) == (Status.BLOCK, "identification")
    assert result.exposure == 0
    assert result.risk == pytest.approx(0.5)
    assert "20 of 40" in str(result)


def test_identification_at_the_measured_chance_is_no_finding():
    records = [record((0.0,), identified=[float(i % 5 == 0)], chance_hits=13.0, step=i) for i in range(100)]
    result = verdict(records)
    assert result.chance == pytest.approx(13 / 64)
    assert result.excess_identification == 0
    assert result.status is Status.PASS


def test_a_lucky_hit_among_few_images_does_not_block_by_identification():
    result = verdict([record((0.0,), identified=[float(i == 0)], chance_hits=2.0, step=i) for i in range(3)])
    assert result.excess_identification == pytest.approx((1 / 3 - 2 / 64) / (1 - 2 / 64))
    assert result.status is Status.UNKNOWN


def test_identification_that_is_measured_too_rarely_bounds_nothing():
    records = [record((0.0,), identified=[NAN], step=i) for i in range(100)] + clean(3, start=100)
    assert verdict(records).status is Status.UNKNOWN


@pytest.mark.parametrize(("statistic", "risk"), [("worst", 0.9), ("p90", 0.2), ("mean", 0.118)])
def test_the_statistic_is_that_of_numpy(statistic, risk):
    values = np.array([0.1] * 88 + [0.2] * 10 + [0.9, 0.1])
    oracle = {"worst": values.max(), "p90": np.quantile(values, 0.9, method="higher"), "mean": values.mean()}
    result = verdict([record((float(v),), step=i) for i, v in enumerate(values)], RiskGate(statistic=statistic))
    assert result.exposure == pytest.approx(oracle[statistic], abs=1e-6)
    assert result.exposure == pytest.approx(risk, abs=1e-6)


def test_without_audits_the_verdict_is_unknown_and_the_risk_not_a_number():
    result = verdict([])
    assert (result.status, result.images, result.newest_step) == (Status.UNKNOWN, 0, None)
    assert math.isnan(result.risk)
    assert (result.low, result.high) == (0.0, 1.0)
    assert len(result.reasons) == 1
    assert len(verdict([], faults=[(0, "at the first step")]).reasons) == 2


def test_a_demonstrated_exposure_is_never_forgotten_unless_the_user_wants_a_window():
    old = [record((0.9,), step=i) for i in range(10)]
    window = RiskGate(memory="window")
    assert verdict(old + clean(1000, start=10)).status is Status.BLOCK
    assert verdict(old + clean(128, start=10), window).status is Status.PASS
    assert "what was found before is forgotten" in str(verdict(old + clean(128, start=10), window))
    assert verdict(old + clean(127, start=10), window).status is Status.BLOCK


@pytest.mark.parametrize("statistic", ["p90", "mean"])
def test_a_long_clean_history_does_not_dilute_what_leaks_now(statistic):
    records = [*clean(900), *(record((0.9,), step=900 + i) for i in range(60))]
    assert 60 / len(records) < 0.1
    assert verdict(records, RiskGate(statistic=statistic)).status is Status.BLOCK


# Never PASS


@pytest.mark.parametrize("similarity", [0.2, NAN])
@pytest.mark.parametrize(("failed", "status"), [(4, Status.PASS), (5, Status.UNKNOWN), (40, Status.UNKNOWN)])
def test_attacks_that_did_not_match_the_gradient_prove_nothing(failed, status, similarity):
    """Beyond a tail of such audits: there a weak attack, not a safe model, is why nothing was found."""
    records = [record((0.0,), step=i, gradient_similarity=similarity) for i in range(failed)] + clean(
        40 - failed, start=failed
    )
    result = verdict(records)
    assert result.status is status
    assert ("did not match the gradient" in str(result)) == (status is Status.UNKNOWN)


def test_an_unmatched_audit_weighs_by_its_images():
    """One audit in ten, and two thirds of the images."""
    gate = RiskGate(independent="images")
    matched = clean(40, batch=4)
    assert verdict(matched, gate).status is Status.PASS
    result = verdict([*matched, record((0.0,) * 20, step=99, gradient_similarity=0.1)], gate)
    assert result.status is Status.UNKNOWN
    assert "20 of 60 images" in str(result)


def test_only_audits_whose_attack_matched_count_towards_the_twenty_nine():
    records = [record((0.0,), step=i, gradient_similarity=0.1 if i < 2 else 0.9) for i in range(30)]
    result = verdict(records)
    assert (result.status, result.images) == (Status.UNKNOWN, 28)
    assert verdict([*records, record((0.0,), step=30)]).status is Status.PASS


@pytest.mark.parametrize("broken", [{"self_test": 0.5}, {"gradient_similarity": NAN}, {"gradient_similarity": 0.1}])
def test_what_was_found_counts_even_where_nothing_found_would_not(broken):
    assert verdict([*clean(40), record((0.9,), step=40, **broken)]).status is Status.BLOCK


def test_without_evidence_there_is_no_risk_to_publish():
    inert = record((0.08,), outcome=Outcome.NOT_APPLICABLE, gradient_similarity=NAN)
    unmatched = record((0.08,), gradient_similarity=0.1, step=1)
    result = verdict([inert, unmatched])
    assert math.isnan(result.risk)
    assert all(math.isnan(float(r.published(0.3).exposure)) for r in (inert, unmatched))
    assert float(record((0.9,), gradient_similarity=0.1).published(0.3).exposure) == pytest.approx(0.9)


# Each image once


def test_the_same_image_counts_once_however_often_it_is_audited():
    one = [record((0.0,), step=i, digests=("the same",)) for i in range(200)]
    result = verdict(one)
    assert (result.status, result.images, result.audits) == (Status.UNKNOWN, 1, 1)


def test_one_record_two_hundred_times_is_one_audit():
    assert verdict([record((0.0,) * 4)] * 200).audits == 1


def test_augmented_views_are_told_by_the_users_names():
    views = [record((0.0,), step=i) for i in range(60)]
    named = [replace(r, ids=(f"patient {i % 20}",)) for i, r in enumerate(views)]
    assert verdict(views).status is Status.PASS
    assert (verdict(named).status, verdict(named).images) == (Status.UNKNOWN, 20)


def test_an_image_that_was_exposed_in_a_later_epoch_is_exposed():
    gate = RiskGate(statistic="p90")
    epochs = [record((0.9 if i >= 40 else 0.0,), step=i, digests=(f"{i % 40}",)) for i in range(80)]
    assert verdict(epochs, gate).status is not Status.PASS


def test_images_without_any_identity_count_for_nothing():
    result = verdict([replace(r, digests=()) for r in clean(60)])
    assert (result.status, result.images) == (Status.UNKNOWN, 0)


def test_sessions_whose_images_cannot_be_told_apart_are_not_added_up():
    first = [record((0.0,), step=i, session="before") for i in range(20)]
    second = [record((0.0,), step=20 + i, session="after") for i in range(20)]
    assert verdict(first + second).images == 20
    named = [replace(r, ids=(f"{i}",)) for i, r in enumerate(first + second)]
    assert verdict(named).status is Status.PASS


@pytest.mark.parametrize("statistic", ["p90", "mean"])
def test_many_exposed_images_of_few_audits_are_not_outvoted_by_few_images_of_many(statistic):
    records = [record((0.35,) * 32, step=i) for i in range(3)]
    again = records[0].digests[:31]
    records += [record((0.0,) * 32, step=3 + i, digests=(*again, f"new {i}")) for i in range(200)]
    assert verdict(records, RiskGate(statistic=statistic)).status is not Status.PASS


# Lost samples


def test_drops_that_lie_where_the_audits_lie_are_told_and_no_doubt():
    lost = Losses()
    for step in range(40):
        lost.drop(step, in_a_row=False)
    result = verdict(clean(40), lost=lost)
    assert result.status is Status.PASS
    assert result.dropped_share == pytest.approx(0.5)
    assert "50% of the due samples were dropped" in str(result)


@pytest.mark.parametrize(
    ("lost", "says"),
    [
        (Losses(dropped=100_000), "not on record"),
        (Losses(dropped=40, runs=[(100, 400, 40)]), "later in training"),
        (Losses(given_up=1), "given up"),
    ],
)
def test_lost_samples_that_may_differ_from_the_audited_ones_are_a_doubt(lost, says):
    result = verdict(clean(40), lost=lost)
    assert result.status is Status.UNKNOWN
    assert re.search(says, str(result))


def test_losses_survive_json():
    lost = Losses(skipped=2, given_up=1)
    for step, row in ((1, False), (2, True), (9, False)):
        lost.drop(step, in_a_row=row)
    assert lost.runs == [(1, 2, 2), (9, 9, 1)]
    assert Losses.from_dict(json.loads(json.dumps(lost.to_dict()))) == lost


DOUBTS = {
    "a failed self-test": ({"self_test": 0.2}, {}, "invalid"),
    "a self-test that is not a number": ({"self_test": NAN}, {}, "invalid"),
    "an attack that was not finite": ({"outcome": Outcome.NONFINITE}, {}, "invalid"),
    "an attack that did not apply": (
        {"outcome": Outcome.NOT_APPLICABLE, "reason": "why"},
        {},
        "No attack applied.*why",
    ),
    "an exact leak that was not copied": ({"exact_leaks": torch.tensor([True])}, {}, "given away exactly"),
    "a stale newest audit": ({}, {"step": 500}, "steps old"),
    "an unknown age": ({}, {"step": None}, "age of the newest audit is unknown"),
    "a clock that jumped back": ({}, {"step": 7}, "one of them is wrong"),
    "an engine check that contradicts itself": (
        {},
        {"engine": EngineCheck(passed=True, psnr={"a": 3.0})},
        "contradicts itself",
    ),
    "damaged storage": ({}, {"damage": ["The log was changed."]}, "The log was changed"),
    "a failed engine check": (
        {},
        {"engine": EngineCheck(passed=False, psnr={"a": 3.0})},
        "engine check FAILED: a 3.0 dB",
    ),
    "an unfinished engine check": ({}, {"engine": None, "engine_required": True}, "engine check has not finished"),
    "a fault": ({}, {"faults": [(39, "the worker died")]}, "1 audits failed .*step 39: the worker died"),
    "wiring": ({}, {"faults": [(0, "Trains WITHOUT DP", True)]}, "Trains WITHOUT DP"),
}


@pytest.mark.parametrize("doubt", DOUBTS)
def test_a_doubt_turns_a_pass_into_unknown_and_is_named(doubt):
    changes, arguments, says = DOUBTS[doubt]
    arguments = {"step": 41, "engine": PASSED, "engine_required": True} | arguments
    gate = RiskGate(max_age=100)
    records = clean(40)
    assert verdict(records, gate, step=41, engine=PASSED, engine_required=True).status is Status.PASS
    result = verdict([*records, record((0.0,), step=40, **changes)], gate, **arguments)
    assert result.status is Status.UNKNOWN
    assert result.more_audits is None  # more audits alone would not settle it
    assert re.search(says, str(result))


@pytest.mark.parametrize("doubt", DOUBTS)
def test_a_doubt_does_not_hide_a_demonstrated_exposure(doubt):
    changes, arguments, says = DOUBTS[doubt]
    arguments = {"step": 41, "engine": PASSED} | arguments
    records = [record((0.8,)), *clean(39, start=1), record((0.0,), step=40, **changes)]
    result = verdict(records, RiskGate(max_age=100), **arguments)
    assert result.status is Status.BLOCK
    assert re.search(says, str(result))


def test_a_missing_gallery_never_passes():
    records = [record((0.0,), identified=[NAN], gallery=12, step=i) for i in range(100)]
    result = verdict(records)
    assert result.status is Status.UNKNOWN
    assert "Identification was not measured: 12 of 100" in str(result)


def test_a_copied_exact_leak_is_exposed_and_not_doubtful():
    leak = record((1.0,), exact_leaks=torch.tensor([True]), copied=torch.tensor([True]), psnr=torch.tensor([90.0]))
    result = verdict([leak])
    assert (result.status, result.risk) == (Status.BLOCK, 1.0)
    assert "given away" not in str(result)


@pytest.mark.parametrize("images", [40, 100, 120])
def test_an_exposure_that_is_not_a_number_never_counts_as_clean(images):
    """NaN compares false with every limit, so it must be caught and not compared."""
    records = [record((NAN,)), *clean(images, start=1)]
    assert verdict(records).status is Status.UNKNOWN


def test_invalid_audits_are_not_counted_as_evidence():
    records = [record((0.2,), self_test=0.5), *clean(40, start=1)]
    result = verdict(records)
    assert (result.status, result.images) == (Status.UNKNOWN, 40)


def test_faults_stand_for_the_run_and_those_of_its_wiring_in_a_window_too():
    records, window = clean(200), RiskGate(memory="window")
    assert verdict(records, faults=[(3, "old")]).status is Status.UNKNOWN
    assert verdict(records, faults=[(0, "at the first step")]).status is Status.UNKNOWN
    assert verdict(clean(40, start=10), faults=[(3, "before the first audit")]).status is Status.UNKNOWN
    assert verdict(records, window, faults=[(3, "old")]).status is Status.PASS
    assert verdict(records, window, faults=[(3, "wired wrongly", True)]).status is Status.UNKNOWN
    assert verdict(records, window, faults=[(150, "new")]).status is Status.UNKNOWN
    oldest = window.recent(records)[0].step
    assert verdict(records, window, faults=[(oldest, "at its first audit")]).status is Status.UNKNOWN
    assert verdict(records, window, faults=[(oldest - 1, "before it")]).status is Status.PASS


def test_audits_of_early_rungs_alone_are_no_evidence_and_the_verdict_says_what_they_found():
    early = [record((0.1,), step=step, rung=1, rungs=3, evaluations=20) for step in range(40)]
    result = verdict(early)
    assert (result.status, result.images) == (Status.UNKNOWN, 0)
    assert "None of 40 audits has ended its last rung" in result.reasons[0]
    assert "0.1" in result.reasons[0]
    assert result.action


def test_a_failed_engine_check_asks_for_more_than_the_audits_had():
    failed = EngineCheck(passed=False, psnr={"InvertingGradients": 20.0})
    (few, many) = (
        verdict([replace(r, evaluations=count) for r in clean(40)], engine=failed).action for count in (5_000, 50_000)
    )
    asked = [int(re.findall(r"evaluations=(\d+)", action)[0]) for action in (few, many)]
    assert asked[0] > 5_000
    assert asked[1] > 50_000


# What would settle it


def continued(records, more, gate):
    last = records[-1].step if records else 0
    return verdict([*records, *(record((0.0,), step=last + 1 + i) for i in range(more))], gate)


@pytest.mark.parametrize(
    ("records", "gate"),
    [
        pytest.param([], RiskGate(), id="nothing yet"),
        pytest.param(clean(1), RiskGate(), id="one"),
        pytest.param(clean(28), RiskGate(), id="one short"),
        pytest.param(clean(12), RiskGate(tail=0.05), id="a smaller tail"),
        pytest.param(clean(12), RiskGate(confidence=0.99), id="more confidence"),
        pytest.param(clean(30), RiskGate(max_risk=0.05), id="a stricter limit"),
        pytest.param([record((0.0,), identified=[1.0]), *clean(9, start=1)], RiskGate(), id="a lucky hit"),
        pytest.param([record((0.0,) * 40)], RiskGate(statistic="mean"), id="the mean of one audit"),
        pytest.param(clean(40, batch=8), RiskGate(independent="images", tail=0.05), id="images"),
        pytest.param(
            [record((0.0,), identified=[NAN], step=i) for i in range(28)] + clean(1, start=28),
            RiskGate(),
            id="identification rarely measured",
        ),
    ],
)
def test_the_announced_number_of_clean_images_settles_it_and_one_fewer_does_not(records, gate):
    before = verdict(records, gate)
    assert before.status is Status.UNKNOWN
    assert before.more_audits is not None
    assert continued(records, before.more_audits, gate).status is Status.PASS
    assert before.more_audits == 1 or continued(records, before.more_audits - 1, gate).status is Status.UNKNOWN


def test_what_no_number_of_audits_can_settle_is_not_announced():
    result = verdict([record((0.0,), chance_trials=0, step=i) for i in range(300)], RiskGate(max_risk=0.0))
    assert result.status is Status.UNKNOWN
    assert result.more_audits is None


# Numbers that no audit can have measured


OUT_OF_RANGE = {
    "chance_hits": [NAN, -1.0, 1e9, math.inf, "1"],
    "chance_trials": [-1, 2.5, True],
    "identified": [torch.tensor([-5.0]), torch.tensor([0.5]), torch.zeros(2), [0.0]],
    "exposure": [torch.tensor([-5.0]), torch.tensor([1.5]), torch.zeros(0), torch.zeros(1, 1)],
    "self_test": [-1.0, "0"],
    "self_test_tolerance": [1e9, 0.2, NAN],
    "psnr": [torch.tensor([-30.0])],
    "null": [torch.tensor([2.0])],
    "gradient_similarity": [7.0],
    "truth_similarity": [-2.0],
    "step": [-1, 2.0, NAN],
    "outcome": ["converged "],
    "digests": [("a", "b"), [], ("a",) * 3, (1,)],
    "copied": [torch.tensor([0.5])],
    "attack": [None],
    "threat_model": ["local"],
}


@pytest.mark.parametrize(("field", "value"), [(f, v) for f, values in OUT_OF_RANGE.items() for v in values])
def test_numbers_out_of_range_are_refused_when_made_read_and_judged(field, value):
    with pytest.raises(InvalidInputError, match=field):
        replace(record((0.0,)), **{field: value})
    forged = record((0.0,), step=40)
    object.__setattr__(forged, field, value)
    assert verdict(clean(40)).status is Status.PASS
    result = verdict([*clean(40), forged], step=41)
    assert result.status is Status.UNKNOWN
    assert "no audit can have measured" in str(result)


@pytest.mark.parametrize("passed", ["false", 1, None])
def test_an_engine_check_passed_or_it_did_not(passed):
    values = AuditHistory(records=clean(40), engine=PASSED, step=41).to_dict()
    values["engine"]["passed"] = passed
    with pytest.raises(InvalidInputError, match="engine"):
        AuditHistory.from_dict(values)


# Arguments and plain data


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ({"max_risk": -0.1}, "max_risk"),
        ({"max_risk": 1.1}, "max_risk"),
        ({"max_risk": NAN}, "max_risk"),
        ({"max_ceiling": -0.1}, "max_ceiling"),
        ({"max_ceiling": 1.1}, "max_ceiling"),
        ({"max_ceiling": NAN}, "max_ceiling"),
        ({"tail": 0.0}, "tail"),
        ({"tail": 1.0}, "tail"),
        ({"tail": 1.5}, "tail"),
        ({"confidence": 0.3}, "confidence"),
        ({"confidence": 1.0}, "confidence"),
        ({"window": 0}, "window"),
        ({"window": 28}, "window"),
        ({"max_age": 0}, "max_age"),
        ({"statistic": "median"}, "statistic"),
        ({"memory": "none"}, "memory"),
        ({"independent": "pixels"}, "independent"),
    ],
)
def test_a_gate_refuses_settings_out_of_range_by_name(arguments, named):
    with pytest.raises(InvalidInputError, match=named):
        RiskGate(**arguments)


@pytest.mark.parametrize(
    "arguments",
    [
        {"max_risk": 0}, {"max_risk": 1}, {"max_ceiling": 0}, {"max_ceiling": 1}, {"confidence": 0.5}, {"window": 29},
        {"max_age": 1}, {"tail": 0.99}, {"independent": "images"}, {"memory": "window"},
    ],
    ids=str,
)  # fmt: skip
def test_a_gate_takes_settings_at_the_ends_of_their_ranges(arguments):
    (name,) = arguments
    assert RiskGate(**arguments).settings()[name] == arguments[name]


def test_a_window_may_be_as_small_as_the_tail_lets_it_be():
    assert 1 - 0.96 <= 0.05  # one clean audit bounds so large a tail
    assert RiskGate(window=1, tail=0.96).window == 1


@pytest.mark.parametrize("independent", ["audits", "images"])
@pytest.mark.parametrize("window", [29, 60, 64])
@pytest.mark.parametrize("batches", [[1] * 80, [8] * 40, [1, 2, 3] * 20, [70], [1] * 30 + [64]], ids=len)
def test_the_window_is_the_shortest_end_of_a_run_with_its_images_and_the_audits_that_a_pass_takes(
    independent, window, batches
):
    least = {"audits": 29, "images": 1}[independent]
    records = [record((0.0,) * n, step=i, self_test=0.5 if i % 3 == 0 else 1e-7) for i, n in enumerate(batches)]

    def enough(part):
        return sum(r.batch_size for r in part) >= window and sum(r.conclusive for r in part) >= least

    ends = [records[i:] for i in range(len(records), -1, -1)]
    shortest = next((part for part in ends if enough(part)), records)
    gate = RiskGate(window=window, independent=independent)
    assert gate.recent(records) == shortest
    assert gate.judged(records) == records
    assert RiskGate(window=window, independent=independent, memory="window").judged(records) == shortest


@pytest.mark.parametrize("early", [True, False])
def test_the_worse_of_the_run_and_its_newest_window_is_published(early):
    clean_part, leaky_part = (0.0,), (0.2,)
    parts = [leaky_part] * 200 + [clean_part] * 128 if early else [clean_part] * 200 + [leaky_part] * 128
    records = [record(part, step=i) for i, part in enumerate(parts)]
    result = verdict(records, RiskGate(statistic="mean"))
    worse = 200 / 328 * 0.2 if early else 0.2
    assert result.status is Status.PASS
    assert result.exposure == result.risk == pytest.approx(worse)
    assert result.low - 1e-6 <= worse <= result.high + 1e-6
    assert result.low == pytest.approx(worse, abs=0.02)
    assert (result.images, result.audits, result.newest_step) == (328, 328, 327)


def test_the_newest_step_is_of_audits_that_count_whatever_their_order():
    records = [*clean(40)[::-1], record((0.0,), step=50, self_test=0.5)]
    assert verdict(records, step=51).newest_step == 39
    assert verdict(clean(40)[::-1]).newest_step == 39
    assert verdict(records, RiskGate(independent="images"), step=51).audits == 40


@pytest.mark.parametrize(("ceiling", "status"), [(0.4, Status.PASS), (0.6, Status.UNKNOWN), (None, Status.UNKNOWN)])
def test_a_ceiling_above_its_limit_is_no_pass_and_no_block(ceiling, status):
    values = None if ceiling is None else torch.tensor([ceiling])
    records = [*clean(40), record((0.0,), step=40, ceiling=values)]
    records = [replace(r, ceiling=torch.zeros(1)) if r.step < 40 else r for r in records]
    assert verdict(records, RiskGate(max_ceiling=0.5)).status is status
    assert verdict(records).status is Status.PASS


def test_a_gates_repr_rebuilds_it():
    gate = RiskGate(0.2, statistic="p90", max_age=7)
    assert vars(eval(repr(gate))) == vars(gate)
    assert RiskGate(**gate.settings()).settings() == gate.settings()


@pytest.mark.parametrize(("status", "code"), [(Status.PASS, 0), (Status.BLOCK, 1), (Status.UNKNOWN, 2)])
def test_exit_codes_are_those_a_release_pipeline_reads(status, code):
    assert status.exit_code == code


def test_a_verdict_is_plain_json():
    for result in (verdict([]), verdict(clean(40)), verdict([record((0.9,))])):
        plain = json.loads(json.dumps(result.to_dict(), allow_nan=False))
        assert plain["status"] == str(result.status)
        assert plain["risk"] == (None if math.isnan(result.risk) else result.risk)
        assert plain["reasons"] == list(result.reasons)


def same(a, b):
    if isinstance(a, torch.Tensor):
        return torch.allclose(a.float(), b.float(), equal_nan=True)
    return a == b or (isinstance(a, float) and not math.isfinite(a) and math.isnan(b))


def test_a_record_survives_json_without_its_images():
    original = record(
        (0.1, 0.7),
        identified=[NAN, 1.0],
        exact_leaks=torch.tensor([True, False]),
        matching_loss=math.inf,
        label_accuracy=NAN,
        pixels=torch.ones(2, 1, 8, 8),
        truth=torch.ones(2, 1, 8, 8),
        outcome=Outcome.NOT_APPLICABLE,
        reason="why",
        step=17,
    )
    text = json.dumps(original.to_dict(), allow_nan=False)
    restored = AuditRecord.from_dict(json.loads(text))
    for name, value in vars(replace(original, pixels=None, truth=None)).items():
        assert same(value, getattr(restored, name)), name
    assert "pixels" not in text
    assert restored.uncopied_leaks == original.uncopied_leaks == 1
    assert restored.valid == original.valid


@pytest.mark.parametrize(
    "damage",
    [
        lambda d: d.pop("exposure"),
        lambda d: d.pop("step"),
        lambda d: d.update(outcome="lucky"),
        lambda d: d.update(exposure="high"),
        lambda d: d.update(psnr=3.0),
        lambda d: d.update(exposure=-5),
        lambda d: d.update(chance_hits=None),
    ],
)
def test_a_damaged_record_is_refused(damage):
    values = record().to_dict()
    damage(values)
    with pytest.raises(InvalidInputError, match="record: "):
        AuditRecord.from_dict(values)


@pytest.mark.parametrize("engine", [None, PASSED, EngineCheck(passed=False, psnr={"a": NAN, "b": 3.0})], ids=str)
def test_evidence_survives_json_and_gives_the_same_verdict(engine):
    evidence = AuditHistory(
        records=clean(30), faults=[Fault(3, "broken")], engine=engine, step=31, lost=Losses(dropped=2),
        settings={"seed": "0"},
    )  # fmt: skip
    text = json.dumps(evidence.to_dict(), allow_nan=False)
    restored = AuditHistory.from_dict(json.loads(text))
    assert (restored.faults, restored.step, restored.dropped) == ([(3, "broken", False)], 31, 2)
    assert restored.run == evidence.run != AuditHistory().run
    assert restored.settings == {"seed": "0"}
    gate = RiskGate()
    before, after = evidence.verdict(gate), restored.verdict(gate)
    assert (after.status, after.images, after.newest_step) == (before.status, before.images, before.newest_step)
    assert (restored.engine is None) == (engine is None)


def test_evidence_without_an_engine_check_does_not_pass():
    assert AuditHistory(records=clean(40), step=41).verdict(RiskGate()).status is Status.UNKNOWN
    assert AuditHistory(records=clean(40), step=41, engine=PASSED).verdict(RiskGate()).status is Status.PASS


def test_evidence_keeps_what_a_forgetful_gate_would_leave_out():
    gate = RiskGate(window=30, memory="window")
    evidence = AuditHistory(records=clean(50), engine=PASSED, step=50)
    stamp = make_stamp(evidence, gate, weights=None, global_step=50)
    assert [r["step"] for r in stamp["evidence"]["records"]] == list(range(50))
    assert AuditHistory.from_dict(stamp["evidence"]).verdict(gate) == evidence.verdict(gate)


def test_evidence_of_the_first_version_is_read_and_does_not_pass():
    values = AuditHistory(records=clean(40), engine=PASSED, step=41).to_dict()
    old = {k: v for k, v in values.items() if k in ("records", "engine", "step", "settings")}
    restored = AuditHistory.from_dict(old | {"version": 1, "faults": [[3, "broken"]], "dropped": 0, "thinned": 0})
    assert len(restored.records) == 40
    assert restored.faults == [(3, "broken", False)]
    result = restored.verdict(RiskGate())
    assert result.status is Status.UNKNOWN
    assert "version 1" in str(result)


@pytest.mark.parametrize("values", [None, [], {}, {"version": 0}, {"version": "1"}])
def test_evidence_of_another_version_is_refused(values):
    with pytest.raises(InvalidInputError, match="version"):
        AuditHistory.from_dict(values)

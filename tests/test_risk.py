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
from lightning_gradaudit.audit import EngineCheck
from lightning_gradaudit.errors import InvalidInputError
from lightning_gradaudit.evidence import Evidence
from lightning_gradaudit.risk import clopper_pearson

PASSED = EngineCheck(passed=True, psnr={"InvertingGradients": 30.0})
NAN = math.nan


def record(exposure=(0.0,), *, identified=None, step=0, **changes) -> AuditRecord:
    """A clean audit of as many images as there are exposures, unless told otherwise."""
    named = torch.tensor([0.0] * len(exposure) if identified is None else identified)
    return audit_record(step, exposure, **({"identified": named, "chance_hits": 0.0, "chance_trials": 64} | changes))


def clean(images, *, batch=1, start=0):
    return [record((0.0,) * batch, step=start + i) for i in range(images // batch)]


def verdict(records, gate=None, **kwargs):
    return (gate or RiskGate()).verdict(records, **kwargs)


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
def test_images_count_and_not_audits(batch):
    result = verdict(clean(40, batch=batch))
    assert (result.status, result.images, result.audits) == (Status.PASS, 40, 40 // batch)


@pytest.mark.parametrize("others", [0, 28, 100])
def test_one_exposed_image_blocks_however_many_are_clean(others):
    result = verdict([record((0.31,)), *clean(others, start=1)])
    assert result.status is Status.BLOCK
    assert (result.risk, result.spoke) == (pytest.approx(0.31), "exposure")
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
    assert (result.status, result.spoke) == (Status.BLOCK, "identification")
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


def test_only_the_newest_images_count():
    old = [record((0.9,), step=i) for i in range(10)]
    assert verdict(old + clean(128, start=10)).status is Status.PASS
    assert verdict(old + clean(127, start=10)).status is Status.BLOCK


# Never PASS


@pytest.mark.parametrize(("failed", "status"), [(4, Status.PASS), (5, Status.UNKNOWN), (40, Status.UNKNOWN)])
def test_attacks_that_did_not_match_the_gradient_prove_nothing(failed, status):
    """Beyond a tail of such audits: there a weak attack, not a safe model, is why nothing was found."""
    records = [record((0.0,), step=i, gradient_similarity=0.2) for i in range(failed)] + clean(
        40 - failed, start=failed
    )
    result = verdict(records)
    assert result.status is status
    assert ("did not match the gradient" in str(result)) == (status is Status.UNKNOWN)


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
    "a failed engine check": (
        {},
        {"engine": EngineCheck(passed=False, psnr={"a": 3.0})},
        "engine check FAILED: a 3.0 dB",
    ),
    "an unfinished engine check": ({}, {"engine": None, "engine_required": True}, "engine check has not finished"),
    "a fault": ({}, {"faults": [(39, "the worker died")]}, "1 audits failed .*step 39: the worker died"),
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
    assert result.more_images is None  # more audits alone would not settle it
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
    records = [record((0.9,), self_test=0.5), *clean(40, start=1)]
    result = verdict(records)
    assert (result.status, result.images) == (Status.UNKNOWN, 40)


def test_faults_older_than_the_window_are_forgiven():
    records = clean(200)
    assert verdict(records, faults=[(3, "old")]).status is Status.PASS
    assert verdict(records, faults=[(150, "new")]).status is Status.UNKNOWN


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
    assert before.more_images is not None
    assert continued(records, before.more_images, gate).status is Status.PASS
    assert before.more_images == 1 or continued(records, before.more_images - 1, gate).status is Status.UNKNOWN


@pytest.mark.parametrize("gate", [RiskGate(max_risk=0.01), RiskGate(max_risk=0.0)], ids=["limit", "zero"])
def test_what_no_number_of_images_in_the_window_can_settle_is_not_announced(gate):
    records = clean(300)
    result = verdict(records, gate)
    assert result.status is Status.UNKNOWN
    assert result.more_images is None


# Arguments and plain data


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ({"max_risk": -0.1}, "max_risk"),
        ({"max_risk": 1.1}, "max_risk"),
        ({"max_risk": NAN}, "max_risk"),
        ({"tail": 0.0}, "tail"),
        ({"confidence": 0.3}, "confidence"),
        ({"confidence": 1.0}, "confidence"),
        ({"window": 0}, "window"),
        ({"window": 28}, "window"),
        ({"max_age": 0}, "max_age"),
        ({"statistic": "median"}, "statistic"),
    ],
)
def test_a_gate_refuses_settings_out_of_range_by_name(arguments, named):
    with pytest.raises(InvalidInputError, match=named):
        RiskGate(**arguments)


def test_a_gates_repr_rebuilds_it():
    gate = RiskGate(0.2, statistic="p90", max_age=7)
    assert vars(eval(repr(gate))) == vars(gate)


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
    ],
)
def test_a_damaged_record_is_refused(damage):
    values = record().to_dict()
    damage(values)
    with pytest.raises(InvalidInputError, match="record: not an audit record"):
        AuditRecord.from_dict(values)


@pytest.mark.parametrize("engine", [None, PASSED, EngineCheck(passed=False, psnr={"a": NAN, "b": 3.0})], ids=str)
def test_evidence_survives_json_and_gives_the_same_verdict(engine):
    evidence = Evidence(
        records=clean(30), faults=[(3, "broken")], engine=engine, step=31, dropped=2, settings={"seed": "0"}
    )
    text = json.dumps(evidence.to_dict(), allow_nan=False)
    restored = Evidence.from_dict(json.loads(text))
    assert (restored.faults, restored.step, restored.dropped) == ([(3, "broken")], 31, 2)
    assert restored.settings == {"seed": "0"}
    gate = RiskGate()
    before, after = evidence.verdict(gate), restored.verdict(gate)
    assert (after.status, after.images, after.newest_step) == (before.status, before.images, before.newest_step)
    assert (restored.engine is None) == (engine is None)


def test_evidence_without_an_engine_check_does_not_pass():
    assert Evidence(records=clean(40), step=41).verdict(RiskGate()).status is Status.UNKNOWN
    assert Evidence(records=clean(40), step=41, engine=PASSED).verdict(RiskGate()).status is Status.PASS


def test_evidence_of_a_gate_keeps_its_window_only():
    gate = RiskGate(window=30)
    evidence = Evidence(records=clean(50), engine=PASSED, step=50)
    kept = evidence.to_dict(gate=gate)["records"]
    assert [r["step"] for r in kept] == list(range(20, 50))
    assert Evidence.from_dict(evidence.to_dict(gate=gate)).verdict(gate) == evidence.verdict(gate)


@pytest.mark.parametrize("values", [None, [], {}, {"version": 0}, {"version": "1"}])
def test_evidence_of_another_version_is_refused(values):
    with pytest.raises(InvalidInputError, match="version"):
        Evidence.from_dict(values)

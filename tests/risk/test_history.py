"""What a stamp carries, and that no other stamp is taken for it: digests by hashlib alone."""

from __future__ import annotations

import hashlib
import json
import math

import pytest
import torch
from support import record

from lightning_gradaudit import Outcome, RiskGate, Status
from lightning_gradaudit.audit.engine_check import EngineCheck
from lightning_gradaudit.errors import InvalidInputError
from lightning_gradaudit.risk.checks import Fault, Losses
from lightning_gradaudit.risk.history import AuditHistory, check_stamp, make_stamp

GATE = RiskGate()
ENGINE = EngineCheck(True, {"attack": 40.0})


def evidence(**changes):
    fields = {"records": [record(i, (0.0,)) for i in range(30)], "engine": ENGINE, "step": 30, "run": "a run"}
    return AuditHistory(**(fields | changes))


def digest_of(values):
    text = json.dumps(values, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def sealed(stamp, **changes):
    """A stamp that was changed by somebody who computes its digest anew."""
    rest = {key: value for key, value in (stamp | changes).items() if key not in ("digest", "file")}
    return rest | {"digest": digest_of(rest)}


@pytest.mark.parametrize(
    "changes",
    [
        {"records": []},
        {"step": None},
        {"step": 5000},
        {"engine": None},
        {"engine": EngineCheck(False, {"attack": 3.0})},
        {"faults": [Fault(3, "why")]},
        {"lost": Losses(given_up=1)},
        {"damage": ["why"]},
    ],
    ids=str,
)
def test_every_part_of_the_evidence_reaches_the_gate(changes):
    assert evidence().verdict(GATE).status is Status.PASS
    assert evidence(**changes).verdict(GATE).status is Status.UNKNOWN
    required = evidence(**changes).verdict(GATE, engine_required=False)
    assert (required.status is Status.PASS) == (changes == {"engine": None})


def test_runs_have_names_of_their_own():
    assert len({AuditHistory().run for _ in range(20)}) == 20
    history = evidence(lost=Losses(dropped=3, skipped=5))
    assert (history.dropped, history.skipped) == (3, 5)


def test_the_most_exposed_images_are_those_an_attack_made_worst_first():
    nan = math.nan
    records = [
        record(3, (0.2, 0.9, nan), ids=("a", "b", "c"), identified=torch.tensor([0.0, 1.0, nan])),
        record(5, (0.5,), psnr=torch.tensor([21.0]), ssim=torch.tensor([0.25])),
        record(7, (1.0,), outcome=Outcome.NOT_APPLICABLE),
    ]
    shown = AuditHistory(records=records).most_exposed()
    assert [(each["step"], each["index"], each["id"]) for each in shown] == [(3, 1, "b"), (5, 0, ""), (3, 0, "a")]
    assert [each["exposure"] for each in shown] == pytest.approx([0.9, 0.5, 0.2])
    assert (shown[0]["identified"], shown[1]["identified"]) == (1.0, 0.0)
    assert (shown[1]["psnr"], shown[1]["ssim"]) == (21.0, 0.25)
    assert AuditHistory(records=records).most_exposed(1) == shown[:1]
    assert len(AuditHistory(records=[record(step, (0.5,) * 4) for step in range(4)]).most_exposed()) == 10


def test_evidence_is_written_and_read_whole():
    before = evidence(
        faults=[Fault(3, "why", True)], lost=Losses(dropped=1, runs=[(4, 4, 1)], given_up=2, skipped=3),
        settings={"seed": "0"}, damage=["torn"],
    )  # fmt: skip
    values = json.loads(json.dumps(before.to_dict()))
    after = AuditHistory.from_dict(values)
    for name in ("faults", "lost", "settings", "damage", "run", "step", "engine"):
        assert getattr(after, name) == getattr(before, name), name
    assert [r.step for r in after.records] == list(range(30))
    assert set(values) == {"version", *vars(before)}
    assert values["version"] == 2
    parts = {"records", "faults", "settings", "damage", "engine", "step"}
    without = AuditHistory.from_dict({key: value for key, value in values.items() if key not in parts})
    assert (without.records, without.faults, without.settings, without.damage) == ([], [], {}, [])
    assert (without.engine, without.step) == (None, None)


@pytest.mark.parametrize(
    "changes",
    [
        *({"version": v} for v in (None, True, "2", 0, 3)),
        *({"run": v} for v in ("", None, 3)),
        *({"lost": v} for v in (None, [], {"dropped": -1}, {"runs": [[5, 4, 1]]})),
        *({"records": v} for v in ([{}], [3], 3)),
        *({"faults": v} for v in ([[3]], [3], [["x", "why"]], [[3, "why", 1]], [[3, "why", True, 1]])),
        *({"engine": v} for v in ({}, 3, [], {"passed": True}, {"psnr": {}})),
        *({"damage": v} for v in ([3], [None], 3)),
        {"step": -1},
        {"settings": {"seed": 0}},
    ],
    ids=str,
)
def test_evidence_of_another_shape_is_refused(changes):
    with pytest.raises(InvalidInputError):
        AuditHistory.from_dict(evidence().to_dict() | changes)


@pytest.mark.parametrize("missing", ["version", "run", "lost"])
def test_evidence_without_its_identity_or_losses_is_refused(missing):
    values = evidence().to_dict()
    del values[missing]
    with pytest.raises(InvalidInputError):
        AuditHistory.from_dict(values)


def test_evidence_of_the_first_version_is_bound_to_no_run_and_keeps_what_was_lost():
    values = evidence(damage=["torn"]).to_dict()
    del values["lost"], values["run"]
    old = AuditHistory.from_dict(values | {"version": 1, "dropped": 0, "given_up": 4, "thinned": 5})
    assert (old.run, old.lost) == ("", Losses(given_up=4, skipped=5))
    assert len(old.damage) == 2
    assert old.damage[0] == "torn"
    assert AuditHistory.from_dict(values | {"version": 1, "run": "forged"}).run == ""


def test_a_stamp_binds_verdict_evidence_gate_weights_and_step():
    history = evidence()
    stamp = make_stamp(history, GATE, weights="abc", global_step=17)
    assert stamp["digest"] == digest_of({key: value for key, value in stamp.items() if key != "digest"})
    assert set(stamp) == {"version", "verdict", "evidence", "gate", "weights", "global_step", "digest"}
    assert (stamp["version"], stamp["weights"], stamp["global_step"]) == (2, "abc", 17)
    assert stamp["gate"] == GATE.settings()
    assert stamp["verdict"] == history.verdict(GATE).to_dict()
    for kept, audit in zip(stamp["evidence"]["records"], history.records, strict=True):
        assert kept == audit.to_dict() | {"leakage": None}
    read = check_stamp(json.loads(json.dumps(stamp)))
    assert (read.run, read.step, len(read.records)) == ("a run", 30, 30)
    assert read.verdict(GATE).status is Status.PASS
    assert check_stamp(stamp | {"file": "of the sidecar"}).run == "a run"


@pytest.mark.parametrize("key", ["version", "verdict", "gate", "weights", "global_step", "digest", "more"])
def test_a_stamp_that_was_changed_is_refused(key):
    stamp = make_stamp(evidence(), GATE, weights="abc", global_step=17)
    assert check_stamp(sealed(stamp)).run == "a run"
    with pytest.raises(InvalidInputError, match="stamp"):
        check_stamp(stamp | {key: "x"})
    stamp["evidence"]["records"].pop()
    with pytest.raises(InvalidInputError, match="digest"):
        check_stamp(stamp)


@pytest.mark.parametrize(
    "stamp",
    [None, [], "stamp", {}, {"evidence": None}, {"evidence": []}, {"evidence": {"version": 2}, "digest": None}],
    ids=str,
)
def test_what_is_no_stamp_is_refused(stamp):
    with pytest.raises(InvalidInputError, match="stamp"):
        check_stamp(stamp)


@pytest.mark.parametrize("version", [1, 3, None, "2"])
def test_a_stamp_of_another_version_is_refused_though_its_digest_fits(version):
    stamp = sealed(make_stamp(evidence(), GATE, weights="abc", global_step=17), version=version)
    with pytest.raises(InvalidInputError, match="version"):
        check_stamp(stamp)


@pytest.mark.parametrize("value", [{1, 2}, math.nan, torch.zeros(1)], ids=["set", "nan", "tensor"])
def test_a_stamp_of_more_than_plain_values_is_refused(value):
    with pytest.raises(InvalidInputError, match="JSON"):
        check_stamp(make_stamp(evidence(), GATE, weights="abc", global_step=17) | {"more": value})


def test_a_stamp_of_the_first_version_needs_no_digest_and_never_passes():
    values = evidence().to_dict()
    old = check_stamp({"evidence": values | {"version": 1}})
    assert old.run == ""
    assert old.verdict(GATE).status is Status.UNKNOWN

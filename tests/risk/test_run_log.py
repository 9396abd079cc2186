"""The log of a run: what was written is read back, and what was changed shows."""

from __future__ import annotations

import hashlib
import json

import pytest
import torch
from support import record

from lightning_gradaudit import RiskGate, Status
from lightning_gradaudit.audit.engine_check import EngineCheck
from lightning_gradaudit.errors import InvalidInputError
from lightning_gradaudit.risk.checks import Fault, Losses
from lightning_gradaudit.risk.history import AuditHistory
from lightning_gradaudit.risk.run_log import RunLog, evidence_from_events

GATE = RiskGate()
ENGINE = {"passed": True, "psnr": {"attack": 40.0}}


def session(folder, run="a run", *, steps=range(30), stood=30, known=None, settings=None):
    """Write one session as the callback does."""
    log = RunLog(folder)
    log.create()
    begun = AuditHistory(run=run, settings=settings or {}) if known is None else known
    log.begin(begun)
    log.append("engine", ENGINE)
    for step in steps:
        log.add_record(record(step, (0.0,)).to_dict(), None)
    log.append("step", {"step": stood, "lost": Losses().to_dict()})
    return log


def lines(log):
    return [json.loads(line) for line in log.records_path.read_text().splitlines()]


def rewrite(log, events):
    log.records_path.write_text("".join(json.dumps(event) + "\n" for event in events))


def canonical(values):
    return hashlib.sha256(json.dumps(values, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def test_a_session_is_read_back(tmp_path):
    log = session(tmp_path / "deep" / "audit", settings={"seed": "0"})
    log.append("fault", {"step": 3, "message": "why"})
    log.append("fault", {"step": 4, "message": "wired", "lasting": True})
    log.append("verdict", {"status": "PASS"})
    log.append("step", {"step": 31, "lost": {"dropped": 0, "given_up": 2}})
    found = RunLog(str(tmp_path / "deep" / "audit")).evidence()
    assert [r.step for r in found.records] == list(range(30))
    assert found.faults == [Fault(3, "why", False), Fault(4, "wired", True)]
    assert (found.run, found.step, found.settings) == ("a run", 31, {"seed": "0"})
    assert (found.engine, found.lost, found.damage) == (EngineCheck(**ENGINE), Losses(given_up=2), [])


def test_a_clean_session_passes_and_a_session_without_a_step_does_not(tmp_path):
    log = session(tmp_path)
    assert log.evidence().verdict(GATE).status is Status.PASS
    events = lines(log)
    rewrite(log, events[:-1])  # a killed run
    assert log.evidence().step is None
    assert log.evidence().verdict(GATE).status is Status.UNKNOWN


def test_each_line_carries_the_digest_of_itself_and_the_chain_before_it(tmp_path):
    log = session(tmp_path, steps=range(3))
    RunLog(tmp_path).append("fault", {"step": 3, "message": "why"})  # another process goes on
    session(tmp_path, "another run", steps=range(2))
    chain = ""
    for event in lines(log):
        chain = "" if event["kind"] == "run" else chain
        rest = {key: value for key, value in event.items() if key != "chain"}
        chain = hashlib.sha256(f"{chain}{canonical(rest)}".encode()).hexdigest()
        assert event["chain"] == chain
    assert log.evidence().damage == []


@pytest.mark.parametrize("what", ["changed", "removed", "moved", "repeated", "without a digest", "the last changed"])
def test_a_log_that_was_changed_does_not_pass(tmp_path, what):
    log = session(tmp_path)
    events = lines(log)
    if what == "changed":
        events[5]["seconds"] = 2.0
    elif what == "removed":
        del events[5]
    elif what == "moved":
        events[5], events[6] = events[6], events[5]
    elif what == "repeated":
        events.insert(5, events[4])
    elif what == "without a digest":
        events = [{key: value for key, value in event.items() if key != "chain"} for event in events]
    else:
        events[-1]["step"] = 31
    rewrite(log, events)
    found = log.evidence()
    assert len(found.damage) == 1
    assert found.verdict(GATE).status is Status.UNKNOWN


@pytest.mark.parametrize(
    "begin",
    [
        {"kind": "engine", **ENGINE},
        {"kind": "run"},
        {"kind": "run", "run": ""},
        {"kind": "run", "run": 3},
        {"run": "a run"},
    ],
    ids=str,
)
def test_a_log_that_names_no_run_is_bound_to_none(begin):
    records = [{"kind": "record"} | record(i, (0.0,)).to_dict() for i in range(30)]
    events = [begin, {"kind": "engine", **ENGINE}, *records, {"kind": "step", "step": 30}]
    found = evidence_from_events(events)
    assert (found.run, len(found.records), len(found.damage)) == ("", 30, 1)
    assert found.verdict(GATE).status is Status.UNKNOWN


def test_an_empty_log_is_no_evidence(tmp_path):
    RunLog(tmp_path).create()
    found = RunLog(tmp_path).evidence()
    assert (found.run, found.records, len(found.damage)) == ("", [], 1)
    with pytest.raises(InvalidInputError, match=r"records\.jsonl"):
        RunLog(tmp_path / "none").evidence()


def test_the_first_line_without_a_log_begins_a_chain(tmp_path):
    log = RunLog(tmp_path)
    log.append("fault", {"step": 3, "message": "why"})
    (event,) = lines(log)
    rest = {"kind": "fault", "step": 3, "message": "why"}
    assert event == rest | {"chain": hashlib.sha256(canonical(rest).encode()).hexdigest()}
    with pytest.raises(ValueError, match="JSON"):
        log.append("fault", {"step": float("nan")})


@pytest.mark.parametrize("torn", [b"", b'{"kind": "st', b"{"])
def test_a_line_that_a_crash_cut_off_is_removed_before_the_log_goes_on(tmp_path, torn):
    log = session(tmp_path)
    whole = log.records_path.read_bytes()
    log.records_path.write_bytes(whole + torn)
    RunLog(tmp_path).create()
    assert log.records_path.read_bytes() == whole
    log.records_path.write_bytes(torn)
    RunLog(tmp_path).create()
    assert log.records_path.read_bytes() == b""


def test_a_folder_that_cannot_be_written_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(InvalidInputError, match="dirpath"):
        RunLog(tmp_path / "file").create()


def test_a_picture_is_named_by_its_step(tmp_path):
    log = session(tmp_path, steps=[])
    for step in (7, 8):
        log.add_record(record(step, (0.0,)).to_dict(), torch.zeros(3, 4, 4))
    assert lines(log)[-1]["pairs"] == "images/step_00000008.png"
    assert [path.name for path in sorted((tmp_path / "images").iterdir())] == ["step_00000007.png", "step_00000008.png"]
    assert "pairs" not in lines(session(tmp_path / "other"))[-2]


# Several sessions


def test_the_newest_run_counts_and_each_of_its_sessions(tmp_path):
    session(tmp_path, "old", steps=range(5))
    session(tmp_path, "new", steps=range(3))
    session(tmp_path, "old", steps=range(7, 9))
    session(tmp_path, "new", steps=range(3, 6), stood=6)
    found = RunLog(tmp_path).evidence()
    assert (found.run, found.step) == ("new", 6)
    assert [r.step for r in found.records] == list(range(6))
    assert found.damage == []


def test_an_audit_that_a_resumed_session_repeats_counts_once(tmp_path):
    log = session(tmp_path, steps=range(4))
    session(tmp_path, known=log.evidence(), steps=[2, 3, 4, 4])
    assert [r.step for r in RunLog(tmp_path).evidence().records] == list(range(5))


@pytest.mark.parametrize("order", [(0.9, 0.0), (0.0, 0.9)], ids=str)
def test_no_other_line_of_a_step_takes_a_finding_back(tmp_path, order):
    log = session(tmp_path)
    for exposure in order:
        log.append("record", record(30, (exposure,)).to_dict())
    assert log.evidence().verdict(GATE).status is Status.BLOCK
    session(tmp_path)
    found = RunLog(tmp_path).evidence()
    assert found.verdict(GATE).status is Status.BLOCK, "the abandoned part of a resumed run counts"


def test_images_that_one_of_two_lines_of_a_step_identifies_are_identified(tmp_path):
    log = session(tmp_path)
    for named in (0.0, 1.0):
        line = record(30, (0.0,) * 60, identified=torch.full((60,), named), chance_hits=0.0)
        log.append("record", line.to_dict())
    assert log.evidence().verdict(GATE).status is Status.BLOCK


@pytest.mark.parametrize("changes", [{"rank": 1}, {"session": "b"}, {"digests": ("other",)}, {"step": 1}], ids=str)
def test_audits_of_other_processes_steps_or_images_are_others(tmp_path, changes):
    log = session(tmp_path, steps=[0])
    log.append("record", record(**({"step": 0, "exposure": (0.0,)} | changes)).to_dict())
    assert len(log.evidence().records) == 2


def test_faults_and_damage_of_abandoned_sessions_count_once(tmp_path):
    log = session(tmp_path, steps=range(3))
    log.append("fault", {"step": 1, "message": "first"})
    events = lines(log)
    events[1]["psnr"] = {"attack": 41.0}
    rewrite(log, events)
    later = session(tmp_path, steps=range(3, 6))
    for message in ("first", "second"):
        later.append("fault", {"step": 1, "message": message})
    found = later.evidence()
    assert sorted(fault.message for fault in found.faults) == ["first", "second"]
    assert len(found.damage) == 1
    assert len(found.records) == 6


def test_what_a_session_was_resumed_with_counts_but_not_its_age(tmp_path):
    known = AuditHistory(
        records=[record(9, (0.0,))], run="a run", step=10, engine=EngineCheck(**ENGINE), faults=[Fault(3, "why")],
        damage=["torn"],
    )  # fmt: skip
    log = RunLog(tmp_path)
    log.create()
    log.begin(known)
    found = log.evidence()
    assert ([r.step for r in found.records], found.faults, found.damage) == ([9], [Fault(3, "why")], ["torn"])
    assert (found.step, found.engine, found.run) == (None, EngineCheck(**ENGINE), "a run")


@pytest.mark.parametrize(
    "event",
    [
        {"kind": "fault", "step": 3},
        {"kind": "fault", "message": "why"},
        {"kind": "fault", "step": 3, "message": "why", "lasting": 1},
        {"kind": "engine", "passed": True},
        {"kind": "engine", "psnr": {}},
        {"kind": "step"},
        {"kind": "step", "step": -1},
        {"kind": "step", "step": 3, "lost": {"dropped": -1}},
        {"kind": "step", "step": 3, "lost": None},
        {"kind": "step", "step": 3, "dropped": -1},  # where the first version kept it
        {"kind": "record"},
        {"kind": "run", "run": "a run", "settings": {"seed": 0}},
        {"kind": "run", "run": "a run", "evidence": {}},
    ],
    ids=str,
)
def test_an_event_of_another_shape_is_refused(event):
    with pytest.raises(InvalidInputError):
        evidence_from_events([{"kind": "run", "run": "a run"}, event])


def test_each_of_many_sessions_counts_and_each_audit_of_theirs_once(tmp_path):
    for steps in ([0, 1], [1, 2, 8], [0, 3], [7, 8]):
        session(tmp_path, steps=steps)
    assert sorted(r.step for r in RunLog(tmp_path).evidence().records) == [0, 1, 2, 3, 7, 8]


@pytest.mark.parametrize("changed", [0, 1, 2])
def test_a_changed_line_of_any_session_is_damage(tmp_path, changed):
    for run in range(3):
        session(tmp_path, steps=[run])
    log = RunLog(tmp_path)
    events = lines(log)
    at = [i for i, event in enumerate(events) if event["kind"] == "record"][changed]
    events[at]["seconds"] = 2.0
    rewrite(log, events)
    assert len(log.evidence().damage) == 1


def test_of_sessions_without_a_name_the_newest_counts_alone():
    events = []
    for step in range(3):
        events += [{"kind": "run"}, {"kind": "record"} | record(step, (0.0,)).to_dict()]
    assert [r.step for r in evidence_from_events(events).records] == [2]

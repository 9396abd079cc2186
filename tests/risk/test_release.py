"""Which evidence belongs to a file, and that evidence of another file does not pass for it."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest
import torch
from support import record, run_folder

from lightning_gradaudit import RiskGate, Status
from lightning_gradaudit.audit.engine_check import EngineCheck
from lightning_gradaudit.errors import InvalidInputError
from lightning_gradaudit.risk import release
from lightning_gradaudit.risk.history import RECORDS_FILE, SIDECAR_SUFFIX, STAMP, AuditHistory, make_stamp
from lightning_gradaudit.risk.release import judge, read_evidence
from lightning_gradaudit.utils.digests import weights_digest

GATE = RiskGate()
STATE = {"layer.weight": torch.arange(6.0).reshape(2, 3), "layer.bias": torch.zeros(2)}


def evidence(*, leaky=False):
    records = [record(step, (0.9,) if leaky else (0.0,)) for step in range(30)]
    return AuditHistory(records=records, engine=EngineCheck(True, {"attack": 40.0}), step=30, run="a run")


def stamp(*, weights="of the state", step=30, leaky=False):
    bound = weights_digest(STATE) if weights == "of the state" else weights
    return make_stamp(evidence(leaky=leaky), GATE, weights=bound, global_step=step)


def save(folder, name="model.ckpt", **changes):
    path = folder / name
    values = {"state_dict": STATE, "global_step": 30, STAMP: stamp()} | changes
    torch.save({key: value for key, value in values.items() if value is not None}, path)
    return path


def put_beside(path, values=None, *, file=None):
    values = stamp(weights=None) if values is None else values
    digest = hashlib.sha256(path.read_bytes()).hexdigest() if file is None else file
    sidecar = Path(f"{path}{SIDECAR_SUFFIX}")
    sidecar.write_text(json.dumps(values | {"file": digest}))
    return sidecar


def status_of(path):
    return judge(path, GATE)[0].status


def test_a_stamped_checkpoint_passes_by_its_own_evidence(tmp_path):
    verdict, source = judge(save(tmp_path), GATE)
    assert (verdict.status, verdict.images) == (Status.PASS, 30)
    assert "model.ckpt" in source
    assert "model.ckpt" in judge(str(save(tmp_path)), GATE)[1]


@pytest.mark.parametrize(
    "changes",
    [
        {"state_dict": STATE | {"layer.bias": torch.ones(2)}},
        {"state_dict": STATE | {"more": torch.zeros(1)}},
        {"state_dict": {}},
        {"state_dict": None},
        {"state_dict": [1]},
        {"state_dict": {3: torch.zeros(1)}},
        {"state_dict": STATE | {3: torch.zeros(1)}},
        {"global_step": 31},
        {"global_step": None},
        {"global_step": 30.0},
        {"global_step": "30"},
    ],
    ids=str,
)
def test_a_stamp_passes_for_no_other_weights_and_no_other_step(tmp_path, changes):
    verdict, _ = judge(save(tmp_path, **changes), GATE)
    assert (verdict.status, verdict.images) == (Status.UNKNOWN, 30)


def test_a_stamp_passes_for_no_sparse_weights(tmp_path):
    assert status_of(save(tmp_path, state_dict=STATE | {"layer.bias": torch.zeros(2).to_sparse()})) is Status.UNKNOWN


@pytest.mark.parametrize("weights", [None, "0" * 64])
def test_a_stamp_that_names_no_weights_or_others_does_not_pass(tmp_path, weights):
    assert status_of(save(tmp_path, **{STAMP: stamp(weights=weights)})) is Status.UNKNOWN
    assert status_of(save(tmp_path, **{STAMP: stamp(weights=weights), "state_dict": None})) is Status.UNKNOWN


@pytest.mark.parametrize(("stamped", "stood"), [(True, True), (True, 1), (1, True), (None, 1), (None, None)])
def test_a_step_is_a_number(tmp_path, stamped, stood):
    assert status_of(save(tmp_path, **{STAMP: stamp(step=stamped)}, global_step=stood)) is Status.UNKNOWN
    assert status_of(save(tmp_path, **{STAMP: stamp(step=1)}, global_step=1)) is Status.PASS


def test_a_difference_of_weights_and_of_step_are_both_told(tmp_path):
    (bound,) = read_evidence(save(tmp_path, global_step=31, state_dict={"x": torch.zeros(1)}))
    assert len(bound.evidence.damage) == 2
    (bound,) = read_evidence(save(tmp_path))
    assert bound.evidence.damage == []


@pytest.mark.parametrize("value", [{}, [1], "stamp", {"evidence": {}}], ids=str)
def test_a_stamp_that_is_none_is_unknown(tmp_path, value):
    assert status_of(save(tmp_path, **{STAMP: value})) is Status.UNKNOWN


def test_a_stamp_of_the_first_version_is_read_and_does_not_pass(tmp_path):
    path = save(tmp_path, **{STAMP: {"evidence": evidence().to_dict() | {"version": 1}}})
    (bound,) = read_evidence(path)
    assert len(bound.evidence.damage) == 1
    assert status_of(path) is Status.UNKNOWN


def test_without_an_audit_there_is_no_verdict(tmp_path):
    path = save(tmp_path, **{STAMP: None})
    with pytest.raises(InvalidInputError, match="no audit"):
        read_evidence(path)
    verdict, source = judge(path, RiskGate(0.25))
    assert (verdict.status, verdict.limit, source) == (Status.UNKNOWN, 0.25, str(path))
    assert str(path) in str(verdict)
    for missing in (tmp_path / "none.ckpt", tmp_path / ("long" * 200)):
        assert judge(missing, GATE)[0].status is Status.UNKNOWN
        with pytest.raises(InvalidInputError, match="path"):
            read_evidence(missing)
    torch.save([1, 2], tmp_path / "list.ckpt")
    assert status_of(tmp_path / "list.ckpt") is Status.UNKNOWN


# Sidecars


@pytest.mark.parametrize("of_the_sidecar", [True, False])
def test_a_sidecar_is_bound_to_the_bytes_of_its_file(tmp_path, of_the_sidecar):
    path = save(tmp_path, **{STAMP: None})
    sidecar = put_beside(path)
    verdict, source = judge(sidecar if of_the_sidecar else path, GATE)
    assert verdict.status is Status.PASS
    assert "sidecar" in source
    put_beside(path, file="0" * 64)
    assert status_of(sidecar if of_the_sidecar else path) is Status.UNKNOWN
    put_beside(path)
    assert status_of(path) is Status.PASS
    save(tmp_path, **{STAMP: None}, global_step=31)
    assert status_of(path) is Status.UNKNOWN


def test_a_sidecar_vouches_for_a_file_that_cannot_be_read(tmp_path):
    path = tmp_path / "model.safetensors"
    path.write_bytes(b"no file of torch")
    with pytest.raises(InvalidInputError):
        read_evidence(path)
    put_beside(path)
    assert status_of(path) is Status.PASS
    put_beside(path, stamp())  # it names weights and a step, which nobody can compare
    (bound,) = read_evidence(path)
    assert len(bound.evidence.damage) == 2
    assert status_of(path) is Status.UNKNOWN


@pytest.mark.parametrize(
    ("changes", "status"),
    [({}, Status.PASS), ({"state_dict": {"x": torch.zeros(1)}}, Status.UNKNOWN), ({"global_step": 3}, Status.UNKNOWN)],
    ids=str,
)
def test_a_stamp_taken_out_of_a_checkpoint_stays_bound_to_its_weights(tmp_path, changes, status):
    path = save(tmp_path, **({STAMP: None} | changes))
    put_beside(path, stamp())
    assert status_of(path) is status


def test_a_sidecar_whose_weights_fit_is_bound_to_the_bytes_of_its_file_all_the_same(tmp_path):
    path = save(tmp_path, **{STAMP: None})
    put_beside(path, stamp(), file="0" * 64)
    assert status_of(path) is Status.UNKNOWN


@pytest.mark.parametrize("place", ["stamp", "sidecar", "sidecar with weights"])
def test_damage_of_the_evidence_stays_where_all_else_fits(tmp_path, place):
    damaged = evidence()
    damaged.damage.append("torn")
    weights = None if place == "sidecar" else weights_digest(STATE)
    values = make_stamp(damaged, GATE, weights=weights, global_step=30)
    path = save(tmp_path, **{STAMP: values if place == "stamp" else None})
    if place != "stamp":
        put_beside(path, values)
    (bound,) = read_evidence(path)
    assert bound.evidence.damage == ["torn"]
    assert status_of(path) is Status.UNKNOWN


@pytest.mark.parametrize("leaky", ["stamp", "sidecar"])
def test_of_two_stamps_the_stricter_counts(tmp_path, leaky):
    path = save(tmp_path, **{STAMP: stamp(leaky=leaky == "stamp")})
    put_beside(path, stamp(weights=None, leaky=leaky == "sidecar"))
    assert len(read_evidence(path)) == 2
    verdict, source = judge(path, GATE)
    assert verdict.status is Status.BLOCK
    assert leaky in source


def test_a_sidecar_that_cannot_be_read_is_no_missing_one(tmp_path):
    path = save(tmp_path)
    sidecar = Path(f"{path}{SIDECAR_SUFFIX}")
    sidecar.symlink_to(tmp_path / "gone")
    assert status_of(path) is Status.UNKNOWN
    sidecar.unlink()
    assert status_of(path) is Status.PASS
    sidecar.write_text("{}")
    assert status_of(path) is Status.UNKNOWN


# Folders


def clean():
    return [record(step, (0.0,)) for step in range(30)]


def test_a_run_folder_is_judged_by_its_log(tmp_path):
    folder = run_folder(tmp_path / "run", clean())
    for path in (folder, folder / RECORDS_FILE, str(folder)):
        assert status_of(path) is Status.PASS
    assert str(folder) in judge(folder, GATE)[1]
    assert status_of(tmp_path) is Status.UNKNOWN  # no log in it


def test_the_folder_of_ours_below_counts_and_of_two_the_stricter(tmp_path):
    run_folder(tmp_path / STAMP, clean())
    assert status_of(tmp_path) is Status.PASS
    assert len(read_evidence(tmp_path)) == 1
    run_folder(tmp_path, [record(0, (0.9,))])
    assert status_of(tmp_path) is Status.BLOCK
    assert len(read_evidence(tmp_path)) == 2
    (tmp_path / RECORDS_FILE).unlink()
    (tmp_path / RECORDS_FILE).symlink_to(tmp_path / "gone")
    assert status_of(tmp_path) is Status.UNKNOWN


def test_a_folder_may_bear_the_name_of_a_log(tmp_path):
    folder = run_folder(tmp_path / RECORDS_FILE, clean())
    assert status_of(folder) is Status.PASS


def test_an_error_that_nobody_expected_is_no_pass_and_no_traceback(tmp_path, monkeypatch):
    def break_down(*_, **__):
        raise RuntimeError("broken")

    monkeypatch.setattr(release, "read_evidence", break_down)
    verdict, source = judge(save(tmp_path), RiskGate(0.25))
    assert (verdict.status, verdict.limit, source) == (Status.UNKNOWN, 0.25, str(tmp_path / "model.ckpt"))
    assert "broken" in str(verdict)


class Foreign:
    """A class that only trusted files may name."""


def test_objects_in_a_checkpoint_are_read_only_where_the_file_is_trusted(tmp_path):
    path = save(tmp_path, callbacks=Foreign())
    assert status_of(path) is Status.UNKNOWN
    assert judge(path, GATE, trust=True)[0].status is Status.PASS
    assert len(read_evidence(path, trust=True)) == 1
    with pytest.raises(InvalidInputError):
        read_evidence(path)

"""The ceiling in an audit's record and in the gate."""

from __future__ import annotations

import pytest
import torch
from test_risk import clean, verdict

from lightning_gradaudit import Budget, RiskGate, audit_snapshot
from lightning_gradaudit.analysis import Analysis
from lightning_gradaudit.errors import InvalidInputError
from lightning_gradaudit.risk import Status

BUDGET = Budget(evaluations=5)


def test_the_ceiling_is_never_below_what_was_reached_or_is_given_away(snap):
    record = audit_snapshot(snap("mlp"), budget=BUDGET, analysis=Analysis(steps=5))
    assert record.ceiling.shape == record.exposure.shape
    assert bool((record.ceiling >= record.exposure.clamp(0, 1)).all())
    assert bool((record.ceiling <= 1).all())
    assert bool((record.ceiling[record.exact_leaks.bool()] == 1).all())


def test_without_analysis_there_is_no_ceiling(snap):
    assert audit_snapshot(snap("mlp"), budget=BUDGET).ceiling is None


def test_a_failed_analysis_leaves_the_audit_and_says_why(snap, monkeypatch):
    def fail(*args, **kwargs):
        raise RuntimeError("no memory left")

    monkeypatch.setattr("lightning_gradaudit.audit.analyse", fail)
    record = audit_snapshot(snap("mlp"), budget=BUDGET, analysis=True)
    assert record.ceiling is None
    assert "no memory left" in record.reason
    assert record.valid


@pytest.mark.parametrize(("ceiling", "status"), [(0.2, "PASS"), (0.8, "UNKNOWN"), (None, "UNKNOWN")])
def test_a_high_or_missing_ceiling_turns_pass_into_unknown(ceiling, status):
    from dataclasses import replace

    records = [replace(r, ceiling=None if ceiling is None else torch.tensor([ceiling])) for r in clean(40)]
    assert verdict(records).status is Status.PASS
    found = verdict(records, RiskGate(max_ceiling=0.5))
    assert found.status == Status(status)
    assert status == "PASS" or "ceiling" in " ".join(found.reasons)


def test_a_ceiling_outside_its_range_is_refused():
    with pytest.raises(InvalidInputError, match="max_ceiling"):
        RiskGate(max_ceiling=1.5)

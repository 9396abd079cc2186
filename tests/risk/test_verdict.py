"""Verdicts as plain data."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import fields

import pytest

from lightning_gradaudit import Status
from lightning_gradaudit.risk.verdict import Verdict


def test_a_verdict_without_evidence_bounds_nothing():
    verdict = Verdict.unknown("this", "that", limit=0.2, more_audits=7)
    assert all(math.isnan(v) for v in (verdict.risk, verdict.exposure, verdict.excess_identification, verdict.chance))
    assert verdict.to_dict() == {
        "status": "UNKNOWN", "risk": None, "low": 0.0, "high": 1.0, "limit": 0.2, "driver": "exposure",
        "exposure": None, "excess_identification": None, "chance": None, "images": 0, "audits": 0, "newest_step": None,
        "dropped_share": 0.0, "more_audits": 7, "reasons": ["this", "that"],
        "action": "make 7 more audits of new images", "basis": "", "proven_reconstruction": None,
        "proven_identification": None, "epsilon": None,
    }  # fmt: skip


def test_plain_data_holds_each_field_once_and_no_objects():
    plain = Verdict.unknown("this", limit=0.2).to_dict()
    assert list(plain) == [field.name for field in fields(Verdict)]
    assert (type(plain["status"]), type(plain["reasons"])) == (str, list)


@pytest.mark.parametrize(
    ("more", "says"), [(None, "train again"), (1, "make 1 more audit of"), (7, "make 7 more audits of")]
)
def test_an_unknown_of_a_gate_that_names_no_action_names_one(more, says):
    verdict = Verdict.unknown("this", limit=0.2, more_audits=more)
    assert verdict.action.startswith(says)
    assert f"To settle it: {says}" in str(verdict)
    assert Verdict.unknown("this", limit=0.2, more_audits=more, action="wait").action == "wait"
    assert dataclasses.replace(verdict, status=Status.BLOCK, action="").action == ""


def test_a_block_outweighs_an_unknown_and_an_unknown_a_pass():
    assert Status.BLOCK.strictness > Status.UNKNOWN.strictness > Status.PASS.strictness

"""The two legs of a verdict, on made-up evidence: what each may change, and what forged ledgers do."""

from __future__ import annotations

import math
import sys
from dataclasses import replace

import pytest
import torch
from support import record

from lightning_gradaudit import RiskGate, Status
from lightning_gradaudit.audit.engine_check import EngineCheck
from lightning_gradaudit.errors import InvalidInputError
from lightning_gradaudit.risk.checks import Fault
from lightning_gradaudit.risk.history import AuditHistory
from lightning_gradaudit.risk.privacy_bounds import Looks, whole_run
from lightning_gradaudit.risk.privacy_ledger import PrivacyLedger

pytest.importorskip("dp_accounting")
GATE = RiskGate(0.3)
NOISE = 12.0


def audit(at: int, *, exposure=(0.0,) * 16, **changes):
    values = {
        "digests": tuple(f"image {at}, {i}" for i in range(len(exposure))), "session": "s", "noise": NOISE,
        "declared_noise": NOISE, "threat_model": {"view": "update"}, "null_exposure": torch.zeros(len(exposure)),
    }  # fmt: skip
    return record(at, exposure, **(values | changes))


def history(records, *, noise=NOISE, steps=20, **changes) -> AuditHistory:
    ledger = PrivacyLedger(delta=1e-4, looks=[Looks(noise, 0.1, steps)])
    made = AuditHistory(records=list(records), engine=EngineCheck(passed=True, psnr={"attack": 40.0}), step=20)
    made.privacy = replace(ledger, **changes)
    return made


FEW = [audit(at) for at in range(5)]
MANY = [audit(k % 20, rank=k // 20, digests=tuple(f"{k}, {i}" for i in range(16))) for k in range(40)]


def test_the_legs_and_their_names():
    alone = history(MANY)
    alone.privacy = None
    assert (alone.verdict(GATE).status, alone.verdict(GATE).basis) == (Status.PASS, "demonstrated")
    both = history(MANY)
    assert (both.verdict(GATE).status, both.verdict(GATE).basis) == (Status.PASS, "both")
    proven = history(FEW).verdict(GATE)
    assert (proven.status, proven.basis) == (Status.PASS, "proven")
    assert proven.high <= 0.3
    assert proven.proven_identification == pytest.approx(whole_run([Looks(NOISE, 0.1, 20)]).excess(100))
    assert history(FEW[:1]).verdict(GATE).status is Status.UNKNOWN, "16 images leave the null unbounded"


def test_a_bound_above_the_limit_blocks_nothing():
    loud = [replace(each, noise=0.5, declared_noise=0.5) for each in MANY]
    verdict = history(loud, noise=0.5).verdict(GATE)
    assert (verdict.status, verdict.basis) == (Status.PASS, "demonstrated")
    assert verdict.proven_reconstruction > 0.1
    assert "not enough" in verdict.reasons[-1]


def test_what_was_demonstrated_blocks_whatever_is_proven():
    verdict = history([*FEW, audit(6, exposure=(0.9,))]).verdict(GATE)
    assert (verdict.status, verdict.basis) == (Status.BLOCK, "demonstrated")


def test_more_than_the_theorem_allows_is_unknown():
    named = [replace(each, identified=torch.ones(16)) for each in MANY]
    lenient = RiskGate(1.0)
    assert history(MANY).verdict(lenient).status is Status.PASS
    verdict = history(named).verdict(lenient)
    assert verdict.status is Status.UNKNOWN
    assert "does not describe this run: attacks name" in verdict.reasons[0]
    verdict = history(MANY, canaries=[(100, 100, 1000)]).verdict(GATE)
    assert verdict.status is Status.UNKNOWN
    assert "canaries demonstrate" in verdict.reasons[0]
    assert history(MANY, canaries=[(55, 100, 1000)]).verdict(GATE).status is Status.PASS


@pytest.mark.parametrize(
    ("made", "words"),
    [
        (history(FEW, faults=["wired wrongly"]), "wired wrongly"),
        (history(FEW, steps=10), "10 private steps"),
        (history(FEW, steps=30), "30 private steps"),
        (history(FEW, looks=[]), "No private step"),
        (history(FEW, looks=[Looks(NOISE, 0.0, 20)]), "No private step"),
        (history([]), "No audit has measured"),
        (history([replace(each, noise=1.0) for each in FEW]), "0.08 of the declared"),
        (history([replace(each, declared_noise=math.nan) for each in FEW]), "measured no noise"),
        (history(FEW, noise=24.0), "another noise multiplier"),
        (history([*FEW, audit(6, threat_model={"view": "local"})]), "before the mechanism"),
        (history([*FEW, audit(6, self_test=0.9)]), "invalid"),
        (replace(history(FEW), step=None), "stands at step None"),
        (replace(history(FEW), faults=[Fault(3, "no noise", lasting=True)]), "no noise"),
        (replace(history(FEW), damage=["other weights"]), "other weights"),
    ],
)
def test_what_is_missing_proves_nothing(made, words):
    verdict = made.verdict(GATE)
    assert verdict.status is Status.UNKNOWN
    assert math.isnan(verdict.proven_reconstruction)
    assert words in verdict.reasons[-1]


def test_without_the_accountant_nothing_is_proven(monkeypatch):
    monkeypatch.setitem(sys.modules, "dp_accounting.pld", None)
    verdict = history(FEW, looks=[Looks(NOISE, 0.0999, 20)]).verdict(GATE)
    assert verdict.status is Status.UNKNOWN
    assert "pip install" in verdict.reasons[-1]


def test_less_noise_than_declared_is_taken_off():
    quiet = [replace(each, noise=0.95 * NOISE) for each in FEW]
    lower, honest = history(quiet).verdict(GATE), history(FEW).verdict(GATE)
    assert lower.proven_identification > honest.proven_identification
    assert lower.epsilon > honest.epsilon


def test_guesses_that_reach_the_limit_weaken_the_proof():
    lucky = [replace(each, null_exposure=torch.tensor([0.5] * 4 + [0.0] * 12)) for each in FEW]
    verdict = history(lucky).verdict(GATE)
    assert verdict.status is Status.UNKNOWN
    assert verdict.proven_reconstruction > 0.25


@pytest.mark.parametrize(
    "forged",
    [
        {"delta": 0.0}, {"delta": math.nan}, {"delta": True}, {"looks": [[1.0, 0.1]]}, {"looks": [["1", 0.1, 3]]},
        {"looks": [[1.0, 1.5, 3]]}, {"looks": [[-1.0, 0.5, 3]]}, {"looks": [[1.0, 0.5, 0]]},
        {"looks": [[1.0, 0.5, 2.0]]},
        {"looks": [[1.0, 0.5, True]]}, {"looks": [[1.0, 0.5, 10**30]]}, {"looks": None}, {"faults": [1]},
        {"faults": ""},
        {"canaries": [[5, 4, 10]]}, {"canaries": [[1.0, 4, 10]]}, {"more": 1},
    ],
)  # fmt: skip
def test_a_ledger_with_impossible_values_is_refused(forged):
    honest = history(FEW).to_dict()
    assert AuditHistory.from_dict(honest).verdict(GATE) == history(FEW).verdict(GATE)
    with pytest.raises(InvalidInputError, match="privacy"):
        AuditHistory.from_dict(honest | {"privacy": honest["privacy"] | forged})
    for partial in ({}, "text", {"delta": 1e-5}):
        with pytest.raises(InvalidInputError, match="privacy"):
            AuditHistory.from_dict(honest | {"privacy": partial})

"""What an UNKNOWN says first, and the action that it names."""

from __future__ import annotations

import json
import threading

import pytest
import torch
from support import record

from lightning_gradaudit import Outcome, RiskGate, Status
from lightning_gradaudit.audit.engine_check import EngineCheck
from lightning_gradaudit.audit.self_test import PROCESS_RANDOMNESS
from lightning_gradaudit.risk.checks import Losses
from lightning_gradaudit.risk.release import judge
from lightning_gradaudit.utils.formatting import sentences

NAN = float("nan")
FAILED = EngineCheck(passed=False, psnr={"a": 3.0})


def clean(count, every=1, **changes):
    return [record(every * i, (0.0,), **changes) for i in range(count)]


ACTIONS = {
    "no audit, a short run": ([], {"step": 3}, "No audit has finished", "train for 29 steps or more"),
    "no audit, a long run": ([], {"step": 290}, "No audit has finished", "every_n_steps=10, which would have made 29"),
    "no audit, given up": ([], {"lost": Losses(given_up=2)}, "No audit", "final_wait_seconds=600"),
    "no audit, skipped": ([], {"lost": Losses(skipped=2)}, "No audit", "max_overhead=None"),
    "too few": (clean(12, 30), {"step": 340}, "Nothing above 0.30", "17 more audits of new images (every_n_steps=11 "),
    "one short": (clean(28), {"step": 28}, "Nothing above 0.30", "1 more audit of new images (train 1 steps longer)"),
    "self-test": (clean(40, self_test=0.5), {}, "40 of 40 audits are invalid", "loss="),
    "random numbers": (clean(40, self_test=0.5, reason=PROCESS_RANDOMNESS), {}, "40 of 40", "executor='process'"),
    "a broken attack": (clean(40, outcome=Outcome.NONFINITE), {}, "40 of 40 audits are invalid", "attack=None"),
    "engine check": (clean(40, evaluations=400), {"engine": FAILED}, "The engine check", "Budget(evaluations=1600)"),
    "engine check unfinished": (clean(40), {"engine": None}, "The engine check has not", "final_wait_seconds=600"),
    "inapplicable": (clean(40, outcome=Outcome.NOT_APPLICABLE), {}, "No attack applied", "attack=None"),
    "unmatched": (clean(40, gradient_similarity=0.1, evaluations=900), {}, "In 40 of 40", "Budget(evaluations=3600)"),
    "without labels": (clean(40, gradient_similarity=NAN), {}, "In 40 of 40", "labels_known=True"),
    "uncopied": (clean(40, exact_leaks=torch.tensor([True])), {}, "40 images are given away", "closed_forms=True"),
    "gallery": (clean(40, identified=torch.tensor([NAN]), gallery=12), {}, "Identification was not", "gallery="),
    "age": (clean(40), {"step": 5000}, "The newest valid audit is 4961 steps old", "every_n_steps=500"),
    "unknown age": (clean(40), {"step": None}, "The age of the newest", "judge the checkpoint"),
    "given up": (clean(40), {"lost": Losses(given_up=1)}, "1 audits were given up", "final_wait_seconds=600"),
    "late drops": (clean(40), {"lost": Losses(40, [(100, 400, 40)])}, "40 samples", "Budget(evaluations=50)"),
    "wiring": (clean(40), {"faults": [(0, "trains WITHOUT differential privacy", True)]}, "1 audits", "make_private"),
    "a fault": (clean(40), {"faults": [(7, "batch: resize it")]}, "1 audits failed", "the message of step 7"),
    "damage": (clean(40), {"damage": ["The log was changed."]}, "The log was changed.", "train again"),
    "no limit holds": (clean(40, chance_trials=0, chance_hits=0.0), {}, "Nothing above 0.00", "max_risk=0.08"),
}  # fmt: skip


def judged(records, changes):
    gate = RiskGate(0.0 if records and records[0].chance_trials == 0 else 0.3)
    engine = EngineCheck(passed=True, psnr={"a": 40.0})
    now = max((each.step for each in records), default=0) + 1
    return gate.verdict(records, **({"step": now, "engine": engine, "engine_required": True} | changes))


@pytest.mark.parametrize("case", ACTIONS)
def test_an_unknown_begins_with_what_decided_and_names_one_action_with_its_value(case):
    records, changes, first, action = ACTIONS[case]
    verdict = judged(records, changes)
    assert verdict.status is Status.UNKNOWN
    assert verdict.reasons[0].startswith(first)
    assert action in verdict.action
    assert str(verdict).endswith(f"To settle it: {verdict.action}.")
    assert json.loads(json.dumps(verdict.to_dict()))["action"] == verdict.action
    assert all(type(reason) is str for reason in verdict.reasons)


def test_the_most_fundamental_doubt_comes_first():
    doubts = {
        "damage": ["changed"],
        "faults": [(0, "wired wrongly", True)],
        "records": clean(12, self_test=0.5),
        "engine": FAILED,
        "step": 9000,
    }
    firsts = ["changed", "1 audits failed", "12 of 12 audits are invalid", "The engine check", "The newest", "Nothing"]
    taken = []
    for name, first in zip((*doubts, ""), firsts, strict=True):
        changes = {key: value for key, value in doubts.items() if key not in taken}
        verdict = judged(changes.pop("records", clean(12)), changes)
        assert verdict.reasons[0].startswith(first)
        taken.append(name)


def test_pass_and_block_have_no_action():
    passed, blocked = judged(clean(40), {}), judged([record(0, (0.9,))], {})
    assert (passed.status, passed.action) == (Status.PASS, "")
    assert (blocked.status, blocked.action) == (Status.BLOCK, "")
    assert "To settle" not in str(passed) + str(blocked)


def test_the_action_for_too_few_audits_would_have_made_them():
    """As many audits as a PASS takes, at the steps that the named schedule samples."""
    verdict = judged(clean(12, 30), {"step": 340})
    every = int(verdict.action.split("every_n_steps=")[1].split()[0])
    assert judged(clean(len(range(0, 340, every)), every), {"step": 340}).status is Status.PASS


def test_verdicts_of_older_versions_have_no_action():
    assert sentences({"status": "UNKNOWN", "reasons": ["Too few."]}) == "UNKNOWN: Too few."


def test_figures_beside_the_limit_show_the_difference():
    verdict = RiskGate(0.3).verdict([record(0, (0.3004,))], step=1)
    assert verdict.reasons[0] == "The worst exposure of audited images is 0.3004 (limit 0.3000)."


@pytest.mark.parametrize(
    ("name", "content", "action"),
    [("absent.ckpt", None, "give the path"), ("plain.ckpt", {"state_dict": {}}, "train it with GradAudit()")],
)
def test_what_cannot_be_read_has_an_action_too(tmp_path, name, content, action):
    if content is not None:
        torch.save(content, tmp_path / name)
    verdict, _ = judge(tmp_path / name, RiskGate())
    assert verdict.status is Status.UNKNOWN
    assert action in verdict.action


def test_a_thread_that_cannot_replay_process_randomness_says_so():
    import numpy as np

    from lightning_gradaudit import Budget
    from lightning_gradaudit.audit.engine import audit_snapshot
    from lightning_gradaudit.capture.loop import record_step

    class Step(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.net = torch.nn.Linear(16, 2)

        def training_step(self, batch, _):
            images, labels = batch
            scale = np.random.uniform(0.1, 3)
            return torch.nn.functional.cross_entropy(self.net(scale * images.flatten(1)), labels)

    module, batch = Step(), (torch.rand(1, 1, 4, 4), torch.tensor([1]))
    with record_step(module, batch, mean=0.0, std=1.0) as recorded:
        module.training_step(batch, 0).backward()
    found = []
    thread = threading.Thread(
        target=lambda: found.append(audit_snapshot(recorded.snapshot, budget=Budget(evaluations=2)))
    )
    thread.start()
    thread.join()
    assert not found[0].valid
    assert found[0].reason.startswith(PROCESS_RANDOMNESS)
    assert PROCESS_RANDOMNESS not in audit_snapshot(recorded.snapshot, budget=Budget(evaluations=2)).reason

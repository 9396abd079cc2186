"""The gate: nothing is released without a verdict, and the folder is always consistent."""

from __future__ import annotations

import inspect
import json
from dataclasses import replace
from datetime import timedelta
from pathlib import Path

import pytest
import torch
from pytorch_lightning.callbacks import ModelCheckpoint
from support import Classifier, HoldingExecutor, loader, record, trainer

from lightning_gradaudit import Budget, GradAudit, Limits, RiskGate, RiskGatedCheckpoint, Status
from lightning_gradaudit.audit.engine_check import EngineCheck
from lightning_gradaudit.callbacks.risk_gated_checkpoint import QUARANTINE
from lightning_gradaudit.cli.main import main
from lightning_gradaudit.errors import InvalidInputError
from lightning_gradaudit.risk.history import SIDECAR_SUFFIX
from lightning_gradaudit.risk.release import read_evidence

CLEAN = [record(0, (0.0,) * 8, rank=rank) for rank in range(32)]
CLEAN = [replace(each, digests=tuple(f"{rank}-{i}" for i in range(8))) for rank, each in enumerate(CLEAN)]
LEAKY = [*CLEAN, record(0, (0.9, 0.0), rank=40)]
BROKEN = [record(0, (0.0,) * 64, self_test=0.5)]
STALE = CLEAN


class Scripted(GradAudit):
    """An audit whose evidence follows a script: one entry for each epoch."""

    def __init__(self, tmp_path, *script) -> None:
        super().__init__(
            every_n_steps=1000,
            executor=HoldingExecutor(),
            limits=Limits(final_wait_seconds=0),
            dirpath=tmp_path / "audit",
            schedule=never,
        )
        self.script = script

    def on_train_epoch_start(self, trainer, pl_module):
        entry = self.script[min(trainer.current_epoch, len(self.script) - 1)]
        self.evidence.records = list(entry)
        self.evidence.engine = EngineCheck(True, {"attack": 40.0})


def never(step: int) -> bool:
    return False


class Scored(Classifier):
    """Logs a falling loss, so that every epoch is the best so far."""

    def on_train_epoch_end(self):
        self.log("score", 10.0 - self.current_epoch)


def files(folder: Path) -> set[str]:
    return {path.name for path in folder.glob("*.ckpt")}


def fit(tmp_path, audit, gate, **options):
    run = trainer(audit, gate, **({"max_epochs": len(audit.script)} | options))
    run.fit(Scored(), loader(8))
    return run


def gated(tmp_path, **options) -> RiskGatedCheckpoint:
    return RiskGatedCheckpoint(**({"dirpath": tmp_path / "ckpt", "filename": "{epoch}", "wait": 0.0} | options))


@pytest.mark.parametrize(
    ("script", "options", "status"),
    [
        ([], {}, Status.UNKNOWN),
        (BROKEN, {}, Status.UNKNOWN),
        (CLEAN[:2], {}, Status.UNKNOWN),
        (LEAKY, {}, Status.BLOCK),
        (STALE, {"gate": RiskGate(0.3, max_age=1)}, Status.UNKNOWN),
    ],
    ids=["no audit", "failed self-test", "too few", "leaky", "stale"],
)
def test_nothing_is_released_without_a_pass(tmp_path, script, options, status):
    gate = gated(tmp_path, save_last=True, **options)
    audit = Scripted(tmp_path, script)
    fit(tmp_path, audit, gate)
    assert gate.last_verdict.status is status
    assert files(tmp_path / "ckpt") == set()
    assert (gate.best_model_path, gate.last_model_path) == ("", "")


def test_a_pass_is_released_with_its_evidence(tmp_path):
    gate = gated(tmp_path)
    fit(tmp_path, Scripted(tmp_path, CLEAN), gate)
    assert files(tmp_path / "ckpt") == {"epoch=0.ckpt"}
    stamp = torch.load(gate.best_model_path, weights_only=True)["gradaudit"]
    assert stamp["verdict"]["status"] == "PASS"
    assert stamp["gate"] == gate.gate.settings()
    (bound,) = read_evidence(Path(gate.best_model_path))
    assert len(bound.evidence.records) == len(CLEAN)
    assert bound.evidence.step == 2  # of saving: eight images in batches of four
    assert main(["gate", gate.best_model_path, "--max-risk", "0.3"]) == 0


def test_a_decision_about_one_run_is_not_reused_for_another_that_ends_at_the_same_step(tmp_path):
    """The other way round Lightning itself skips the save: it remembers the step it saved last."""
    gate = gated(tmp_path)
    fit(tmp_path, Scripted(tmp_path, LEAKY), gate)
    assert files(tmp_path / "ckpt") == set()
    fit(tmp_path, Scripted(tmp_path, CLEAN), gate)
    assert gate.last_verdict.status is Status.PASS
    assert files(tmp_path / "ckpt") == {"epoch=0.ckpt"}


def test_unknown_can_be_allowed_but_a_block_cannot(tmp_path):
    gate = gated(tmp_path, on_unknown="allow", save_top_k=-1)
    fit(tmp_path, Scripted(tmp_path, [], LEAKY), gate)
    assert files(tmp_path / "ckpt") == {"epoch=0.ckpt"}


def test_a_refusal_keeps_the_previous_best_and_leaves_no_dangling_path(tmp_path):
    """A veto inside `_save_checkpoint` would come after the bookkeeping and lose the previous best."""
    gate = gated(tmp_path, monitor="score", save_last=True)
    fit(tmp_path, Scripted(tmp_path, CLEAN, LEAKY, []), gate)
    assert files(tmp_path / "ckpt") == {"epoch=0.ckpt", "last.ckpt"}
    assert Path(gate.best_model_path).is_file()
    assert Path(gate.best_model_path).name == "epoch=0.ckpt"
    assert Path(gate.last_model_path).is_file()
    assert all(Path(path).is_file() for path in gate.best_k_models)


def test_top_k_counts_released_checkpoints_only(tmp_path):
    gate = gated(tmp_path, monitor="score", save_top_k=2)
    fit(tmp_path, Scripted(tmp_path, CLEAN, CLEAN, LEAKY, CLEAN, []), gate)
    assert files(tmp_path / "ckpt") == {"epoch=1.ckpt", "epoch=3.ckpt"}
    assert Path(gate.best_model_path).name == "epoch=3.ckpt"


def test_quarantine_keeps_the_newest_refused_checkpoint_apart(tmp_path):
    gate = gated(tmp_path, policy="quarantine", monitor="score")
    fit(tmp_path, Scripted(tmp_path, CLEAN, LEAKY, LEAKY), gate)
    assert files(tmp_path / "ckpt") == {"epoch=0.ckpt"}
    assert files(tmp_path / "ckpt" / QUARANTINE) == {"epoch=2.ckpt"}
    kept = tmp_path / "ckpt" / QUARANTINE / "epoch=2.ckpt"
    assert main(["gate", str(kept), "--max-risk", "0.3"]) == 1


def test_weights_only_checkpoints_carry_their_stamp_beside_them(tmp_path):
    gate = gated(tmp_path, save_weights_only=True, monitor="score")
    fit(tmp_path, Scripted(tmp_path, CLEAN, CLEAN), gate)
    assert files(tmp_path / "ckpt") == {"epoch=1.ckpt"}
    sidecars = {path.name for path in (tmp_path / "ckpt").glob("*" + SIDECAR_SUFFIX)}
    assert sidecars == {"epoch=1.ckpt" + SIDECAR_SUFFIX}, "the stamp of a removed checkpoint goes with it"
    assert main(["gate", gate.best_model_path, "--max-risk", "0.3"]) == 0


class Unjudged(Scripted):
    """Its evidence cannot be judged by the gate of the checkpoint."""

    def verdict(self, gate=None):
        if gate is not None:
            raise OSError("the evidence is gone")
        return super().verdict()


def test_audits_that_cannot_be_judged_release_nothing_and_say_why(tmp_path):
    gate = gated(tmp_path, max_risk=0.25)
    fit(tmp_path, Unjudged(tmp_path, CLEAN), gate)
    assert files(tmp_path / "ckpt") == set()
    verdict = gate.last_verdict
    assert (verdict.status, verdict.limit) == (Status.UNKNOWN, 0.25)
    assert "the evidence is gone" in str(verdict)
    assert "strict=True" in verdict.action


@pytest.mark.parametrize("order", [1, -1])
def test_of_several_audits_the_strictest_decides_and_is_stamped_by_the_checkpoints_own_limit(tmp_path, order):
    """By their own limit of 0.3 both audits would pass."""
    mild = [*CLEAN, record(0, (0.2, 0.0), rank=40)]
    audits = [Scripted(tmp_path / name, script) for name, script in (("calm", CLEAN), ("mild", mild))][::order]
    audits[0].name = "another"
    gate = gated(tmp_path, max_risk=0.1, policy="quarantine")
    trainer(*audits, gate).fit(Scored(), loader(8))
    assert gate.last_verdict.status is Status.BLOCK
    assert files(tmp_path / "ckpt") == set()
    kept = torch.load(tmp_path / "ckpt" / QUARANTINE / "epoch=0.ckpt", weights_only=True)["gradaudit"]
    assert kept["verdict"]["status"] == "BLOCK"
    assert len(kept["evidence"]["records"]) == len(mild)


@pytest.mark.parametrize("weights_only", [True, False])
def test_a_stamp_that_cannot_be_made_leaves_a_checkpoint_that_cannot_pass(tmp_path, monkeypatch, weights_only):
    def fail(trainer, **kwargs):
        if not weights_only:
            raise OSError("no memory")
        return {"risk": float("nan")}  # no JSON

    gate = gated(tmp_path, save_weights_only=weights_only)
    monkeypatch.setattr(gate, "_stamp", fail)
    fit(tmp_path, Scripted(tmp_path, CLEAN), gate)
    assert files(tmp_path / "ckpt") == {"epoch=0.ckpt"}
    assert not list((tmp_path / "ckpt").glob("*" + SIDECAR_SUFFIX))
    assert weights_only or torch.load(gate.best_model_path, weights_only=True)["gradaudit"] == {}
    assert main(["gate", gate.best_model_path, "--max-risk", "0.3"]) == 2


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
@pytest.mark.parametrize("script", [[CLEAN], [LEAKY], [CLEAN, LEAKY]], ids=["clean", "leaky", "turned"])
def test_an_exception_in_training_leaves_a_consistent_folder(tmp_path, error, script):
    class Failing(Scored):
        def training_step(self, batch, batch_idx):
            if self.trainer.current_epoch == len(script) - 1 and batch_idx == 1:
                raise error("stop")
            return super().training_step(batch, batch_idx)

    gate = gated(tmp_path, monitor="score", save_last=True)
    if hasattr(ModelCheckpoint, "_should_save_on_exception"):
        gate.save_on_exception = True
    with pytest.raises((RuntimeError, KeyboardInterrupt, SystemExit)):
        trainer(Scripted(tmp_path, *script), gate, max_epochs=len(script)).fit(Failing(), loader(8))
    known = {gate.best_model_path, gate.last_model_path, *gate.best_k_models} - {""}
    assert all(Path(path).is_file() for path in known)
    for path in (tmp_path / "ckpt").glob("*.ckpt"):
        assert main(["gate", str(path), "--max-risk", "0.3"]) == 0, "whatever lies there was released by a PASS"


def test_the_gate_waits_for_unfinished_audits(tmp_path):
    audit = GradAudit(
        every_n_steps=1,
        budget=Budget(evaluations=100),
        executor="thread",
        dirpath=tmp_path / "audit",
        limits=Limits(queue_size=9),
    )
    gate = gated(tmp_path, max_risk=1.0, wait=60.0)  # nothing exceeds 1, so only the number of images is in question
    trainer(audit, gate).fit(Scored(), loader(16))
    assert gate.last_verdict.images == 16


def test_a_gate_without_an_audit_is_refused_at_once(tmp_path):
    with pytest.raises(InvalidInputError, match="GradAudit"):
        trainer(gated(tmp_path)).fit(Scored(), loader(8))


@pytest.mark.parametrize(
    "options", [{"max_risk": 1.5}, {"max_risk": -0.1}, {"on_unknown": "maybe"}, {"policy": "burn"}, {"wait": -1}]
)
def test_arguments_out_of_range_are_named(options):
    (name,) = options
    with pytest.raises(InvalidInputError, match=name):
        RiskGatedCheckpoint(**options)


def test_every_save_of_lightning_still_passes_the_two_gated_methods():
    """Pins the private names: a Lightning release that saves another way must break this and not a user."""
    for hook in ("on_train_batch_end", "on_train_epoch_end", "on_validation_end", "on_train_end"):
        if hook in vars(ModelCheckpoint):
            source = inspect.getsource(getattr(ModelCheckpoint, hook))
            assert "_save_checkpoint(" not in source.replace("_save_topk_checkpoint(", "").replace(
                "_save_last_checkpoint(", ""
            )
    for name in ("_save_topk_checkpoint", "_save_last_checkpoint", "_save_checkpoint", "_remove_checkpoint"):
        assert callable(getattr(ModelCheckpoint, name))


def test_the_decision_is_noted_in_the_run_folder(tmp_path):
    """One decision serves the best and the last checkpoint of a step."""
    fit(tmp_path, Scripted(tmp_path, CLEAN, LEAKY), gated(tmp_path, monitor="score", save_last=True))
    lines = [json.loads(line) for line in (tmp_path / "audit" / "records.jsonl").read_text().splitlines()]
    decisions = [line for line in lines if line["kind"] == "verdict"]
    assert [(d["checkpoint"], d["released"], d["status"]) for d in decisions] == [
        ("epoch=0.ckpt", True, "PASS"),
        ("epoch=1.ckpt", False, "BLOCK"),
    ]


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"filename": "{step}", "monitor": "score", "mode": "max", "save_last": True, "save_top_k": 3, "verbose": True},
        {"every_n_train_steps": 7, "save_weights_only": True, "save_last": "link"},
        {"train_time_interval": timedelta(minutes=3)},
        {"every_n_epochs": 5, "save_on_train_epoch_end": True},
    ],
    ids=lambda options: next(iter(options), "none"),
)
def test_options_of_lightnings_own_checkpoint_reach_it(tmp_path, options):
    """Its attributes are those of a plain one with the same options, and so are the defaults."""
    gated_one, plain = RiskGatedCheckpoint(dirpath=tmp_path, **options), ModelCheckpoint(dirpath=tmp_path, **options)
    assert {name: value for name, value in vars(gated_one).items() if name in vars(plain)} == vars(plain)
    assert gated_one.wait == 60


def test_limit_and_statistic_make_the_gate_and_a_gate_takes_their_place():
    checkpoint = RiskGatedCheckpoint(0.2, statistic="mean")
    assert checkpoint.gate.settings() == RiskGate(0.2, statistic="mean").settings()
    assert checkpoint.last_verdict is None
    gate = RiskGate(0.1)
    assert RiskGatedCheckpoint(0.2, gate=gate).gate is gate

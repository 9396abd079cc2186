"""Verdicts that were not earned: each was seen in a real fit, and each is what it should be now."""

from __future__ import annotations

import json
import math
import shutil
from dataclasses import dataclass, replace

import pytest
import torch
from pytorch_lightning.callbacks import ModelCheckpoint
from pytorch_lightning.loggers import CSVLogger
from support import Classifier, images_and_labels, record, trainer
from torch.utils.data import DataLoader, TensorDataset

from lightning_gradaudit import AtSteps, AuditSettings, Budget, GradAudit, Outcome, Reconstruction, RiskGate, Status
from lightning_gradaudit.attacks import Attack, LevenbergMarquardt, LinearLayerInversion
from lightning_gradaudit.audit.engine_check import EngineCheck
from lightning_gradaudit.cli.main import main
from lightning_gradaudit.risk.checks import Losses
from lightning_gradaudit.risk.history import AuditHistory
from lightning_gradaudit.risk.run_log import RunLog

GATE = RiskGate(0.3)


@dataclass(frozen=True, kw_only=True)
class Broken(Attack):
    """Recovers the built-in reference, and breaks on everything else."""

    how: str = "nan"

    def run(self, observation, *, budget, generator):
        if observation.shape[-1] == 16:  # the engine check's image
            return LevenbergMarquardt()(observation, budget=budget, generator=generator)
        if self.how == "exit":
            raise SystemExit(3)
        labels = torch.zeros(observation.batch_size, dtype=torch.long)
        images = torch.full(observation.shape, math.nan if self.how == "nan" else 0.5)
        return Reconstruction(
            inputs=images,
            labels=None if self.how == "no labels" else labels,
            matching_loss=0.1,
            evaluations=1,
            outcome=Outcome.CONVERGED,
        )


def data(count=64, *, batch_size=1):
    return DataLoader(TensorDataset(*images_and_labels(count)), batch_size=batch_size)


def audited(path, **options):
    gallery = images_and_labels(120, seed=5)[0]
    defaults = {
        "every_n_steps": 1, "executor": "inline", "budget": Budget(evaluations=200),
        "settings": AuditSettings(analysis=False, confirm=0), "gallery": gallery, "dirpath": path,
        "mean": 0.0, "std": 1.0,
    }  # fmt: skip
    return GradAudit(**(defaults | options))


def earned(audit, count=32, *, leaky=False):
    """Give an audit the evidence of so many clean audits, as if they had been made in this run."""
    audit.evidence.records = [
        record(0, (0.9,) if leaky else (0.0,), rank=i, digests=(f"image {i}",), session="s") for i in range(count)
    ]
    audit.evidence.engine = EngineCheck(passed=True, psnr={"attack": 40.0})


class Earned(GradAudit):
    """An audit that has earned a PASS before its first step."""

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if batch_idx == 0 and trainer.current_epoch == 0 and not self.evidence.records:
            earned(self)
            for each in self.evidence.records:
                self._publisher.run_log.append("record", each.to_dict())
            self._publisher.run_log.append("engine", self.evidence.engine.to_dict())


@pytest.mark.parametrize("how", ["nan", "no labels"])
def test_an_attack_that_breaks_is_no_evidence(tmp_path, how):
    audit = audited(tmp_path / "audit", attack=Broken(how=how))
    logger = CSVLogger(tmp_path, name="", version="")
    run = trainer(audit, logger=logger)
    run.fit(Classifier(dropout=0.0), data(35))
    assert audit.evidence.engine.passed
    assert len(audit.evidence.records) == 35
    assert not any(each.conclusive for each in audit.evidence.records)
    verdict = audit.verdict(GATE)
    assert (verdict.status, verdict.images) == (Status.UNKNOWN, 0)
    assert float(run.callback_metrics["gradaudit/risk"]) == 1.0
    header, *rows = [line.split(",") for line in (tmp_path / "metrics.csv").read_text().splitlines()]
    shown = {row[header.index("gradaudit/exposure")] for row in rows} - {""}
    assert shown <= {"nan"}


def test_a_fit_without_any_attack_publishes_no_low_risk(tmp_path):
    audit = audited(tmp_path, every_n_steps=8, attack=LinearLayerInversion())
    run = trainer(audit)
    run.fit(Classifier(), data(32, batch_size=2))
    assert [each.attacked for each in audit.evidence.records] == [False, False]
    assert all(bool(each.exposure.isnan().all()) for each in audit.evidence.records)
    assert float(run.callback_metrics["gradaudit/risk"]) == 1.0
    assert audit.verdict(GATE).status is not Status.PASS


def test_a_folder_used_twice_is_judged_by_its_newest_run(tmp_path, capsys):
    folder = tmp_path / "audit"
    first = Earned(dirpath=folder, schedule=AtSteps([]))
    trainer(first).fit(Classifier(), data(8))
    assert main(["gate", str(folder), "--max-risk", "0.3"]) == 0
    second = GradAudit(dirpath=folder, schedule=AtSteps([]))
    trainer(second).fit(Classifier(), data(8))
    capsys.readouterr()
    assert main(["gate", str(folder), "--max-risk", "0.3"]) == 2
    assert "No audit has finished" in capsys.readouterr().out
    assert second.evidence.run != first.evidence.run


def test_a_resumed_run_counts_each_audit_once(tmp_path):
    folder = tmp_path / "audit"
    saver = ModelCheckpoint(tmp_path / "ckpt", save_last=True)
    first = Earned(dirpath=folder, schedule=AtSteps([]))
    trainer(first, saver).fit(Classifier(), data(8))
    again = Earned(dirpath=folder, schedule=AtSteps([]))
    trainer(again, ModelCheckpoint(tmp_path / "ckpt", save_last=True), max_epochs=2).fit(
        Classifier(), data(8), ckpt_path=tmp_path / "ckpt" / "last.ckpt"
    )
    assert again.evidence.run == first.evidence.run
    evidence = RunLog(folder).evidence()
    assert len(evidence.records) == len(first.evidence.records) == 32
    assert evidence.verdict(GATE).status is Status.PASS
    assert evidence.step == 16


def test_a_fault_of_a_resumed_run_is_in_its_new_folder(tmp_path):
    folder = RunLog(tmp_path)
    folder.create()
    lost = Losses(given_up=1)
    folder.begin(AuditHistory(damage=["The audits of the resumed run cannot be read."], lost=lost, step=3))
    read = folder.evidence()
    assert (read.damage, read.lost) == (["The audits of the resumed run cannot be read."], lost)


def test_what_a_run_found_after_the_checkpoint_it_was_resumed_from_still_counts(tmp_path):
    folder = tmp_path / "audit"
    first = Earned(dirpath=folder, schedule=AtSteps([]))
    trainer(first, ModelCheckpoint(tmp_path / "ckpt", save_last=True)).fit(Classifier(), data(8))
    RunLog(folder).append("record", record(8, (0.9,), session="s").to_dict())
    again = Earned(dirpath=folder, schedule=AtSteps([]))
    trainer(again, ModelCheckpoint(tmp_path / "ckpt", save_last=True), max_epochs=2).fit(
        Classifier(), data(8), ckpt_path=tmp_path / "ckpt" / "last.ckpt"
    )
    assert RunLog(folder).evidence().verdict(GATE).status is Status.BLOCK


def test_a_plain_checkpoint_carries_the_step_of_saving(tmp_path, capsys):
    audit = Earned(dirpath=tmp_path / "audit", schedule=AtSteps([]))
    saver = ModelCheckpoint(tmp_path / "ckpt")
    trainer(audit, saver, max_epochs=5).fit(Classifier(), data(8))
    stamp = torch.load(saver.best_model_path, weights_only=True)["gradaudit"]
    assert stamp["evidence"]["step"] == 40
    assert main(["gate", saver.best_model_path, "--max-risk", "0.3"]) == 0
    capsys.readouterr()
    assert main(["gate", saver.best_model_path, "--max-risk", "0.3", "--max-age", "39"]) == 2
    assert "40 steps old" in capsys.readouterr().out


def test_the_folder_of_a_killed_run_has_no_age_and_does_not_pass(tmp_path, capsys):
    audit = Earned(dirpath=tmp_path / "audit", schedule=AtSteps([]))

    class Copying(Classifier):
        def on_train_batch_end(self, outputs, batch, batch_idx):
            if batch_idx == 4:
                shutil.copytree(tmp_path / "audit", tmp_path / "killed")

    trainer(audit).fit(Copying(), data(8))
    assert main(["gate", str(tmp_path / "audit"), "--max-risk", "0.3"]) == 0
    capsys.readouterr()
    assert main(["gate", str(tmp_path / "killed"), "--max-risk", "0.3"]) == 2
    assert "unknown" in capsys.readouterr().out


def test_other_weights_under_a_stamp_do_not_pass(tmp_path, capsys):
    audit = Earned(dirpath=tmp_path / "audit", schedule=AtSteps([]))
    saver = ModelCheckpoint(tmp_path / "ckpt")
    trainer(audit, saver).fit(Classifier(), data(8))
    checkpoint = torch.load(saver.best_model_path, weights_only=True)
    name = next(iter(checkpoint["state_dict"]))
    checkpoint["state_dict"][name] = checkpoint["state_dict"][name] + 1e-6
    torch.save(checkpoint, tmp_path / "other.ckpt")
    assert main(["gate", saver.best_model_path, "--max-risk", "0.3"]) == 0
    capsys.readouterr()
    assert main(["gate", str(tmp_path / "other.ckpt"), "--max-risk", "0.3"]) == 2
    assert "weights are not those" in capsys.readouterr().out


def test_one_image_audited_again_and_again_is_one_image(tmp_path):
    image, label = images_and_labels(1)
    same = DataLoader(TensorDataset(image.repeat(35, 1, 1, 1), label.repeat(35)), batch_size=1)
    audit = audited(tmp_path, attack=Broken(how="grey"))
    trainer(audit).fit(Classifier(dropout=0.0), same)
    assert len(audit.evidence.records) == 35
    digests = {each for one in audit.evidence.records for each in one.digests}
    assert len(digests) == 1
    # Were every attack a success without a finding, it would still be one image.
    audit.evidence.records = [
        replace(
            each,
            gradient_similarity=1.0,
            exposure=torch.zeros(1),
            identified=torch.zeros(1),
            exact_leaks=torch.zeros(1),
        )
        for each in audit.evidence.records
    ]
    verdict = audit.verdict(GATE)
    assert (verdict.status, verdict.images, verdict.audits) == (Status.UNKNOWN, 1, 1)


class Malformed(GradAudit):
    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.evidence.records = ["no record"]


def test_nothing_the_audit_does_raises_into_training(tmp_path):
    def schedule(step):
        raise ValueError("no such step")

    def fitted(*callbacks):
        torch.manual_seed(0)
        model = Classifier()
        run = trainer(*callbacks, ModelCheckpoint(tmp_path / "ckpt"))
        run.fit(model, data(8))
        return run.global_step, model.state_dict()

    def same(a, b):
        return a[0] == b[0] and all(torch.equal(a[1][name], value) for name, value in b[1].items())

    alone = fitted()
    asked = GradAudit(dirpath=tmp_path / "a", schedule=schedule)
    assert same(fitted(asked), alone)
    assert [fault.lasting for fault in asked.evidence.faults] == [True]
    exits = audited(tmp_path / "b", attack=Broken(how="exit"), every_n_steps=4)
    assert same(fitted(exits), alone)
    assert len(exits.evidence.faults) == 2
    malformed = Malformed(dirpath=tmp_path / "c", schedule=AtSteps([]))
    assert same(fitted(malformed), alone)
    for audit in (asked, exits):
        assert audit.verdict(GATE).status is Status.UNKNOWN


def test_the_last_line_of_a_killed_runs_log_is_cut_off_when_the_folder_is_used_again(tmp_path):
    folder = RunLog(tmp_path)
    folder.create()
    folder.append("step", {"step": 1})
    with folder.records_path.open("a") as file:
        file.write('{"kind": "rec')
    RunLog(tmp_path).create()
    assert [json.loads(line)["kind"] for line in folder.records_path.read_text().splitlines()] == ["step"]

"""`ServerCheck` in a Trainer: training stays as it was, and a finding reaches the verdict and the client."""

from __future__ import annotations

import copy

import pytest
import pytorch_lightning as pl
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_gradaudit import Budget, GradAudit, RiskGate, ServerCheck, Status
from lightning_gradaudit.attacks import Fishing
from lightning_gradaudit.errors import DishonestServerError, InvalidInputError
from lightning_gradaudit.risk.release import judge

SUSPICION = DishonestServerError.SIGN


class Classifier(pl.LightningModule):
    """BatchNorm and dropout, so that a forward pass too many would show."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(3)
        self.net = nn.Sequential(
            nn.Conv2d(1, 8, 3, stride=2), nn.BatchNorm2d(8), nn.ReLU(), nn.Dropout(0.2), nn.Flatten(),
            nn.Linear(8 * 12 * 12, 10),
        )  # fmt: skip
        self.losses = []

    def training_step(self, batch, batch_idx):
        loss = nn.functional.cross_entropy(self.net(batch[0]), batch[1])
        self.losses.append(loss.detach().clone())
        return loss

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.02, momentum=0.5)


class NewWeights(pl.Callback):
    """Write weights before a batch, as a client does that loads a round within a fit."""

    def __init__(self, at, state):
        self.at, self.state = at, state

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if batch_idx == self.at:
            pl_module.load_state_dict(self.state)


@pytest.fixture
def fit(faces, tmp_path):
    def run(module, *callbacks, steps=6):
        torch.manual_seed(0)
        loader = DataLoader(TensorDataset(faces[0], torch.arange(200) % 10), batch_size=16)
        trainer = pl.Trainer(
            max_steps=steps, max_epochs=1, callbacks=list(callbacks), logger=False, accelerator="cpu",
            enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
            default_root_dir=tmp_path,
        )  # fmt: skip
        trainer.fit(module, loader)
        return trainer

    return run


def fished():
    module = Classifier()
    changed = Fishing(target=3)(module)
    return {name: tensor.clone() for name, tensor in changed.state_dict().items()}


def test_training_is_bit_equal_with_and_without_it(fit):
    plain, checked = Classifier(), Classifier()
    check = ServerCheck(every_n_steps=2)
    fit(plain)
    fit(checked, check)
    assert [step for step, _ in check.reports] == [0, 2, 4]
    assert not any(report.findings for _, report in check.reports)
    assert len(check.history) == 3
    assert all(torch.equal(a, b) for a, b in zip(plain.losses, checked.losses, strict=True))
    after = checked.state_dict()
    assert all(torch.equal(tensor, after[name]) for name, tensor in plain.state_dict().items())


def test_a_warning_leaves_training_bit_equal_too(fit):
    plain, checked = Classifier(), Classifier()
    for module in (plain, checked):
        module.load_state_dict(fished())
    check = ServerCheck()
    fit(plain)
    fit(checked, check)
    ((_, report),) = check.reports
    assert report.findings
    assert check.history == []
    assert torch.equal(torch.stack(plain.losses), torch.stack(checked.losses))


def test_new_weights_within_a_fit_are_checked_at_once(fit):
    check = ServerCheck()
    fit(Classifier(), NewWeights(3, fished()), check)
    assert [(step, bool(report.findings)) for step, report in check.reports] == [(0, False), (3, True)]


def test_skip_makes_no_step_on_the_weights(fit):
    module = Classifier()
    sent = fished()
    trainer = fit(module, NewWeights(3, sent), ServerCheck(on_suspicion="skip"))
    assert len(module.losses) == trainer.global_step == 3
    assert all(torch.equal(tensor, sent[name]) for name, tensor in module.state_dict().items())


def test_skip_and_raise_before_the_first_step(fit):
    for on_suspicion in ("skip", "raise"):
        module = Classifier()
        module.load_state_dict(fished())
        before = copy.deepcopy(module.state_dict())
        check = ServerCheck(on_suspicion=on_suspicion)
        if on_suspicion == "raise":
            with pytest.raises(DishonestServerError, match=SUSPICION):
                fit(module, check)
        else:
            fit(module, check)
        assert module.losses == []
        assert all(torch.equal(tensor, before[name]) for name, tensor in module.state_dict().items())


def test_a_finding_makes_the_verdict_unknown_in_memory_folder_and_stamp(fit, tmp_path):
    module = Classifier()
    module.load_state_dict(fished())
    audit = GradAudit(every_n_steps=3, executor="inline", budget=Budget(evaluations=20), dirpath=tmp_path / "run")
    trainer = fit(module, audit, ServerCheck())
    trainer.save_checkpoint(tmp_path / "model.ckpt")
    gate = RiskGate(max_risk=1.0)
    for verdict in (
        audit.verdict(gate), judge(tmp_path / "run", gate)[0], judge(tmp_path / "model.ckpt", gate)[0],
    ):  # fmt: skip
        assert verdict.status is Status.UNKNOWN
        assert any(SUSPICION in reason for reason in verdict.reasons)


def test_a_check_that_fails_leaves_training_alone_and_the_verdict_unknown(fit, tmp_path, monkeypatch):
    def fail(*args, **kwargs):
        raise RuntimeError("no check here")

    monkeypatch.setattr("lightning_gradaudit.callbacks.server_check.check_server", fail)
    audit = GradAudit(every_n_steps=3, executor="inline", budget=Budget(evaluations=20), dirpath=tmp_path / "run")
    module = Classifier()
    fit(module, audit, ServerCheck(on_suspicion="raise"))
    assert len(module.losses) == 6
    assert any("no check here" in fault.message for fault in audit.evidence.faults)
    assert audit.verdict(RiskGate(max_risk=1.0)).status is not Status.PASS


def test_the_history_survives_a_checkpoint(fit):
    check = ServerCheck(every_n_steps=1)
    fit(Classifier(), check)
    other = ServerCheck()
    other.load_state_dict(check.state_dict())
    assert other.history == check.history
    other.load_state_dict({"history": [{"values": 3}]})
    assert other.history == check.history


@pytest.mark.parametrize("wrong", [{"on_suspicion": "stop"}, {"every_n_steps": 0}, {"false_alarm_rate": 1.0}])
def test_misuse_is_refused(wrong):
    with pytest.raises(InvalidInputError, match=next(iter(wrong))):
        ServerCheck(**wrong)

"""The same callback and gate in the Trainers of both packages that Lightning comes as."""

from __future__ import annotations

import lightning.pytorch
import pytest
import pytorch_lightning
import torch
from support import images_and_labels
from torch import nn
from torch.nn import functional as F  # noqa: N812
from torch.utils.data import DataLoader, TensorDataset

from lightning_gradaudit import Budget, GradAudit, RiskGatedCheckpoint, ThreatModel


def module_of(package):
    class Small(package.LightningModule):
        def __init__(self):
            super().__init__()
            self.net = nn.Sequential(nn.Flatten(), nn.Linear(144, 3))

        def training_step(self, batch, batch_idx):
            loss = F.cross_entropy(self.net(batch[0]), batch[1])
            self.log("train/loss", loss)
            return loss

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.05)

    return Small()


@pytest.mark.parametrize("package", [pytorch_lightning, lightning.pytorch], ids=lambda p: p.__name__)
@pytest.mark.parametrize("view", ["local", "step", "reduced", "update", "delta"])
def test_the_gradient_of_a_linear_model_in_closed_form(package, view, tmp_path):
    """Softmax regression: ∂ℓ/∂W = (p - y) xᵀ / B, so the oracle needs no autograd."""
    package.seed_everything(4, verbose=False)
    module = module_of(package)
    images, labels = images_and_labels(4)
    weight, bias = (p.detach().clone() for p in module.parameters())
    threat_model = ThreatModel(view=view, local_steps=1)
    audit = GradAudit(threat_model=threat_model, executor="inline", budget=Budget(evaluations=5), dirpath=tmp_path)
    kept = []
    submit = audit._make_auditor

    def keeping():
        auditor = submit()
        original = auditor.submit
        auditor.submit = lambda snapshot: kept.append(snapshot) or original(snapshot)
        return auditor

    audit._make_auditor = keeping
    gate = RiskGatedCheckpoint(dirpath=tmp_path / "checkpoints")
    run = package.Trainer(
        callbacks=[gate, audit],
        max_epochs=1,
        accelerator="cpu",
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    run.fit(module, DataLoader(TensorDataset(images, labels), batch_size=4))
    (snapshot,) = kept
    flat = images.flatten(1)
    delta = ((flat @ weight.T + bias).softmax(1) - F.one_hot(labels, 3)) / 4
    factor = -0.05 if view == "delta" else 1.0
    got = snapshot.observation.gradients
    assert torch.allclose(got["net.1.weight"], factor * delta.T @ flat, rtol=1e-5, atol=1e-7)
    assert torch.allclose(got["net.1.bias"], factor * delta.sum(0), rtol=1e-5, atol=1e-7)
    assert audit.evidence.faults == []
    assert [r.valid for r in audit.evidence.records] == [True]
    assert run.callbacks[-1] is gate, "checkpoints run last"
    assert len([c for c in run.callbacks if type(c).__name__.endswith("Checkpoint")]) == 1, (
        "it replaces the default one"
    )
    assert not list((tmp_path / "checkpoints").glob("*.ckpt")), "a linear model gives its images away"

"""Buffers as they leave a run, against the module's own after the same steps."""

from __future__ import annotations

import pytest
import pytorch_lightning as pl
import torch
from support import Classifier, HoldingExecutor, loader, trainer

from lightning_gradaudit import AtSteps, GradAudit, Limits, ThreatModel


class Watched(Classifier):
    """Keeps its buffers as they are after every batch, and what goes into its BatchNorm layer."""

    def __init__(self) -> None:
        super().__init__(dropout=0.0)
        self.after, self.seen = [], []
        self.net[1].register_forward_pre_hook(lambda _, args: self.seen.append(args[0].detach().clone()))

    def on_train_batch_end(self, *args):
        self.after.append({name: b.clone() for name, b in self.named_buffers()})

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=self.lr)


def fitted(tmp_path, threat_model, *, at=2):
    pl.seed_everything(3)
    module, executor = Watched(), HoldingExecutor()
    audit = GradAudit(
        gallery=torch.rand(20, 1, 12, 12), executor=executor, limits=Limits(queue_size=9, final_wait_seconds=0),
        threat_model=threat_model, schedule=AtSteps([at]), dirpath=tmp_path,
    )  # fmt: skip
    trainer(audit, max_steps=6).fit(module, loader(shuffle=False))
    (snapshot,) = executor.snapshots
    return module, snapshot


@pytest.mark.parametrize("steps", [1, 3])
def test_a_change_of_weights_brings_the_buffers_after_it(tmp_path, steps):
    module, snapshot = fitted(tmp_path, ThreatModel(view="delta", local_steps=steps))
    held = snapshot.observation.buffers_after
    last = module.after[snapshot.step + steps - 1]
    assert all(torch.equal(held[name], last[name]) for name in last)
    seen = module.seen[snapshot.step : snapshot.step + steps]
    weights = torch.tensor([0.9 ** (steps - 1 - k) for k in range(steps)])
    weights = weights / weights.sum()
    found = snapshot.observation.statistics["net.1"]
    mean = sum(w * x.mean((0, 2, 3)) for w, x in zip(weights, seen, strict=True))
    variance = sum(w * x.var((0, 2, 3)) for w, x in zip(weights, seen, strict=True))
    assert torch.allclose(found.mean, mean, rtol=1e-5, atol=1e-5)
    assert torch.allclose(found.variance, variance, rtol=1e-5, atol=1e-5)
    test = snapshot.self_test()
    assert test.error < 1e-3
    assert test.statistics < 1e-4
    assert snapshot.observation.threat_model.to_dict()["buffers_shared"]


@pytest.mark.parametrize("view", ["local", "step", "reduced", "update"])
def test_other_views_hold_them_when_they_are_told_to(tmp_path, view):
    _, without = fitted(tmp_path / "without", ThreatModel(view=view))
    assert without.observation.buffers_after is None
    module, snapshot = fitted(tmp_path / "with", ThreatModel(view=view, buffers_shared=True))
    held = snapshot.observation.buffers_after
    assert all(torch.equal(held[name], b) for name, b in module.after[snapshot.step].items())
    assert snapshot.self_test().statistics < 1e-5

"""Training with differential privacy by the real Opacus: what leaves is clipped and noised, and really so."""

from __future__ import annotations

import pytest
import pytorch_lightning as pl
import torch
from support import HoldingExecutor, images_and_labels, trainer
from torch import nn
from torch.nn import functional as F  # noqa: N812
from torch.utils.data import DataLoader, TensorDataset

from lightning_gradaudit import AtSteps, Budget, GradAudit, Limits, Status, ThreatModel

opacus = pytest.importorskip("opacus")

pytestmark = pytest.mark.filterwarnings(
    "ignore:Secure RNG turned off:UserWarning",
    "ignore:Full backward hook is firing:UserWarning",
    "ignore:Optimal order is the:UserWarning",
    "ignore:.*non-full backward hook.*:FutureWarning",
    "ignore:.*Expected_batch_size.*:UserWarning",
    "ignore:Trying to infer the `batch_size`:UserWarning",
    "ignore:Mean of empty slice:RuntimeWarning",
)
MAX_NORM, NOISE, SIZE = 0.3, 1.1, 8


class Private(pl.LightningModule):
    """As in Opacus' own Lightning example: the optimizer is made private in configure_optimizers."""

    poisson = False
    noise = NOISE
    miswired = False

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(
            nn.Conv2d(1, 6, 3, stride=2), nn.GroupNorm(2, 6), nn.Tanh(), nn.Flatten(), nn.Linear(150, 3)
        )

    def training_step(self, batch, batch_idx):
        loss = F.cross_entropy(self.net(batch[0]), batch[1]) if len(batch[0]) else self.net(batch[0]).sum()
        self.log("train/loss", loss)
        return loss

    def configure_optimizers(self):
        plain = torch.optim.SGD(self.parameters(), lr=0.05)
        self.trainer.fit_loop.setup_data()
        self.engine = opacus.PrivacyEngine()
        model, private, self.private_data = self.engine.make_private(
            module=self,
            optimizer=plain,
            data_loader=self.trainer.train_dataloader,
            noise_multiplier=self.noise,
            max_grad_norm=MAX_NORM,
            poisson_sampling=self.poisson,
        )
        self.dp = {"model": model}
        return plain if self.miswired else private


def data(count: int = 48) -> DataLoader:
    return DataLoader(TensorDataset(*images_and_labels(count)), batch_size=SIZE, shuffle=False)


class Watch(pl.Callback):
    """Keep what Opacus itself holds when its inner optimizer steps."""

    def __init__(self) -> None:
        self.seen: list[dict[str, dict[str, torch.Tensor]]] = []

    def on_train_start(self, run, module):
        def note(*_):
            self.seen.append(
                {
                    "update": {n: p.grad.clone() for n, p in module.named_parameters()},
                    "sum": {n: p.summed_grad.clone() for n, p in module.named_parameters()},
                    "weights": {n: p.detach().clone() for n, p in module.named_parameters()},
                }
            )

        run.optimizers[0].original_optimizer.register_step_pre_hook(note)


def audit_at(*steps: int, **options) -> GradAudit:
    defaults = {
        "schedule": AtSteps(steps),
        "executor": HoldingExecutor(),
        "limits": Limits(queue_size=99, final_wait_seconds=0),
    }
    return GradAudit(**(defaults | options))


def clipped_sum(weights, images, labels) -> dict[str, torch.Tensor]:
    """Per-sample gradients, clipped and summed, by hand."""
    reference = Private()
    reference.load_state_dict(weights)
    total = {n: torch.zeros_like(p) for n, p in reference.named_parameters()}
    for image, label in zip(images, labels, strict=True):
        loss = F.cross_entropy(reference.net(image[None]), label[None])
        sample = torch.autograd.grad(loss, list(reference.parameters()))
        norm = torch.cat([g.flatten() for g in sample]).norm()
        for name, g in zip(total, sample, strict=True):
            total[name] += g * min(1.0, MAX_NORM / float(norm))
    return total


def relative(got, expected) -> float:
    assert set(got) == set(expected)
    difference = torch.cat([(got[n] - expected[n]).flatten() for n in expected])
    return float(difference.norm() / torch.cat([g.flatten() for g in expected.values()]).norm())


@pytest.mark.parametrize("accumulate", [1, 2])
def test_the_update_is_opacus_own_privatised_gradient(tmp_path, accumulate):
    pl.seed_everything(1, verbose=False)
    watch, audit = Watch(), audit_at(2, dirpath=tmp_path)
    trainer(watch, audit, accumulate_grad_batches=accumulate).fit(Private(), data())
    assert audit.evidence.faults == []
    (snapshot,) = audit.executor.snapshots
    seen = watch.seen[2 // accumulate]
    assert snapshot.observation.threat_model.view == "update", "chosen from the run"
    assert relative(snapshot.observation.gradients, seen["update"]) < 1e-6
    assert relative(snapshot.observation.parameters, seen["weights"]) < 1e-6
    assert len(snapshot.truth.inputs) == SIZE * accumulate
    if accumulate == 1:
        by_hand = clipped_sum(seen["weights"], snapshot.truth.inputs, snapshot.truth.labels)
        assert relative({n: g * SIZE for n, g in snapshot.noiseless.items()}, by_hand) < 1e-5
    test = snapshot.self_test()
    assert test.error < 1e-5
    assert test.declared_noise == NOISE
    coordinates = sum(g.numel() for g in snapshot.noiseless.values())
    assert test.noise == pytest.approx(NOISE, rel=4 / (2 * coordinates) ** 0.5)
    assert test.defence_gap > 0.5


def test_the_raw_gradient_is_not_what_leaves(tmp_path, caplog):
    pl.seed_everything(1, verbose=False)
    raw = audit_at(2, view="local", name="raw")
    private = audit_at(2, threat_model=ThreatModel(labels_known=True), name="private")
    trainer(raw, private, default_root_dir=tmp_path).fit(Private(), data())
    (a,), (b,) = raw.executor.snapshots, private.executor.snapshots
    assert "view='local' is not what leaves under Opacus" in caplog.text
    assert a.self_test().error < 1e-5
    assert b.observation.threat_model.view == "update", "a threat model that names no view leaves it to the run"
    assert b.observation.labels is not None
    assert relative(a.observation.gradients, b.observation.gradients) > 0.5


def test_training_does_not_notice(tmp_path):
    def fit(*callbacks):
        pl.seed_everything(1, verbose=False)
        module = Private()
        trainer(*callbacks).fit(module, data())
        return [*module.state_dict().values(), torch.get_rng_state()]

    audit = audit_at(*range(6), dirpath=tmp_path)
    assert all(torch.equal(a, b) for a, b in zip(fit(audit), fit(), strict=True))
    assert len(audit.executor.snapshots) == 6


class Poisson(Private):
    poisson = True

    def train_dataloader(self):
        return getattr(self, "private_data", None) or data(16)


def test_empty_poisson_batches_are_no_fault(tmp_path):
    pl.seed_everything(1, verbose=False)
    loader = DataLoader(TensorDataset(*images_and_labels(12)), batch_size=1)
    private = opacus.data_loader.DPDataLoader.from_data_loader(loader, distributed=False)
    sizes = []

    class Counting(Poisson):
        def on_train_batch_start(self, batch, batch_idx):
            sizes.append(len(batch[0]))

        def train_dataloader(self):
            return private

    audit = audit_at(*range(99), dirpath=tmp_path)
    trainer(audit, max_epochs=2).fit(Counting())
    assert 0 in sizes, "the test needs an empty batch"
    assert audit.evidence.faults == []
    assert [len(s.truth.inputs) for s in audit.executor.snapshots] == [n for n in sizes if n]
    assert all(s.self_test().error < 1e-5 for s in audit.executor.snapshots)


def test_virtual_steps_are_one_update(tmp_path):
    """A batch too large for memory is split; only its last part lets the optimizer step."""

    class Split(Private):
        def train_dataloader(self):
            return data()

        def on_train_batch_start(self, batch, batch_idx):
            if batch_idx % 3 != 2:
                self.trainer.optimizers[0].signal_skip_step(do_skip=True)
            else:
                self.trainer.optimizers[0].signal_skip_step(do_skip=False)

    pl.seed_everything(1, verbose=False)
    watch, audit = Watch(), audit_at(1, dirpath=tmp_path)
    trainer(watch, audit).fit(Split())
    assert len(watch.seen) == 2
    (snapshot,) = audit.executor.snapshots
    assert relative(snapshot.observation.gradients, watch.seen[1]["update"]) < 1e-6
    assert len(snapshot.truth.inputs) == 3 * SIZE
    assert snapshot.self_test().error < 1e-5


class Miswired(Private):
    miswired = True


class Noiseless(Private):
    noise = 0.0


class Partial(Private):
    def configure_optimizers(self):
        private = super().configure_optimizers()
        private.param_groups[0]["params"] = private.param_groups[0]["params"][:2]
        return private


@pytest.mark.parametrize(
    ("kind", "words"),
    [(Miswired, "not its DPOptimizer"), (Noiseless, "noise_multiplier is 0"), (Partial, "not in Opacus' optimizer")],
)
def test_a_run_that_trains_without_privacy_is_called_out(tmp_path, caplog, kind, words):
    pl.seed_everything(1, verbose=False)
    audit = audit_at(dirpath=tmp_path)
    trainer(audit, max_steps=1).fit(kind(), data())
    ((_, fault, _),) = audit.evidence.faults
    assert words in fault
    assert "WITHOUT differential privacy" in fault
    assert "\n" not in fault
    assert fault in caplog.text
    assert audit.verdict().status is Status.UNKNOWN


def test_less_noise_than_declared_is_called_out(tmp_path):
    class Cheating(Private):
        def configure_optimizers(self):
            private = super().configure_optimizers()
            honest = private.add_noise

            def quieter():
                declared, private.noise_multiplier = private.noise_multiplier, 0.2
                honest()
                private.noise_multiplier = declared

            private.add_noise = quieter
            return private

    pl.seed_everything(1, verbose=False)
    audit = audit_at(1, executor="inline", dirpath=tmp_path, budget=Budget(evaluations=5))
    trainer(audit).fit(Cheating(), data())
    ((_, fault, _),) = audit.evidence.faults
    assert "declares a noise multiplier of 1.1" in fault
    assert float(fault.split("carries ")[1].split(":")[0]) == pytest.approx(0.2, rel=0.1)


def test_stepping_the_inner_optimizer_is_called_out(tmp_path):
    class Bypassed(Private):
        def optimizer_step(self, epoch, batch_idx, optimizer, optimizer_closure):
            optimizer_closure()
            optimizer.original_optimizer.step()

    pl.seed_everything(1, verbose=False)
    audit = audit_at(1, dirpath=tmp_path)
    trainer(audit).fit(Bypassed(), data())
    assert any("neither clipped nor noised" in text for _, text, _ in audit.evidence.faults)

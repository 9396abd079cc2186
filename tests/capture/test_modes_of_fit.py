"""What Lightning does around training: checks, tuners, resumption, interruption; and what is left behind."""

from __future__ import annotations

import tracemalloc

import pytest
import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import LearningRateFinder, ModelCheckpoint
from pytorch_lightning.tuner import Tuner
from support import Classifier, HoldingExecutor, images_and_labels, loader, trainer
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_gradaudit import AtSteps, Budget, GradAudit, Limits, ThreatModel
from lightning_gradaudit.capture.controller import Capture
from lightning_gradaudit.errors import InvalidInputError, UnsupportedError

VIEWS = ("local", "step", "reduced", "update", "delta")


def holding(view: str = "local", *, local_steps: int | None = None, **options) -> GradAudit:
    gallery = torch.rand(100, 1, 12, 12, generator=torch.Generator().manual_seed(0))
    limits, threat_model = Limits(queue_size=99, final_wait_seconds=0), ThreatModel(view=view, local_steps=local_steps)
    defaults = {"executor": HoldingExecutor(), "limits": limits, "threat_model": threat_model, "name": view}
    return GradAudit(gallery=gallery, **(defaults | options))


class Sgd(Classifier):
    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=self.lr)


class Validated(Classifier):
    def validation_step(self, batch, batch_idx):
        self.log("val/loss", nn.functional.cross_entropy(self(batch[0]), batch[1]))

    test_step = validation_step

    def predict_step(self, batch, batch_idx):
        return self(batch[0])


def footprint(module: nn.Module) -> dict:
    """Everything that hangs on a module and its parameters."""
    hooks = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    return {
        "attributes": [sorted(m.__dict__) for m in module.modules()],
        "hooks": [[len(getattr(m, kind)) for kind in hooks] for m in module.modules()],
        "on parameters": [
            (
                len(p._backward_hooks or ()),
                len(getattr(p, "_post_accumulate_grad_hooks", None) or ()),
                sorted(p.__dict__),
            )
            for p in module.parameters()
        ],
        "buffers": [name for name, _ in module.named_buffers()],
        "modes": [m.training for m in module.modules()],
    }


@pytest.mark.parametrize("view", VIEWS)
@pytest.mark.parametrize("ending", [None, RuntimeError, KeyboardInterrupt])
def test_the_users_module_is_left_as_it_would_be_without(view, ending, tmp_path):
    class Ending(Validated):
        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.1)

        def on_before_optimizer_step(self, optimizer):  # in the middle of every window
            if ending is not None and self.trainer.global_step == 3:
                raise ending("stop")

    def fit(*callbacks):
        pl.seed_everything(2, verbose=False)
        module = Ending()
        run = trainer(*callbacks)
        try:
            run.fit(module, loader(24), loader(8, shuffle=False))
        except (RuntimeError, SystemExit, KeyboardInterrupt):
            assert ending is not None
        hooks = [len(o._optimizer_step_pre_hooks) + len(o._optimizer_step_post_hooks) for o in run.optimizers]
        return footprint(module), module.state_dict(), torch.get_rng_state(), hooks

    audit = holding(view, schedule=AtSteps([3]), dirpath=tmp_path)
    (print_with, with_, rng_with, hooks_with), (print_without, without, rng_without, hooks) = fit(audit), fit()
    assert print_with == print_without
    assert all(torch.equal(with_[n], without[n]) for n in without)
    assert torch.equal(rng_with, rng_without)
    assert hooks_with == hooks
    assert audit._capture is not None
    assert audit._capture.recorder is None


@pytest.mark.parametrize("view", VIEWS)
def test_unsampled_steps_carry_no_hook_and_no_memory(view, tmp_path):
    counts, memory = [], []

    class Probing(Sgd):
        def training_step(self, batch, batch_idx):
            optimizer = self.trainer.optimizers[0]
            counts.append(
                sum(len(p._backward_hooks or ()) for p in self.parameters())
                + len(optimizer._optimizer_step_post_hooks)
                + len(optimizer._optimizer_step_pre_hooks)
            )
            if tracemalloc.is_tracing():
                ours = tracemalloc.take_snapshot().filter_traces(
                    [tracemalloc.Filter(inclusive=True, filename_pattern="*lightning_gradaudit*")]
                )
                memory.append(sum(trace.size for trace in ours.traces))
            return super().training_step(batch, batch_idx)

    audit = holding(view, schedule=AtSteps([4]), dirpath=tmp_path, local_steps=1)
    module = Probing()
    tracemalloc.start()
    trainer(audit).fit(module, loader(48))
    tracemalloc.stop()
    assert [n > 0 for n in counts] == [index == 4 and view not in {"reduced", "update"} for index in range(12)]
    assert len(audit.executor.snapshots) == 1
    unsampled = memory[1:4]
    assert max(unsampled) - min(unsampled) < 4096, "nothing piles up before a sampled step"
    after = memory[6:]
    assert max(after) - min(after) < 4096, "and nothing after it"


def test_no_tensor_is_held_on_unsampled_steps(tmp_path):
    """Tensors lie outside Python's allocator: count those alive that are as large as a parameter."""
    import gc

    alive = []

    class Counting(Sgd):
        def training_step(self, batch, batch_idx):
            sizes = {p.shape for p in self.parameters() if p.ndim > 1}
            alive.append(sum(1 for o in gc.get_objects() if type(o) is torch.Tensor and o.shape in sizes))
            return super().training_step(batch, batch_idx)

    def count(*callbacks):
        alive.clear()
        gc.collect()
        trainer(*callbacks).fit(Counting(), loader(24))
        return list(alive)

    audit = holding(schedule=AtSteps([5]), dirpath=tmp_path)
    with_, without = count(audit), count()
    assert [n - with_[1] for n in with_[1:5]] == [n - without[1] for n in without[1:5]]


def test_only_training_is_audited(tmp_path):
    audit = holding(every_n_steps=1, dirpath=tmp_path)
    run = trainer(audit, num_sanity_val_steps=2)
    module = Validated()
    run.fit(module, loader(16), loader(16, shuffle=False))
    assert [s.step for s in audit.executor.snapshots] == [0, 1, 2, 3]
    run.validate(module, loader(16, shuffle=False), verbose=False)
    run.test(module, loader(16, shuffle=False), verbose=False)
    run.predict(module, loader(16, shuffle=False))
    assert len(audit.executor.snapshots) == 4


def test_fast_dev_run_audits_and_writes_nothing(tmp_path):
    audit = holding(every_n_steps=1, dirpath=tmp_path / "none")
    trainer(audit, fast_dev_run=2, logger=True).fit(Classifier(), loader(16))
    assert len(audit.executor.snapshots) == 2
    assert not (tmp_path / "none").exists()


def test_tuners_are_not_audited(tmp_path):
    audit = holding(every_n_steps=1, dirpath=tmp_path)
    run = trainer(audit, default_root_dir=tmp_path, max_steps=3)
    module = Classifier()
    Tuner(run).lr_find(module, loader(64), min_lr=1e-4, max_lr=1e-2, num_training=8)
    assert audit.executor.snapshots == []
    run.fit(module, loader(64))
    assert len(audit.executor.snapshots) == 3


def test_a_learning_rate_finder_inside_fit_leaves_the_run_as_without(tmp_path):
    def fit(*callbacks):
        pl.seed_everything(4, verbose=False)
        module = Classifier()
        finder = LearningRateFinder(min_lr=1e-4, max_lr=1e-2, num_training_steps=8)
        trainer(*callbacks, finder, default_root_dir=tmp_path, max_steps=3).fit(module, loader(64))
        return module.state_dict()

    audit = holding(every_n_steps=1, dirpath=tmp_path / "audit")
    with_, without = fit(audit), fit()
    assert all(torch.equal(with_[n], without[n]) for n in without)
    assert audit.evidence.faults == []
    assert all(s.self_test().error < 1e-5 for s in audit.executor.snapshots)


@pytest.mark.filterwarnings(
    "ignore:Be aware that when using `ckpt_path`:UserWarning", "ignore:.*not resumable.*:UserWarning"
)
@pytest.mark.parametrize("view", VIEWS)
def test_a_run_resumed_in_the_middle_of_an_epoch(view, tmp_path):
    """The resumed run captures at the same steps the same gradients as the run that went through."""

    def run_of(*callbacks):
        pl.seed_everything(6, verbose=False)
        return trainer(*callbacks, default_root_dir=tmp_path, accumulate_grad_batches=2)

    images, labels = images_and_labels(4)  # every batch alike: a plain loader starts over when resumed
    data = DataLoader(TensorDataset(images.repeat(10, 1, 1, 1), labels.repeat(10)), batch_size=4)
    options = {"schedule": AtSteps([0, 6]), "local_steps": 1}
    whole = holding(view, dirpath=tmp_path / "whole", **options)
    every = ModelCheckpoint(tmp_path, "{step}", every_n_train_steps=2, save_top_k=-1)
    run_of(whole, every).fit(Sgd(dropout=0.0), data)

    second = holding(view, dirpath=tmp_path / "second", **options)
    run_of(second).fit(Sgd(dropout=0.0), data, ckpt_path=tmp_path / "step=2.ckpt", weights_only=False)
    expected, (got,) = whole.executor.snapshots[1], second.executor.snapshots
    assert got.step == expected.step
    for name, gradient in expected.observation.gradients.items():
        assert torch.allclose(got.observation.gradients[name], gradient, atol=1e-6)
    assert got.self_test().error < 1e-4
    assert second.evidence.step is not None


def test_a_step_that_overflows_is_not_an_update(tmp_path):
    from pytorch_lightning.plugins import MixedPrecision

    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)

    class Overflowing(Sgd):
        def training_step(self, batch, batch_idx):
            loss = super().training_step(batch, batch_idx)
            return loss * float("inf") if batch_idx == 1 else loss

    audit = holding("update", schedule=AtSteps([1, 3]), dirpath=tmp_path)
    trainer(audit, plugins=MixedPrecision("16-mixed", "cpu", scaler=scaler)).fit(Overflowing(), loader(24))
    assert audit.evidence.faults == []
    assert [s.step for s in audit.executor.snapshots] == [3]


def test_what_if_the_batch_were_smaller(tmp_path):
    """The record says so; the whole batch's gradient is what the self-test holds the replica against."""
    audit = GradAudit(
        threat_model=ThreatModel(batch_size=1),
        executor="inline",
        budget=Budget(evaluations=5),
        schedule=AtSteps([1]),
        dirpath=tmp_path,
    )
    keep = holding(schedule=AtSteps([1]), dirpath=tmp_path / "keep")
    trainer(audit, keep).fit(Classifier(), loader(16))
    (record,), (snapshot,) = audit.evidence.records, keep.executor.snapshots
    assert record.batch_size == 1
    assert record.threat_model["what_if_batch_size"] == 1
    assert record.valid
    one = snapshot.with_batch_size(1)
    assert one.observation.shape == (1, 1, 12, 12)
    client = Classifier()
    client.load_state_dict({**snapshot.observation.parameters, **snapshot.observation.buffers})
    torch.set_rng_state(snapshot.protocol.micro_batches[0].rng_state)
    loss = nn.functional.cross_entropy(client(snapshot.truth.inputs[:1]), snapshot.truth.labels[:1])
    for name, gradient in zip(one.observation.gradients, torch.autograd.grad(loss, client.parameters()), strict=True):
        assert torch.allclose(one.observation.gradients[name], gradient, atol=1e-6)
    with pytest.raises(InvalidInputError, match="captured one of 4 images"):
        snapshot.with_batch_size(5)
    with pytest.raises(InvalidInputError, match="view='local'"):
        ThreatModel(view="update", batch_size=1)


class _Strategy:
    pass


@pytest.mark.parametrize("name", ["DeepSpeedStrategy", "FSDPStrategy", "XLAStrategy"])
def test_strategies_that_hide_gradients_are_refused_at_setup(name):
    capture = Capture(loss=None, threat_model=ThreatModel())
    run = type("Run", (), {"strategy": type(name, (_Strategy,), {})(), "world_size": 2, "global_rank": 0})()
    with pytest.raises(UnsupportedError, match=rf"{name} is unsupported.*view='reduced'.*Snapshot.from_batch"):
        capture.check(run, Classifier())


def test_views_that_a_strategy_does_not_have_are_refused():
    from pytorch_lightning.strategies import ModelParallelStrategy

    run = type("Run", (), {"strategy": ModelParallelStrategy(), "world_size": 2, "global_rank": 0})()
    with pytest.raises(UnsupportedError, match="use view='reduced'"):
        Capture(loss=None, threat_model=ThreatModel()).check(run, Classifier())
    ddp = type("Run", (), {"strategy": type("DDPStrategy", (), {})(), "world_size": 2, "global_rank": 0})()
    with pytest.raises(UnsupportedError, match="this run has 2 processes"):
        Capture(loss=None, threat_model=ThreatModel(view="delta")).check(ddp, Classifier())


def test_delta_needs_an_optimizer_that_can_be_differentiated():
    class Lbfgs(Classifier):
        def configure_optimizers(self):
            return torch.optim.LBFGS(self.parameters())

    with pytest.raises(UnsupportedError, match="LBFGS"):
        trainer(holding("delta")).fit(Lbfgs(), loader(8))


def test_the_view_is_chosen_and_printed(caplog, tmp_path):
    with caplog.at_level("INFO", logger="pytorch_lightning"):
        audit = GradAudit(executor=HoldingExecutor(), limits=Limits(final_wait_seconds=0), dirpath=tmp_path)
        trainer(audit).fit(Classifier(), loader(8))
    assert "view='local'" in caplog.text

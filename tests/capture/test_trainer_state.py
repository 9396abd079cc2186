"""What `trainer_state` reads of a Trainer's private state, each fact against an independent observation of a fit."""

from __future__ import annotations

import pytest
import pytorch_lightning as pl
import torch
from pytorch_lightning.plugins import MixedPrecision
from support import Classifier, RecordingLogger, loader, trainer
from torch import nn

from lightning_gradaudit.capture import trainer_state

EPOCHS, BATCHES, EVERY, SCALE = 2, 5, 2, 2.0**6


class Sgd(Classifier):
    """Notes which losses were differentiated, before the loss scale and after it."""

    def configure_optimizers(self):
        self.scaled: list[float] = []
        return torch.optim.SGD(self.parameters(), lr=self.lr)

    def on_after_backward(self):
        self.log("metric", float(self.trainer.global_step))

    def backward(self, loss):
        self.scaled.append(float(loss.detach()))
        super().backward(loss)


class Watch(pl.Callback):
    """Count batches and optimizer steps by hand, beside what is read."""

    def __init__(self) -> None:
        self.batches = self.steps = self.batches_with_a_step = self.in_epoch = 0
        self.stepped = False
        self.rows: list[dict[str, object]] = []

    def on_train_start(self, run, module):
        run.optimizers[0].register_step_post_hook(lambda *_: self._note_step())

    def _note_step(self):
        self.steps += 1
        self.stepped = True

    def on_train_epoch_start(self, run, module):
        self.in_epoch = 0

    def on_train_batch_start(self, run, module, batch, batch_idx):
        self.stepped = False
        self.rows.append(
            {
                "logged step": (trainer_state.logged_step(run), self.batches_with_a_step),
                "batch": (trainer_state.batch_index(run), self.batches),
                "batch in epoch": (trainer_state.batch_index_in_epoch(run), self.in_epoch),
            }
        )

    def on_train_batch_end(self, run, module, outputs, batch, batch_idx):
        self.batches_with_a_step += self.stepped
        self.rows[-1]["ends a step"] = (trainer_state.ends_optimizer_step(run), self.stepped)
        self.batches += 1
        self.in_epoch += 1


def test_progress_is_what_was_counted_by_hand():
    watch, log = Watch(), RecordingLogger()
    run = trainer(watch, logger=log, max_epochs=EPOCHS, accumulate_grad_batches=EVERY)
    run.fit(Sgd(), loader(BATCHES * 4))
    assert len(watch.rows) == EPOCHS * BATCHES
    for row in watch.rows:
        assert {fact: read for fact, (read, _) in row.items()} == {fact: seen for fact, (_, seen) in row.items()}
    assert watch.steps == EPOCHS * 3, "the last batch of an epoch steps, too"
    assert {step for step, values in log.rows if "metric" in values} == set(range(watch.batches_with_a_step))


def test_with_two_optimizers_the_logged_step_counts_batches():
    class ByHand(Sgd):
        def __init__(self):
            super().__init__()
            self.automatic_optimization = False

        def configure_optimizers(self):
            return [torch.optim.SGD(self.parameters(), lr=0.01) for _ in range(2)]

        def training_step(self, batch, batch_idx):
            for optimizer in self.optimizers():
                optimizer.zero_grad()
                self.manual_backward(nn.functional.cross_entropy(self(batch[0]), batch[1]))
                optimizer.step()
            self.log("metric", float(batch_idx))

        def backward(self, loss, *args):
            loss.backward()

    steps, log = [], RecordingLogger()

    class Look(pl.Callback):
        def on_train_batch_start(self, run, *args):
            steps.append((trainer_state.logged_step(run), run.global_step))

    trainer(Look(), logger=log).fit(ByHand(), loader(12))
    assert steps == [(0, 0), (1, 2), (2, 4)]
    assert [step for step, values in log.rows if "metric" in values] == [0, 1, 2]


def test_the_live_callback_metrics_are_the_public_ones():
    seen = []

    class Look(pl.Callback):
        def on_train_batch_end(self, run, *args):
            trainer_state.live_callback_metrics(run)["mine"] = torch.tensor(7.0)
            seen.append((float(run.callback_metrics["mine"]), "train/loss" in run.callback_metrics))

    run = trainer(Look())
    run.fit(Sgd(), loader(8))
    assert seen == [(7.0, True)] * 2
    assert trainer_state.live_callback_metrics(run) is run.callback_metrics


def test_the_loss_scale_is_the_factor_between_the_loss_and_what_is_differentiated():
    scaler = torch.amp.GradScaler("cpu", init_scale=SCALE)
    scales = []

    class Look(pl.Callback):
        def on_after_backward(self, run, module):
            scales.append(float(trainer_state.loss_scale(run)))

    module = Sgd(dropout=0.0)
    run = trainer(Look(), plugins=MixedPrecision("16-mixed", "cpu", scaler=scaler))
    run.fit(module, loader(8, shuffle=False))
    assert scales == [SCALE] * 2
    assert module.scaled[1] / SCALE == pytest.approx(float(run.callback_metrics["train/loss"]), rel=1e-2)
    plain = trainer()
    plain.fit(Sgd(), loader(4))
    assert trainer_state.loss_scale(plain) is None


@pytest.mark.parametrize("fused", [False, True])
def test_an_optimizer_that_unscales_itself_takes_scaled_gradients(fused):
    weight = nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([weight], lr=1.0, fused=fused)
    assert trainer_state.unscales_itself(optimizer) is fused
    scaler = torch.amp.GradScaler("cpu", init_scale=SCALE)
    weight.grad = scaler.scale(torch.ones(1))
    given = []
    optimizer.register_step_pre_hook(lambda *_: given.append(float(weight.grad)))
    scaler.step(optimizer)
    assert given == [SCALE if fused else 1.0]
    assert float(weight.detach()) == -1.0, "either way the step is that of the gradient without its scale"


def test_opacus_tells_of_a_step_that_it_left_out():
    opacus = pytest.importorskip("opacus")
    module = nn.Linear(2, 1)
    optimizer = opacus.optimizers.DPOptimizer(
        torch.optim.SGD(module.parameters(), lr=1.0), noise_multiplier=0.0, max_grad_norm=1.0, expected_batch_size=1
    )
    before = module.weight.detach().clone()
    for skip in (True, False):
        for parameter in module.parameters():
            parameter.grad_sample = torch.ones(1, *parameter.shape)
        optimizer.signal_skip_step(do_skip=skip)
        optimizer.step()
        assert trainer_state.accumulates_virtually(optimizer) is skip
        assert torch.equal(module.weight, before) is skip
        optimizer.zero_grad()

"""The callback in a real Trainer: it sees the true gradient and leaves no trace."""

from __future__ import annotations

import copy
import logging
import pickle
import random

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import EarlyStopping, ModelCheckpoint
from support import (
    Classifier,
    HoldingExecutor,
    MeanSquares,
    RecordingLogger,
    images_and_labels,
    loader,
    record,
    trainer,
)
from torch import nn
from torch.nn import functional as F  # noqa: N812
from torch.utils.data import DataLoader, TensorDataset
from torchmetrics import MeanSquaredError

from lightning_gradaudit import (
    AtSteps,
    AuditSettings,
    Budget,
    GaussianNoise,
    GradAudit,
    Limits,
    Status,
    ThreatModel,
)
from lightning_gradaudit.callbacks.curves import CURVES
from lightning_gradaudit.callbacks.publisher import UNKNOWN_RISK
from lightning_gradaudit.errors import InvalidInputError, ReplayError, UnsupportedError
from lightning_gradaudit.risk.run_log import RunLog

HELD = Limits(queue_size=99, final_wait_seconds=0)


def quick(tmp_path, **options) -> GradAudit:
    defaults = {
        "every_n_steps": 4,
        "budget": Budget(evaluations=20),
        "executor": "inline",
        "dirpath": tmp_path / "audit",
    }
    return GradAudit(**(defaults | options))


def rng_states():
    return torch.get_rng_state(), np.random.get_state()[1].copy(), random.getstate()


def fit_50_steps(*callbacks):
    pl.seed_everything(3, verbose=False)
    module, log = Classifier(), RecordingLogger()
    run = trainer(*callbacks, max_steps=50, max_epochs=-1, logger=log)
    run.fit(module, loader(64))
    assert run.global_step == 50
    return module.state_dict(), copy.deepcopy(run.optimizers[0].state_dict()), rng_states(), log


@pytest.mark.parametrize("executor", ["inline", "thread", "process"])
def test_training_is_bit_equal_with_and_without_the_callback(tmp_path, executor):
    plain_weights, plain_optimizer, plain_rng, plain_log = fit_50_steps()
    audit = quick(tmp_path, executor=executor, limits=Limits(queue_size=16))
    weights, optimizer, rng, log = fit_50_steps(audit)

    assert len(audit.evidence.records) >= 10, "the audits must really have run"
    assert not audit.evidence.faults
    assert all(r.valid for r in audit.evidence.records), "dropout and BatchNorm are replayed exactly"
    assert all(torch.equal(plain_weights[k], weights[k]) for k in plain_weights)
    flat, flat_plain = (
        [v for s in state["state"].values() for v in s.values()] for state in (optimizer, plain_optimizer)
    )
    assert all(torch.equal(a, b) for a, b in zip(flat, flat_plain, strict=True))
    assert torch.equal(rng[0], plain_rng[0])
    assert (rng[1] == plain_rng[1]).all()
    assert rng[2] == plain_rng[2]
    assert log.of_the_user() == plain_log.of_the_user()


class Sgd(Classifier):
    """Without dropout and with an optimizer that does not amplify rounding, for a hand-written loop to follow."""

    def __init__(self) -> None:
        super().__init__(dropout=0.0)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.05)


def captured(tmp_path, module, data, *, steps, **options):
    """Fit with an executor that keeps the snapshots, and return them."""
    executor = HoldingExecutor()
    audit = quick(tmp_path, schedule=AtSteps(steps), executor=executor, limits=HELD)
    run = trainer(audit, **options)
    run.fit(module, data)
    assert not audit.evidence.faults
    return executor.snapshots


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"accumulate_grad_batches": 3},
        {"gradient_clip_val": 0.01},
        {"gradient_clip_val": 0.001, "gradient_clip_algorithm": "value"},
        {"accumulate_grad_batches": 2, "gradient_clip_val": 0.01},
    ],
    ids=str,
)
def test_the_captured_gradient_is_that_of_one_micro_batch_before_clipping(tmp_path, options):
    """The oracle is a hand-written loop with the same weights, batches and random numbers."""
    data = loader(40, shuffle=False)
    pl.seed_everything(5, verbose=False)
    module = Sgd()
    oracle = copy.deepcopy(module)
    snapshots = captured(tmp_path, module, data, steps=range(10), **options)
    assert len(snapshots) == 10

    optimizer = oracle.configure_optimizers()
    every = options.get("accumulate_grad_batches", 1)
    batches = list(data)
    for index, (images, labels) in enumerate(batches):
        local = torch.autograd.grad(F.cross_entropy(oracle.net(images), labels), list(oracle.parameters()))
        got = torch.cat([g.flatten() for g in snapshots[index].observation.gradients.values()])
        expected = torch.cat([g.flatten() for g in local])
        assert (got - expected).norm() <= 1e-6 * expected.norm()
        for parameter, gradient in zip(oracle.parameters(), local, strict=True):
            share = gradient / every
            parameter.grad = share if parameter.grad is None else parameter.grad + share
        if (index + 1) % every == 0 or index + 1 == len(batches):
            if "gradient_clip_val" in options:
                clip = options["gradient_clip_val"]
                if options.get("gradient_clip_algorithm") == "value":
                    nn.utils.clip_grad_value_(oracle.parameters(), clip)
                else:
                    nn.utils.clip_grad_norm_(oracle.parameters(), clip)
            optimizer.step()
            optimizer.zero_grad()
    weights = zip(module.state_dict().values(), oracle.state_dict().values(), strict=True)
    assert all(torch.allclose(a.float(), b.float(), atol=1e-6) for a, b in weights), "the oracle follows training"


def test_the_snapshot_holds_weights_and_buffers_of_the_forward_pass_and_the_augmented_batch(tmp_path):
    class Augmenting(Classifier):
        def on_after_batch_transfer(self, batch, dataloader_idx):
            images, labels = batch
            return images.flip(-1), labels

        def on_train_batch_start(self, batch, batch_idx):
            self.before = {k: v.clone() for k, v in self.state_dict().items()}

        def training_step(self, batch, batch_idx):
            batch[0].mul_(0.5)  # in place: the truth must have been copied before
            return super().training_step(batch, batch_idx)

        def on_train_batch_end(self, *args):
            self.__dict__.setdefault("captured", []).append(self.before)

    module, data = Augmenting(), loader(16, shuffle=False)
    first, second = captured(tmp_path, module, data, steps=[1, 3])
    for snapshot, index in ((first, 1), (second, 3)):
        for name, value in {**snapshot.observation.parameters, **snapshot.observation.buffers}.items():
            assert torch.equal(value, module.captured[index][name])
        assert torch.equal(snapshot.truth.inputs, list(data)[index][0].flip(-1))
        assert snapshot.self_test().error < 1e-5


@pytest.mark.parametrize("fault", ["mode", "weights", "images", "scale"])
def test_the_self_test_detects_a_wrong_ingredient(tmp_path, fault):
    from dataclasses import replace

    (snapshot,) = captured(tmp_path, Classifier(dropout=0.0), loader(16), steps=[2])
    observation = snapshot.observation
    assert snapshot.self_test().error < 1e-5
    if fault == "mode":
        observation.client.module.eval()
    elif fault == "weights":
        moved = {k: p - 0.05 * observation.gradients.get(k, 0) for k, p in observation.parameters.items()}
        snapshot = replace(snapshot, observation=replace(observation, parameters=moved))
    elif fault == "images":
        snapshot = replace(snapshot, truth=replace(snapshot.truth, inputs=snapshot.truth.inputs.flip(-1)))
    else:
        halved = {k: g / 2 for k, g in observation.gradients.items()}
        snapshot = replace(snapshot, observation=replace(observation, gradients=halved))
    assert snapshot.self_test().error > 1e-3


@pytest.mark.parametrize("precision", ["bf16-mixed", "64-true"])
def test_other_precisions_pass_the_self_test(tmp_path, precision):
    if precision == "64-true":
        images, labels = images_and_labels(16)
        data = DataLoader(TensorDataset(images.double(), labels), batch_size=4)
    else:
        data = loader(16)
    audit = quick(tmp_path, every_n_steps=2)
    trainer(audit, precision=precision).fit(Classifier(), data)
    assert len(audit.evidence.records) == 2
    assert all(r.valid for r in audit.evidence.records)


def test_unsampled_steps_carry_no_hook(tmp_path):
    counts = []

    class Counting(Classifier):
        def training_step(self, batch, batch_idx):
            counts.append(sum(len(p._backward_hooks or ()) for p in self.parameters()))
            return super().training_step(batch, batch_idx)

    audit = quick(tmp_path, schedule=AtSteps([1, 3]), executor=HoldingExecutor(), limits=HELD)
    module = Counting()
    trainer(audit).fit(module, loader(24))
    parameters = len(list(module.parameters()))
    assert counts == [0, parameters, 0, parameters, 0, 0]
    assert sum(len(p._backward_hooks or ()) for p in module.parameters()) == 0


def test_every_curve_is_logged_at_the_step_of_capture_even_when_results_come_late(tmp_path):
    log = RecordingLogger()
    audit = quick(tmp_path, executor="thread", limits=Limits(queue_size=9))
    trainer(audit, logger=log).fit(Classifier(), loader(48))
    rows = log.of_the_audit()
    assert [step for step, _ in rows] == [0, 4, 8]
    layers = [f"layer/net.{index}" for index in (0, 1, 5)]  # convolution, BatchNorm, head
    assert all(set(values) == {f"gradaudit/{key}" for key in (*CURVES, *layers)} for _, values in rows)
    assert all(sum(values[f"gradaudit/{layer}"] for layer in layers) == pytest.approx(1) for _, values in rows)
    assert all(0 <= values["gradaudit/exposure"] <= values["gradaudit/ceiling"] <= 1 for _, values in rows)
    assert all(values["gradaudit/lag_steps"] >= 0 for _, values in rows)


def test_callback_metrics_carry_risk_and_age_for_other_callbacks(tmp_path):
    seen = []

    class Watch(pl.Callback):
        def on_train_batch_end(self, run, *args):
            seen.append([float(run.callback_metrics[f"gradaudit/{key}"]) for key in ("risk", "age_steps")])

    audit = quick(tmp_path, executor=HoldingExecutor(), limits=HELD)
    trainer(audit, Watch()).fit(Classifier(), loader(16))
    assert all(risk == UNKNOWN_RISK for risk, _ in seen), "unknown counts as the worst"

    seen.clear()
    audit = quick(tmp_path, schedule=AtSteps([0]))
    monitor = ModelCheckpoint(tmp_path, monitor="gradaudit/risk", save_on_train_epoch_end=True)
    stop = EarlyStopping("gradaudit/risk", check_on_train_epoch_end=True)
    run = trainer(audit, monitor, stop, Watch())
    run.fit(Classifier(), loader(16))
    assert [age for _, age in seen] == [0, 1, 2, 3]
    assert float(monitor.best_model_score) == pytest.approx(audit.verdict().risk)


def test_a_full_queue_drops_and_counts_and_never_waits(tmp_path):
    audit = quick(
        tmp_path, every_n_steps=1, executor=HoldingExecutor(), limits=Limits(queue_size=2, final_wait_seconds=0)
    )
    trainer(audit).fit(Classifier(), loader(40))
    assert audit.evidence.dropped == 8, "eight found the queue full"
    assert audit.evidence.lost.given_up == 2, "two were unfinished at the end"
    assert audit.evidence.lost.runs == [(2, 9, 8)]
    assert audit.verdict().status is Status.UNKNOWN


def test_a_gradient_with_nan_is_dropped_and_counted_and_training_goes_on(tmp_path):
    class Poisoned(Classifier):
        def training_step(self, batch, batch_idx):
            loss = super().training_step(batch, batch_idx)
            return loss * float("nan") if batch_idx == 2 else loss

    audit = quick(tmp_path, schedule=AtSteps([2]))
    run = trainer(audit, max_steps=3)
    run.fit(Poisoned(), loader(24))
    assert run.global_step == 3
    assert (audit.evidence.dropped, audit.evidence.faults, audit.evidence.records) == (1, [], [])


def test_a_fault_is_counted_logged_once_and_turns_the_verdict_unknown(tmp_path, caplog):
    audit = quick(tmp_path)
    with caplog.at_level(logging.WARNING, logger="lightning_gradaudit"):
        run = trainer(audit, max_epochs=2)
        run.fit(MeanSquares(), loader(32))
    assert run.global_step == 16
    assert len(audit.evidence.faults) == 4
    assert all("loss=" in text and "trainer" in text for _, text, _ in audit.evidence.faults)
    assert sum("training goes on" in message for message in caplog.messages) == 1
    verdict = audit.verdict()
    assert verdict.status is Status.UNKNOWN
    assert "4 audits failed" in str(verdict)


def test_strict_raises_a_fault_into_training(tmp_path):
    with pytest.raises(ReplayError, match="loss="):
        trainer(quick(tmp_path, strict=True)).fit(MeanSquares(), loader(16))


def test_a_loss_callable_replaces_the_training_step(tmp_path):
    class Scaled(Classifier):
        def training_step(self, batch, batch_idx):
            return 3 * F.cross_entropy(self.net(batch[0]), batch[1]) * self.trainer.max_epochs

    audit = quick(tmp_path, loss=ThreeTimes())
    trainer(audit).fit(Scaled(dropout=0.0), loader(16))
    assert [r.valid for r in audit.evidence.records] == [True]
    wrong = quick(tmp_path, loss=F.cross_entropy)
    trainer(wrong).fit(Scaled(dropout=0.0), loader(16))
    assert [r.valid for r in wrong.evidence.records] == [False]
    assert "self-test" in str(wrong.verdict())


class ThreeTimes:
    def __call__(self, logits, labels):
        return 3 * F.cross_entropy(logits, labels)


def test_a_dict_batch_with_further_entries_is_audited(tmp_path):
    images, labels = images_and_labels(16)
    rows = [
        {"image": i, "label": y, "id": torch.tensor(n), "path": str(n)}
        for n, (i, y) in enumerate(zip(images, labels, strict=True))
    ]

    class Mapped(Classifier):
        def training_step(self, batch, batch_idx):
            return super().training_step((batch["image"], batch["label"]), batch_idx)

    audit = quick(tmp_path)
    trainer(audit).fit(Mapped(), DataLoader(rows, batch_size=4))
    assert [r.valid for r in audit.evidence.records] == [True]


@pytest.mark.parametrize(
    ("batch", "words"),
    [
        (lambda: (torch.rand(4, 12, 12), torch.zeros(4).long()), "channel dimension"),
        (lambda: {"text": torch.zeros(4, 9).long()}, "without images"),
        (lambda: ([torch.rand(1, 12, 12), torch.rand(1, 9, 12)], []), "images of one size"),
    ],
    ids=["no channels", "text", "images of two sizes"],
)
def test_a_batch_that_cannot_be_audited_is_named_and_training_goes_on(tmp_path, batch, words):
    class Anything(Classifier):
        def training_step(self, batch, batch_idx):
            return sum(p.sum() for p in self.parameters())

    audit = quick(tmp_path)
    data = DataLoader([batch() for _ in range(3)], batch_size=None)
    run = trainer(audit)
    run.fit(Anything(), data)
    assert run.global_step == 3
    assert words in audit.evidence.faults[0][1]
    assert audit.verdict().status is Status.UNKNOWN


def test_misuse_shows_before_training_starts(tmp_path):
    with pytest.raises(InvalidInputError, match="every_n_steps"):
        GradAudit(every_n_steps=0)
    with pytest.raises(InvalidInputError, match="executor"):
        GradAudit(executor="gpu")
    with pytest.raises(InvalidInputError, match="attack"):
        GradAudit(attack="dlg")
    with pytest.raises(InvalidInputError, match="view"):
        GradAudit(view="server")
    with pytest.raises(InvalidInputError, match=r"view='update' contradicts.*'local'"):
        GradAudit(view="update", threat_model=ThreatModel(labels_known=True))
    with pytest.raises(InvalidInputError, match="log_images"):
        GradAudit(log_images=-1)
    with pytest.raises(InvalidInputError, match="gallery"):
        GradAudit(gallery=torch.zeros(100, 12, 12))
    with pytest.raises(InvalidInputError, match="gallery"):
        GradAudit(gallery=(torch.rand(100, 1, 12, 12), torch.zeros(99)))
    blocked = tmp_path / "file"
    blocked.write_text("")
    with pytest.raises(InvalidInputError, match="dirpath"):
        trainer(quick(tmp_path, dirpath=blocked)).fit(Classifier(), loader(8))
    frozen = Classifier()
    frozen.requires_grad_(False)
    with pytest.raises(InvalidInputError, match="trainable parameter"):
        trainer(quick(tmp_path)).fit(frozen, loader(8))


def test_direct_arguments_change_the_settings_and_the_rest_stays():
    audit = GradAudit(budget=Budget(evaluations=9), settings=AuditSettings(budget=Budget(seconds=1), seed=4))
    assert (audit.settings.budget, audit.settings.seed) == (Budget(evaluations=9), 4)
    assert (audit.settings.analysis, audit.settings.confirm) == (True, 100), "what a run does unless told"
    quiet = GradAudit(settings=AuditSettings(analysis=False, confirm=0))
    assert (quiet.settings.analysis, quiet.settings.confirm) == (False, 0)


@pytest.mark.parametrize(("given", "pairs"), [(False, 0), (True, 4), (0, 0), (1, 1), (9, 9)])
def test_log_images_is_a_switch_or_a_number_of_pairs(given, pairs):
    assert GradAudit(log_images=given).log_images == pairs


def test_more_than_one_process_is_refused_with_an_alternative(tmp_path):
    from lightning_gradaudit.capture.controller import Capture

    class TwoRanks:
        world_size = 2
        strategy = object()

    with pytest.raises(UnsupportedError, match=r"Snapshot\.from_batch"):
        Capture(loss=None, threat_model=ThreatModel(), seed=0).check(TwoRanks(), Classifier())


def test_two_callbacks_need_two_names(tmp_path):
    with pytest.raises(RuntimeError, match="state_key"):
        trainer(quick(tmp_path), quick(tmp_path))
    first, second = quick(tmp_path), quick(tmp_path, name="other", dirpath=tmp_path / "other")
    log = RecordingLogger()
    trainer(first, second, logger=log).fit(Classifier(), loader(16))
    keys = {key for _, row in log.rows for key in row}
    assert {"gradaudit/risk", "other/risk"} <= keys


def test_state_survives_checkpoint_and_resume(tmp_path):
    saver = ModelCheckpoint(tmp_path, save_last=True, save_top_k=1)
    first = quick(tmp_path)
    trainer(first, saver).fit(Classifier(), loader(32))
    resumed = quick(tmp_path, dirpath=tmp_path / "second")
    run = trainer(resumed, ModelCheckpoint(tmp_path, save_last=True, save_top_k=1), max_epochs=2)
    run.fit(Classifier(), loader(32), ckpt_path=saver.last_model_path, weights_only=False)
    assert [r.step for r in resumed.evidence.records] == [0, 4, 8, 12]
    old, new = first.evidence.records[1], resumed.evidence.records[1]
    assert torch.equal(old.exposure, new.exposure)
    assert len(RunLog(tmp_path / "second").evidence().records) == 4, "the new folder tells the whole story"


def test_a_checkpoint_of_the_callback_holds_no_image(tmp_path):
    audit = quick(tmp_path)
    trainer(audit).fit(Classifier(), loader(16))
    state = audit.state_dict()
    images, _ = images_and_labels(16)

    def sizes(value):
        if isinstance(value, dict):
            return max((sizes(v) for v in value.values()), default=0)
        if isinstance(value, list):
            return max(len(value), *(sizes(v) for v in value)) if value else 0
        return 1

    assert sizes(state) < images[0].numel()


def test_the_callback_can_be_pickled_before_during_and_after_a_run(tmp_path):
    audit = quick(tmp_path)
    copies = []

    class Pickling(pl.Callback):
        def on_train_batch_end(self, *args):
            copies.append(pickle.loads(pickle.dumps(audit)))

    trainer(audit, Pickling()).fit(Classifier(), loader(8))
    assert copies
    assert copies[0].state_key == audit.state_key


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt], ids=lambda e: e.__name__)
def test_an_exception_in_training_leaves_module_and_folder_in_order(tmp_path, error):
    class Failing(Classifier):
        def training_step(self, batch, batch_idx):
            if batch_idx == 5:
                raise error("stop")
            return super().training_step(batch, batch_idx)

    audit = quick(tmp_path, every_n_steps=1)
    module = Failing()
    untouched = Failing()
    with pytest.raises((RuntimeError, KeyboardInterrupt, SystemExit)):
        trainer().fit(untouched, loader(64))
    with pytest.raises((RuntimeError, KeyboardInterrupt, SystemExit)):
        trainer(audit).fit(module, loader(64))
    assert sum(len(p._backward_hooks or ()) for p in module.parameters()) == 0
    assert set(module.__dict__) == set(untouched.__dict__)
    assert audit._collector is None, "the executor is shut down"
    assert len(RunLog(tmp_path / "audit").evidence().records) == 5


def test_declared_noise_shows_as_the_defence_gap_and_passes_the_self_test(tmp_path):
    audit = quick(tmp_path, threat_model=ThreatModel(defences=[GaussianNoise(relative=0.5)]))
    trainer(audit).fit(Classifier(), loader(16))
    (result,) = audit.evidence.records
    assert result.self_test < 1e-3
    # Noise of half the norm, relative to the noised gradient: 0.5 / sqrt(1.25).
    assert result.defence_gap == pytest.approx(0.5 / 1.25**0.5, rel=0.1)


def test_pixel_range_comes_from_the_data_transform(tmp_path):
    from torchvision.transforms import Compose, Normalize

    class Normalised(torch.utils.data.Dataset):
        transform = Compose([Normalize((0.4,), (0.2,))])

        def __len__(self):
            return 16

        def __getitem__(self, index):
            images, labels = images_and_labels(16)
            return self.transform(images[index]), labels[index]

    audit = quick(tmp_path, executor=HoldingExecutor(), limits=HELD)
    trainer(audit).fit(Classifier(), DataLoader(Normalised(), batch_size=4))
    assert audit.normalization.mean == (0.4,)
    assert audit.normalization.std == (0.2,)


def test_any_torchmetrics_metric_is_logged_under_its_name(tmp_path):
    log = RecordingLogger()
    audit = quick(tmp_path, metrics={"my_mse": MeanSquaredError()})
    trainer(audit, logger=log).fit(Classifier(), loader(16))
    ((_, row),) = log.of_the_audit()
    assert row["gradaudit/my_mse"] == pytest.approx(row["gradaudit/mse"], rel=1e-5)


def test_a_dry_run_and_other_stages_leave_nothing(tmp_path):
    audit = quick(tmp_path)
    trainer(audit, fast_dev_run=True).fit(Classifier(), loader(8))
    assert not (tmp_path / "audit").exists()

    class Validated(Classifier):
        def validation_step(self, batch, batch_idx):
            return None

    fresh = quick(tmp_path)
    trainer(fresh).validate(Validated(), loader(8, shuffle=False), verbose=False)
    assert not fresh.evidence.records


def test_a_logger_that_fails_neither_stops_training_nor_spoils_the_verdict(tmp_path):
    class Broken(RecordingLogger):
        def log_metrics(self, metrics, step=None):
            if any(key.startswith("gradaudit/") for key in metrics):
                raise OSError("disk full")

    audit, good = quick(tmp_path), RecordingLogger()
    run = trainer(audit, logger=[Broken(), good])
    run.fit(Classifier(), loader(16))
    assert run.global_step == 4
    assert not audit.evidence.faults
    assert len(good.of_the_audit()) == 1


def test_risk_is_shown_in_the_progress_bar(tmp_path):
    audit = quick(tmp_path)

    class Before(pl.Callback):
        def on_train_start(self, *args):
            audit.evidence.records.append(record(exposure=(0.7, 0.1)))

    run = trainer(Before(), audit)
    run.fit(Classifier(), loader(8))
    assert run.progress_bar_metrics["risk"] >= 0.7


def test_a_second_fit_starts_without_the_audits_of_the_first(tmp_path):
    """Evidence about another run must not vouch for this one."""
    audit = quick(tmp_path)
    trainer(audit).fit(Classifier(), loader(16))
    assert [r.step for r in audit.evidence.records] == [0]
    audit.schedule = AtSteps([])
    trainer(audit).fit(Classifier(), loader(16))
    assert audit.evidence.records == []
    assert audit.verdict().status is Status.UNKNOWN


def test_a_failed_audit_between_good_ones_costs_only_itself(tmp_path):
    """An error parts the results before it from those behind it; draining once must still collect them all."""

    class OneBad(Classifier):
        def training_step(self, batch, batch_idx):
            loss = super().training_step(batch, batch_idx)
            return loss * float("nan") if batch_idx == 1 else loss

    executor = HoldingExecutor()
    audit = quick(tmp_path, every_n_steps=1, executor=executor, limits=Limits(queue_size=9))

    class Finish(pl.Callback):
        def on_train_epoch_end(self, *args):
            for (work, arguments), future in zip(executor.jobs, executor.futures, strict=True):
                try:
                    future.set_result(work(*arguments))
                except InvalidInputError as error:
                    future.set_exception(error)

    class Mild(OneBad):
        def on_before_optimizer_step(self, optimizer):
            for parameter in self.parameters():
                parameter.grad.nan_to_num_()

    trainer(audit, Finish()).fit(Mild(), loader(12))
    assert [r.step for r in audit.evidence.records] == [0, 2]
    assert audit.evidence.dropped == 1


def test_a_large_gallery_is_kept_whole_and_nothing_else_is_added(tmp_path):
    images, labels = images_and_labels(300, seed=4)
    audit = quick(tmp_path, gallery=(images, labels), executor=HoldingExecutor(), limits=HELD)
    sizes = []

    class Look(pl.Callback):
        def on_train_batch_end(self, *args):
            sizes.append(len(audit._sampler.auditor.baseline.gallery))

    trainer(audit, Look()).fit(Classifier(), loader(12))
    assert sizes == [300, 300, 300]

"""`GradAudit`: audit a running Trainer without disturbing it."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Executor
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from pytorch_lightning import LightningModule, Trainer
from torch import Tensor
from torchmetrics import Metric

from lightning_gradaudit.analysis.ceiling import Analysis
from lightning_gradaudit.attacks.base import Attack
from lightning_gradaudit.attacks.budget import Budget
from lightning_gradaudit.attacks.defaults import default_attack
from lightning_gradaudit.audit.auditor import Auditor
from lightning_gradaudit.audit.engine_check import EngineCheck
from lightning_gradaudit.audit.record import AuditRecord
from lightning_gradaudit.audit.record_checks import check_record
from lightning_gradaudit.callbacks.curves import CURVES, layer_curve, layer_names, row, user_metrics
from lightning_gradaudit.callbacks.exchange import RankResults
from lightning_gradaudit.callbacks.lightning_compat import resolve_base
from lightning_gradaudit.callbacks.loggers import describe, sink
from lightning_gradaudit.callbacks.overhead import Overhead
from lightning_gradaudit.callbacks.publisher import UNKNOWN_RISK, pairs_picture
from lightning_gradaudit.callbacks.reference_gallery import normalization_of_data, normalization_of_range
from lightning_gradaudit.callbacks.schedules import EveryNSteps, Schedule
from lightning_gradaudit.capture.controller import Capture
from lightning_gradaudit.errors import (
    EmptyBatchError,
    InvalidInputError,
    NonFiniteGradientError,
    UnsupportedError,
    described,
)
from lightning_gradaudit.execution.executors import ExecutorName
from lightning_gradaudit.metrics.baseline import Baseline
from lightning_gradaudit.risk.checks import Fault
from lightning_gradaudit.risk.gate import RiskGate
from lightning_gradaudit.risk.history import STAMP, AuditHistory, make_stamp
from lightning_gradaudit.risk.run_log import RunLog
from lightning_gradaudit.risk.verdict import Status, Verdict
from lightning_gradaudit.simulation.batch import BatchLayout, SampleId
from lightning_gradaudit.simulation.defences import Defence
from lightning_gradaudit.simulation.normalization import Normalization
from lightning_gradaudit.simulation.observation import check_public_images
from lightning_gradaudit.simulation.threat_model import ThreatModel, View
from lightning_gradaudit.simulation.training_step import Loss
from lightning_gradaudit.utils.digests import weights_digest

if TYPE_CHECKING:
    from pytorch_lightning import Callback
else:
    Callback = resolve_base("callbacks.Callback")

log = logging.getLogger(__name__)


def bound_weights(checkpoint: Mapping[str, Any], stamp: Mapping[str, Any] | None) -> str | None:
    """Return the digest of a checkpoint's weights; taken from a stamp of the same save where there is one."""
    if stamp and stamp.get("weights"):
        return str(stamp["weights"])
    state = checkpoint.get("state_dict")
    return weights_digest(state) if state else None


def lasting_known(faults: Sequence[Fault], fault: Fault) -> bool:
    """Tell whether a fault of the whole run is on record already: a schedule may fail at every step."""
    return fault.lasting and any(known.lasting and known.message == fault.message for known in faults)


class GradAudit(Callback):
    """Sample training steps, attack copies of their gradients in the background, and log what leaks.

    With no arguments it audits every 100th step of any image classifier. Curves appear under `gradaudit/` in every
    logger, at the step of capture; `trainer.callback_metrics` carries `gradaudit/risk` and `gradaudit/age_steps`
    for `ModelCheckpoint` and `EarlyStopping`. Weights, optimizer, random state and logged metrics of the training
    are bit-equal with and without it. Faults of an audit never reach training unless `strict`: they are counted,
    logged once, and turn the verdict UNKNOWN.

    Args:
        every_n_steps: Audit every n-th training batch, the first included.
        schedule: Overrides it: a pure function of the batch index since the start of the run.
        attack: Matching attack; None: `attacks.Auto`. Closed forms always go first.
        view: What the adversary holds (see `ThreatModel`); None: "update" under Opacus, else "local".
        local_steps: For view="delta": optimizer steps before the client shares; None: the whole fit, whose batches are
            all kept until its end.
        batch_size: What if the client's batch had this many images? Recomputed on a replica (see `ThreatModel`).
        optimizer: Index of the audited optimizer where the module optimises by hand; None: the first whose gradient
            depends on the images.
        budget: Largest effort of one audit.
        executor: Where audits run: "auto", "inline", "thread", "process", "ray", or any executor.
        device: Where to attack, e.g. a spare "cuda:1"; None: where training runs, or the CPU for a process.
        loss: `loss(module(images), labels)`; None: the module's own `training_step` is replayed.
        mean, std: Normalisation that was applied to pixels in [0, 1]. None: taken from a `Normalize` among the
            data set's transforms, else from the range of the first images.
        labels_known: Give the labels to the adversary.
        dropout_known: Give the random state of the forward pass to the adversary.
        order_known: For view="delta": tell the adversary which image was in which batch of which epoch.
        public_images: (M, C, H, W) pixels in [0, 1] of the same kind that the adversary holds, none of them trained
            on; they help to recover labels.
        defences: What the client does to the gradient before it leaves; training itself goes on unchanged.
        gallery: (N, C, H, W) images of the training distribution, in the model's input space, at least 100; None:
            the first training batches are kept until there are 256 (in memory only).
        gallery_labels: (N,) class indices of the gallery.
        sample_id: Where a batch holds your own names of its images: the key or index of an entry, or a function of the
            batch. Records, reports and tables then name images by them; they are written as they are, so pseudonyms
            may be wiser than names.
        images: Most image pairs kept of an audit, the most exposed first; 0 keeps none.
        log_images: Write these pairs to the loggers and the run folder. They are private data.
        metrics: Further torchmetrics metrics, updated with (reconstructions, truth) in [0, 1] and logged by name.
        gate: How risk is computed and judged; `RiskGatedCheckpoint` brings its own.
        max_overhead: Largest time that the audit may take of the training thread, over the time of the training steps
            themselves (0.05: 5 %): with an executor elsewhere the copying and logging, inline the audits too. Due
            samples that would exceed it are not taken, in all processes alike; they are counted and logged as
            `skipped`. Contention for shared cores is not counted. None: no limit.
        queue_size: Most unfinished audits; further samples are dropped and counted.
        final_wait_seconds: How long to wait for unfinished audits when training ends.
        dirpath: Folder of the run's log; None: `gradaudit` beside the first logger's files.
        strict: Raise an audit's fault into training.
        analysis: Also estimate what any attacker could get of each image (`AuditRecord.ceiling`), and which layer gives
            it away: True, False or settings. Each audit then costs up to 83 products with the gradient's Jacobian more,
            28 to 129 training steps' time on the small networks it was measured on; `AuditRecord.leakage` says how
            much it was. Where it cannot be done the audit goes on without.
        confirm: Also ask, with this many candidate photographs (the batch's own among images of the gallery), whether
            gradients alone name the batch: the curve `confirmed`, beside the risk and no part of it. Needs a gallery of
            that many images no larger than 32 pixels a side. 0: do not ask. The default adds 1 to 6 % to the time of
            an audit of 400 evaluations, 11 to 17 % under train-mode BatchNorm (small networks on one core, batches of
            4 and 32).
        compile: Compile gradient matching in the background, once per architecture, shapes and attack, while the
            first evaluations run eagerly: an evaluation then costs a half to a third. A compiler takes a core for 10 to
            90 seconds for each attack of a race, so that it pays over a run with many audits and not over a few.
        seed: Of attacks and defences.
        name: Distinguishes several callbacks in one Trainer.

    Raises:
        InvalidInputError: When an argument is out of range.
    """

    def __init__(
        self,
        *,
        every_n_steps: int = 100,
        schedule: Schedule | None = None,
        attack: Attack | None = None,
        view: View | None = None,
        local_steps: int | None = None,
        batch_size: int | None = None,
        optimizer: int | None = None,
        budget: Budget = Budget(evaluations=800),  # noqa: B008 - immutable
        executor: ExecutorName | Executor = "auto",
        device: str | None = None,
        loss: Loss | None = None,
        mean: float | Sequence[float] | None = None,
        std: float | Sequence[float] | None = None,
        labels_known: bool = False,
        dropout_known: bool = True,
        order_known: bool = True,
        public_images: Tensor | None = None,
        defences: Sequence[Defence] = (),
        gallery: Tensor | None = None,
        gallery_labels: Tensor | None = None,
        sample_id: SampleId | None = None,
        images: int = 4,
        log_images: bool = False,
        metrics: Mapping[str, Metric] | None = None,
        gate: RiskGate | None = None,
        max_overhead: float | None = None,
        queue_size: int = 4,
        final_wait_seconds: float = 120.0,
        dirpath: str | Path | None = None,
        strict: bool = False,
        analysis: bool | Analysis = True,
        confirm: int = 100,
        compile: bool = False,  # noqa: A002 - torch's word
        seed: int = 0,
        name: str = "gradaudit",
    ) -> None:
        self.schedule: Schedule = EveryNSteps(every_n_steps) if schedule is None else schedule
        if public_images is not None:
            check_public_images(public_images)
        if images < 0 or final_wait_seconds < 0:
            raise InvalidInputError(
                f"images and final_wait_seconds must be >= 0, got {images!r} and {final_wait_seconds!r}."
            )
        self.threat_model = ThreatModel(
            view="local" if view is None else view,
            labels_known=labels_known,
            dropout_known=dropout_known,
            defences=tuple(defences),
            batch_size=batch_size,
            order_known=order_known,
            public_images=0 if public_images is None else len(public_images),
        )
        self.public_images, self.sample_id = public_images, sample_id
        self._choose_view = view is None and batch_size is None
        self.local_steps, self.optimizer = local_steps, optimizer
        self.attack, self.budget, self.executor, self.device = attack, budget, executor, device
        self.analysis, self.confirm, self.compile = analysis, confirm, compile
        self.loss, self.seed, self.strict, self.name = loss, seed, strict, name
        self._declared_normalization = None if mean is None and std is None else Normalization.of(mean, std)
        self.normalization = self._declared_normalization
        self.gallery, self.gallery_labels = gallery, gallery_labels
        self.images, self.log_images, self.metrics = images, log_images, dict(metrics or {})
        self.gate = RiskGate() if gate is None else gate
        self.queue_size, self.final_wait_seconds = queue_size, final_wait_seconds
        self.max_overhead = max_overhead
        self._overhead = Overhead(max_overhead)
        self.dirpath = dirpath
        self.evidence = AuditHistory()
        self._make_auditor().close()  # misuse shows here, not in the middle of a run
        self._make_capture()
        self._auditor: Auditor | None = None
        self._capture: Capture | None = None
        self._folder: RunLog | None = None
        self._outbox = RankResults()
        self._gallery_steps = 0
        self._sampled = self._dropping = False
        self._resumed_with: list[str] = []
        self._layers: list[str] = []
        self._wiring: list[str] = []
        self._warned: set[str] = set()

    def _make_auditor(self) -> Auditor:
        return Auditor(
            attack=self.attack,
            budget=self.budget,
            baseline=Baseline(),
            executor=self.executor,
            queue_size=self.queue_size,
            analysis=self.analysis,
            confirm=self.confirm,
            compile=self.compile,
            seed=self.seed,
            device=self.device,
        )

    def _make_capture(self) -> Capture:
        return Capture(
            loss=self.loss,
            threat_model=self.threat_model,
            choose_view=self._choose_view,
            seed=self.seed,
            optimizer=self.optimizer,
            local_steps=self.local_steps,
            public_images=self.public_images,
            sample_id=self.sample_id,
        )

    @property
    def state_key(self) -> str:
        return f"{type(self).__qualname__}{{'name': {self.name!r}}}"

    def state_dict(self) -> dict[str, Any]:
        """Return counters and audits, as plain JSON and without any image; empty where they cannot be written."""
        try:
            return self.evidence.to_dict()
        except Exception as error:  # Lightning asks while it saves
            self._fault(error, "keeping the audits for a resumed run")
            return {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Resume counters and audits; gallery and null are built anew.

        A state that cannot be read does not keep training from resuming; the verdict is then UNKNOWN.
        """
        try:
            self.evidence = AuditHistory.from_dict(state_dict)
        except Exception as error:
            message = f"The audits of the resumed run cannot be read: {described(error)}"
            self.evidence = AuditHistory(damage=[message])
            self._warn(message)
        self.evidence.damage += self._resumed_with

    def __getstate__(self) -> dict[str, Any]:
        live = ("_auditor", "_capture", "_folder")
        return {k: (None if k in live else v) for k, v in self.__dict__.items()}

    # Life cycle

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage != "fit":
            return
        self._capture = self._make_capture()
        self._capture.check(trainer, pl_module)
        # A new run is judged by its own audits; when it resumes, Lightning loads the state after this hook.
        self.evidence, self._outbox = AuditHistory(), RankResults()
        self._overhead = Overhead(self.max_overhead)
        self.normalization = self._declared_normalization
        self._folder = None
        if not trainer.fast_dev_run:  # type: ignore[attr-defined]
            folder = self.dirpath or Path(trainer.log_dir or trainer.default_root_dir) / self.name
            if trainer.is_global_zero:
                self._folder = RunLog(folder)
                self._folder.create()

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._capture is not None:
            self._wiring = self._capture.start(trainer, pl_module)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._auditor = self._make_auditor()
        self._gallery_steps = self._auditor.baseline.gallery_size
        trained = (name for name, p in pl_module.named_parameters() if p.requires_grad)
        self._layers = layer_names(trained) if self.analysis else []
        self.evidence.settings = self._settings()
        self.evidence.step = self._now(trainer)
        self._guard(self._open_log)
        for message in self._wiring:
            self._fault(UnsupportedError(message), lasting=True)
        keys = [*self._keys(), *(f"{self.name}/{key}" for key in self.metrics)]
        for logger in trainer.loggers if trainer.is_global_zero else ():
            self._guard(sink(logger).declare, keys, what=f"declaring curves to {describe(logger)}", fault=False)
        self._guard(self._seed_baseline, trainer)
        self._guard(self._publish_risk, trainer)

    def _open_log(self) -> None:
        if self._folder is not None:
            self._folder.begin(self.evidence)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        self._overhead.step_begins()
        with self._overhead:
            self._sample(trainer, pl_module, batch, batch_idx)

    def _sample(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        if self._auditor is None or self._capture is None:
            return
        if self._gallery_steps > 0 and not self._auditor.baseline.gallery_full:
            self._gallery_steps -= 1
            self._guard(self._fill_gallery, batch)
        self._sampled = False  # unless the schedule says so
        self._guard(self._ask_schedule, trainer, what="asking the schedule", lasting=True)
        if self._sampled and self.max_overhead is not None:
            self._guard(self._thin)
        if self._sampled or self._capture.waiting:
            self._guard(self._batch_start, trainer, pl_module, batch, batch_idx)

    def _ask_schedule(self, trainer: Trainer) -> None:
        self._sampled = bool(self.schedule(trainer.fit_loop.epoch_loop.total_batch_idx))

    def _thin(self) -> None:
        """Give a due sample up if it would cost too much; all processes meet here, and decide alike."""
        assert self._capture is not None
        self._sampled = False  # unless it is decided
        self._sampled = self._overhead.allows(self._capture.ranks.gather(self._overhead.spent()))
        self.evidence.lost.skipped += not self._sampled

    def on_after_backward(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._follow(trainer, pl_module, "after_backward")

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Any) -> None:
        self._follow(trainer, pl_module, "before_optimizer_step", optimizer)

    def on_before_zero_grad(self, trainer: Trainer, pl_module: LightningModule, optimizer: Any) -> None:
        self._follow(trainer, pl_module, "before_zero_grad")

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        with self._overhead:
            self._end_batch(trainer, pl_module)
        self._overhead.step_ends()

    def _end_batch(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._auditor is None or self._capture is None:
            return
        stepped = not trainer.fit_loop._should_accumulate()
        self._follow(trainer, pl_module, "end_of_batch", stepped=stepped)
        if self._capture.ranks.is_single:
            if self._auditor.pending:
                self.drain(trainer)
        elif self._sampled:  # several processes meet at sampled steps, whatever each of them has
            self.drain(trainer)
        if self.evidence.records:
            # The dict behind `trainer.callback_metrics`: the property would evaluate every logged value each step.
            live = trainer._logger_connector._callback_metrics
            live[f"{self.name}/age_steps"] = torch.tensor(float(self._age(trainer)))

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._follow(trainer, pl_module, "end_of_training", stepped=True)
        self._guard(self._finish, trainer, wait=self.final_wait_seconds, what="ending the audit")

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        # `teardown` is not called after an exception.
        self._guard(self._finish, trainer, wait=0.0, what="ending the audit")

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage == "fit":
            self._guard(self._finish, trainer, wait=0.0, what="ending the audit")

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Notice whose weights a run is resumed with; Lightning loads the callback's state after this."""
        self._guard(self._check_resumed, checkpoint, what="comparing the weights of a resumed run")

    def _check_resumed(self, checkpoint: dict[str, Any]) -> None:
        self._resumed_with = ["The run was resumed with other weights than those that its audits were stamped with."]
        stamp = checkpoint.get(STAMP) or {}
        if stamp.get("weights") == bound_weights(checkpoint, None):
            self._resumed_with = []

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        self._guard(self._put_stamp, trainer, checkpoint, what="stamping a checkpoint")

    def _put_stamp(self, trainer: Trainer, checkpoint: dict[str, Any]) -> None:
        other = checkpoint.get(STAMP)
        checkpoint[STAMP] = {}  # should this fail, another audit's stamp must not stand for it
        stamp = self.stamp(self.gate, trainer, weights=bound_weights(checkpoint, other))
        stricter = (
            other and Status(other["verdict"]["status"]).strictness > Status(stamp["verdict"]["status"]).strictness
        )
        checkpoint[STAMP] = other if stricter else stamp

    # What others ask

    def stamp(self, gate: RiskGate, trainer: Trainer, *, weights: str | None = None) -> dict[str, Any]:
        """Return verdict and evidence as plain JSON, to be written into a checkpoint that is being saved.

        Args:
            gate: The gate that decides about the checkpoint.
            trainer: Says at which step training stands.
            weights: Digest of the checkpoint's weights, which binds the stamp to them.
        """
        self.evidence.step = self._now(trainer)
        return make_stamp(self.evidence, gate, weights=weights, global_step=trainer.global_step)

    def verdict(self, gate: RiskGate | None = None) -> Verdict:
        """Judge the run as it stands; call `drain` first for the newest audits."""
        return self.evidence.verdict(self.gate if gate is None else gate)

    def log_verdict(self, verdict: Verdict, *, checkpoint: str, released: bool) -> None:
        """Note a gate's decision about a checkpoint in the run folder."""
        if self._folder is not None:
            decision = {"checkpoint": checkpoint, "released": released, "step": self.evidence.step}
            self._guard(self._folder.append, "verdict", verdict.to_dict() | decision)

    def drain(self, trainer: Trainer, *, wait: float | None = None) -> None:
        """Collect finished audits and log them; with `wait`, give those under way that many seconds.

        Must be called on the main thread, and in several processes by all of them: they exchange their results.
        """
        if self._auditor is None or self._capture is None:
            return
        self._collect(trainer, wait=wait)
        if not self._capture.ranks.is_single:
            self._guard(self._exchange, trainer)

    def _collect(self, trainer: Trainer, *, wait: float | None) -> None:
        assert self._auditor is not None
        assert self._capture is not None
        ranks = self._capture.ranks
        self.evidence.step = self._now(trainer)
        deadline = None if wait is None else time.monotonic() + wait
        while True:
            left = None if deadline is None else max(0.0, deadline - time.monotonic())
            try:
                records = self._auditor.collect(wait=left)
            except NonFiniteGradientError as error:
                self._own.lost.drop(self.evidence.step, in_a_row=False)
                self._warn(str(error))
                continue
            except Exception as error:
                self._fault(error, "auditing")
                if self.strict:
                    raise
                continue
            if ranks.is_single:
                self._guard(self._note_engine, self._auditor.engine)
            if not records:  # an error in the queue parts the results before it from those behind it
                break
            for record in records:
                self._check_noise(record)
                if ranks.is_single:
                    self._guard(self._accept, trainer, record)
                else:
                    self._outbox.records.append(self._to_travel(replace(record, rank=ranks.rank)))

    @property
    def _own(self) -> AuditHistory | RankResults:
        """Where this process counts: what it shares with others becomes evidence when they meet."""
        alone = self._capture is None or self._capture.ranks.is_single
        return self.evidence if alone else self._outbox

    def _to_travel(self, record: AuditRecord) -> AuditRecord:
        images = self.log_images or self.metrics
        return replace(record, reconstruction=None) if images else record.without_images()

    def _exchange(self, trainer: Trainer) -> None:
        """Give every process the results of all; a collective."""
        assert self._capture is not None
        assert self._auditor is not None
        self._outbox.engine = self._auditor.engine
        boxes = self._capture.ranks.gather(self._outbox)
        self._outbox = RankResults()
        engines = sorted((box.engine for box in boxes if box.engine is not None), key=lambda engine: engine.passed)
        if engines:  # the worst of them
            self._note_engine(engines[0])
        for box in boxes:
            self.evidence.lost.add(box.lost)
            for fault in box.faults:
                self._note_fault(fault)
        for record in sorted((r for box in boxes for r in box.records), key=lambda r: (r.step, r.rank)):
            self._guard(self._accept, trainer, record)

    # Capture

    def _batch_start(self, trainer: Trainer, module: LightningModule, batch: Any, batch_idx: int) -> None:
        assert self._capture is not None
        assert self._auditor is not None
        step = self.evidence.step = self._now(trainer)
        room = self._auditor.pending < self.queue_size  # do not even copy what would be dropped
        kept = self._capture.batch_start(trainer, module, batch, batch_idx, due=self._sampled, room=room, step=step)
        self._note_drop(step, dropped=not kept)

    def _follow(self, trainer: Trainer, module: LightningModule, event: str, *args: Any, stepped: bool = False) -> None:
        """Tell an open window what happened, and submit what it holds once it is complete."""
        if self._capture is not None and self._capture.armed:
            in_hooks = self._capture.seconds
            with self._overhead:
                self._guard(self._advance, trainer, module, event, *args, stepped=stepped)
            self._overhead.add(self._capture.seconds - in_hooks)

    def _advance(self, trainer: Trainer, module: LightningModule, event: str, *args: Any, stepped: bool) -> None:
        assert self._capture is not None
        assert self._auditor is not None
        self._capture.tell(event, *args)
        if self._capture.ready(stepped=stepped):
            snapshot = self._capture.take(trainer, module, self.normalization or Normalization())
            if snapshot is not None and not self._auditor.submit(snapshot):
                self._note_drop(snapshot.step, dropped=True)

    def _note_drop(self, step: int, *, dropped: bool) -> None:
        if dropped:
            self._own.lost.drop(step, in_a_row=self._dropping)
        if self._sampled:
            self._dropping = dropped

    # Gallery and pixel range

    def _seed_baseline(self, trainer: Trainer) -> None:
        if self.normalization is None:
            self.normalization = normalization_of_data(trainer)
        if self.gallery is not None:
            assert self._auditor is not None
            if self.gallery.ndim != 4 or not self.gallery.is_floating_point():
                raise InvalidInputError(
                    f"gallery: expected floating-point images (N, C, H, W), got {tuple(self.gallery.shape)} "
                    f"{self.gallery.dtype}."
                )
            self._auditor.baseline.gallery_size = len(self.gallery)
            self._observe(self.gallery, self.gallery_labels)

    def _fill_gallery(self, batch: Any) -> None:
        left, self._gallery_steps = self._gallery_steps, 0  # a batch that cannot be read is not read again
        try:
            truth = BatchLayout.of(batch, self.sample_id).split(batch)
        except EmptyBatchError:
            self._gallery_steps = left
            return
        self._gallery_steps = left
        self._observe(truth.inputs.detach(), truth.labels.detach())

    def _observe(self, inputs: Tensor, labels: Tensor | None) -> None:
        assert self._auditor is not None
        if self.normalization is None:
            self.normalization = normalization_of_range(inputs)
        self._auditor.baseline.observe(self.normalization.to_pixels(inputs).clamp(0, 1), labels)

    # Results

    def _accept(self, trainer: Trainer, record: AuditRecord) -> None:
        """Keep one finished audit and publish it; its images go no further than they were asked to."""
        check_record(record)
        self.evidence.records.append(record.without_images())
        verdict = self.verdict()
        now = self._now(trainer)
        values = row(
            record,
            verdict,
            lag_steps=now - record.step,
            age_steps=self._age(trainer),
            dropped=self.evidence.dropped,
            skipped=self.evidence.skipped,
            failed=len(self.evidence.faults),
            layers=self._layers,
        )
        line = record.to_dict() | {"risk": verdict.to_dict(), "lag_steps": values["lag_steps"]}
        picture = pairs_picture(record, self.images) if self.log_images else None
        if self._folder is not None:
            self._guard(self._folder.add_record, line, picture)
        self._publish_risk(trainer, verdict)
        values |= user_metrics(self.metrics, record.published(self.gate.max_risk))
        named = {f"{self.name}/{key}": value for key, value in values.items()}
        for logger in trainer.loggers if trainer.is_global_zero else ():
            what = f"logging to {describe(logger)}"
            self._guard(sink(logger).scalars, named, step=record.step, what=what, fault=False)
            if picture is not None:
                key = f"{self.name}/reconstructions"
                self._guard(sink(logger).picture, picture, step=record.step, key=key, what=what, fault=False)

    def _log_table(self, trainer: Trainer) -> None:
        """Tell every logger that holds tables which images were exposed most."""
        images = self.evidence.most_exposed()
        for logger in trainer.loggers if trainer.is_global_zero and images else ():
            settings: dict[str, Any] = {"key": f"{self.name}/most_exposed", "step": self.evidence.step or 0}
            what = f"logging to {describe(logger)}"
            self._guard(sink(logger).table, images, **settings, what=what, fault=False)

    def _keys(self) -> list[str]:
        return [f"{self.name}/{key}" for key in (*CURVES, *map(layer_curve, self._layers))]

    def _age(self, trainer: Trainer) -> int:
        newest = next((record.step for record in reversed(self.evidence.records) if record.conclusive), 0)
        return self._now(trainer) - newest

    @staticmethod
    def _now(trainer: Trainer) -> int:
        """Return the step that Lightning itself stamps logged values with."""
        return int(trainer.fit_loop.epoch_loop._batches_that_stepped)

    def _publish_risk(self, trainer: Trainer, verdict: Verdict | None = None) -> None:
        risk = (self.verdict() if verdict is None else verdict).risk
        risk = risk if math.isfinite(risk) else UNKNOWN_RISK
        trainer.callback_metrics[f"{self.name}/risk"] = torch.tensor(risk)
        trainer.callback_metrics[f"{self.name}/age_steps"] = torch.tensor(float(self._age(trainer)))
        # The live dict of the progress bar: `pl_module.log` would stamp the current step instead.
        trainer.progress_bar_metrics["risk"] = round(risk, 3)

    def _note_engine(self, engine: EngineCheck | None) -> None:
        if engine is not None and self.evidence.engine != engine:
            self.evidence.engine = engine
            if not engine.passed:
                self._warn(str(engine))
            if self._folder is not None:
                self._folder.append("engine", engine.to_dict())

    def _check_noise(self, record: AuditRecord) -> None:
        """Call out DP-SGD that adds less noise than it declares; its estimate from p weights is off by 1/√(2p)."""
        if record.noise < 0.9 * record.declared_noise:
            self._fault(
                UnsupportedError(
                    f"Opacus declares a noise multiplier of {record.declared_noise:g}, the gradient of step "
                    f"{record.step} carries {record.noise:.3g}: the privacy that is accounted for is not there."
                ),
                lasting=True,
            )

    def _finish(self, trainer: Trainer, *, wait: float) -> None:
        """Drain and shut down; safe to call again. Without `wait`, other processes may be gone: none is met."""
        if self._capture is not None:
            self._capture.disarm()
        if self._auditor is None:
            return
        self._guard(self.drain if wait else self._collect, trainer, wait=wait)
        if wait:
            self._guard(self._log_table, trainer, what="tabulating the most exposed images", fault=False)
        left = self._auditor.pending
        self._auditor.close(wait=left == 0)
        self._auditor = None
        if self._capture is not None:
            self._capture.ranks.close()
        if left:
            self.evidence.lost.given_up += left
            self._warn(f"{left} unfinished audits were given up when training ended.")
        if self.evidence.skipped:
            log.info(
                "GradAudit: %d due audits were not made, to stay below max_overhead=%g.",
                self.evidence.skipped,
                self.max_overhead,
            )
        if self._folder is not None:
            state = {"step": self._now(trainer), "lost": self.evidence.lost.to_dict()}
            self._guard(self._folder.append, "step", state)

    # Faults

    def _guard(
        self,
        work: Callable[..., Any],
        *args: Any,
        what: str = "auditing",
        fault: bool = True,
        lasting: bool = False,
        **kwargs: Any,
    ) -> None:
        """Do a piece of the audit's work and keep its failure out of training.

        A `fault` makes the verdict UNKNOWN; a logger that fails says nothing about the audits.
        """
        try:
            work(*args, **kwargs)
        except Exception as error:
            if self._capture is not None:
                self._capture.disarm()
            if fault:
                self._fault(error, what, lasting=lasting)
            else:
                self._warn(f"{what} failed: {described(error)}")
            if self.strict:
                raise

    def _fault(self, error: Exception, what: str = "", *, lasting: bool = False) -> None:
        text = described(error)
        fault = Fault(self.evidence.step or 0, text, lasting)
        self._warn(f"{what} failed; training goes on and the verdict is UNKNOWN. {text}" if what else text)
        if self._own is self.evidence:
            self._note_fault(fault)
        else:
            self._outbox.faults.append(fault)

    def _note_fault(self, fault: Fault) -> None:
        if lasting_known(self.evidence.faults, fault):
            return
        self.evidence.faults.append(fault)
        if self._folder is not None and self._folder.path.is_dir():
            try:
                self._folder.append("fault", fault._asdict())
            except Exception as problem:
                self._warn(f"the run folder cannot be written: {problem}")

    def _warn(self, message: str) -> None:
        if message not in self._warned:
            self._warned.add(message)
            log.warning("GradAudit: %s", message)

    def _settings(self) -> dict[str, str]:
        return {
            "attack": f"{default_attack().name}()" if self.attack is None else repr(self.attack),
            "budget": repr(self.budget),
            "schedule": repr(self.schedule),
            "threat_model": repr(self.threat_model if self._capture is None else self._capture.threat_model),
            "gate": repr(self.gate),
            "executor": str(self.executor),
            "max_overhead": str(self.max_overhead),
            "seed": str(self.seed),
            "layers": ", ".join(self._layers),
        }

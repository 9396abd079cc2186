"""`GradAudit`: audit a running Trainer without disturbing it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from concurrent.futures import Executor
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pytorch_lightning import LightningModule, Trainer
from torch import Tensor
from torchmetrics import Metric

from lightning_gradaudit.attacks.base import Attack
from lightning_gradaudit.attacks.budget import Budget
from lightning_gradaudit.attacks.defaults import default_attack
from lightning_gradaudit.audit.auditor import Auditor
from lightning_gradaudit.audit.settings import AuditSettings
from lightning_gradaudit.callbacks.collector import Collector
from lightning_gradaudit.callbacks.curves import layer_names
from lightning_gradaudit.callbacks.exchange import RankExchange
from lightning_gradaudit.callbacks.faults import FaultLog
from lightning_gradaudit.callbacks.lightning_compat import resolve_base
from lightning_gradaudit.callbacks.overhead import Limits
from lightning_gradaudit.callbacks.publisher import Publisher
from lightning_gradaudit.callbacks.reference_gallery import ReferenceGallery
from lightning_gradaudit.callbacks.sampler import Sampler
from lightning_gradaudit.callbacks.schedules import EveryNSteps, Schedule
from lightning_gradaudit.callbacks.stamps import has_other_weights, put_stamp
from lightning_gradaudit.capture.controller import Capture
from lightning_gradaudit.capture.trainer_state import logged_step
from lightning_gradaudit.errors import InvalidInputError, UnsupportedError, described
from lightning_gradaudit.execution.executors import ExecutorName
from lightning_gradaudit.risk.gate import RiskGate
from lightning_gradaudit.risk.history import AuditHistory, make_stamp
from lightning_gradaudit.risk.run_log import RunLog
from lightning_gradaudit.risk.verdict import Verdict
from lightning_gradaudit.simulation.batch import SampleId
from lightning_gradaudit.simulation.normalization import Normalization
from lightning_gradaudit.simulation.threat_model import ThreatModel, View
from lightning_gradaudit.simulation.training_step import Loss

if TYPE_CHECKING:
    from pytorch_lightning import Callback
else:
    Callback = resolve_base("callbacks.Callback")

DEFAULT_PAIRS = 4
"""Image pairs published of an audit with `log_images=True`."""
DEFAULT_CANDIDATES = 100
"""Candidates of `AuditSettings.confirm` in a run."""
OTHER_WEIGHTS = "The run was resumed with other weights than those that its audits were stamped with."


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
        attack, budget: Override those of `settings`.
        view: What the adversary holds (see `ThreatModel`); None: the view of `threat_model`, and under Opacus "update"
            in place of its default, "local".
        threat_model: What the adversary knows and holds, and what the client does to its gradient; `precision` is read
            from the Trainer. None: the defaults of `ThreatModel`.
        executor: Where audits run: "auto", "inline", "thread", "process", "ray", or any executor.
        gate: How risk is computed and judged; `RiskGatedCheckpoint` brings its own.
        log_images: Write pairs of true and reconstructed images to the loggers and the run folder, the most exposed
            first: True for 4 of each audit, or their number. They are private data.
        settings: How each step is audited; None: `AuditSettings()`. What it leaves to the caller is on here:
            `analysis=True`, `confirm=100` and `rungs=True`.
        loss: `loss(module(images), labels)`; None: the module's own `training_step` is replayed.
        mean, std: Normalisation that was applied to pixels in [0, 1]. None: taken from a `Normalize` among the
            data set's transforms, else from the range of the first images.
        gallery: (N, C, H, W) images of the training distribution, in the model's input space, at least 100, or a pair
            of them and their (N,) class indices. None: the first training batches are kept until there are 256 images
            (in memory only).
        sample_id: Where a batch holds your own names of its images: the key or index of an entry, or a function of the
            batch. Records, reports and tables then name images by them; they are written as they are, so pseudonyms
            may be wiser than names.
        metrics: Further torchmetrics metrics, updated with (reconstructions, truth) in [0, 1] and logged by name.
        limits: What the audits may cost; None: the defaults of `Limits`.
        dirpath: Folder of the run's log; None: `gradaudit` beside the first logger's files.
        strict: Raise an audit's fault into training.
        name: Distinguishes several callbacks in one Trainer.

    Attributes:
        evidence: The run's audits and faults so far; `faults` adds to the latter.
        normalization: Of the images; None until it is known.

    Raises:
        InvalidInputError: When an argument is out of range, or two contradict each other.
    """

    def __init__(
        self,
        *,
        every_n_steps: int = 100,
        schedule: Schedule | None = None,
        attack: Attack | None = None,
        budget: Budget | None = None,
        view: View | None = None,
        threat_model: ThreatModel | None = None,
        executor: ExecutorName | Executor = "auto",
        gate: RiskGate | None = None,
        log_images: bool | int = False,
        settings: AuditSettings | None = None,
        loss: Loss | None = None,
        mean: float | Sequence[float] | None = None,
        std: float | Sequence[float] | None = None,
        gallery: Tensor | tuple[Tensor, Tensor] | None = None,
        sample_id: SampleId | None = None,
        metrics: Mapping[str, Metric] | None = None,
        limits: Limits | None = None,
        dirpath: str | Path | None = None,
        strict: bool = False,
        name: str = "gradaudit",
    ) -> None:
        self.schedule: Schedule = EveryNSteps(every_n_steps) if schedule is None else schedule
        self.settings = _resolve_settings(settings, attack, budget)
        self.threat_model = _resolve_threat_model(view, threat_model)
        self._choose_view = view is None and (self.threat_model.view, self.threat_model.batch_size) == ("local", None)
        self.executor, self.loss, self.sample_id = executor, loss, sample_id
        self.gate = RiskGate() if gate is None else gate
        self.metrics, self.limits = dict(metrics or {}), Limits() if limits is None else limits
        self.log_images = _resolve_pairs(log_images)
        self._declared_normalization = None if mean is None and std is None else Normalization.of(mean, std)
        self.gallery, self.dirpath, self.strict, self.name = gallery, dirpath, strict, name
        self._make_auditor().close()  # misuse shows here, not in the middle of a run
        self._make_capture()
        self._resumed_with: list[str] = []
        self._wiring: list[str] = []
        self._begin(AuditHistory())

    def _make_auditor(self) -> Auditor:
        return Auditor(self.settings, executor=self.executor, queue_size=self.limits.queue_size)

    def _make_capture(self) -> Capture:
        return Capture(
            loss=self.loss,
            threat_model=self.threat_model,
            choose_view=self._choose_view,
            seed=self.settings.seed,
            sample_id=self.sample_id,
        )

    def _begin(self, history: AuditHistory, *, capture: Capture | None = None, run_log: RunLog | None = None) -> None:
        """Make what lives as long as a fit."""
        self._capture = capture
        self._sampler: Sampler | None = None
        self._collector: Collector | None = None
        self._exchange = RankExchange(history, None if capture is None else capture.ranks)
        stop = None if capture is None else capture.disarm
        self.faults = FaultLog(self._exchange, strict=self.strict, run_log=run_log, on_failure=stop)
        self._publisher = Publisher(
            name=self.name, gate=self.gate, metrics=self.metrics, pairs=self.log_images,
            exchange=self._exchange, faults=self.faults, run_log=run_log,
        )  # fmt: skip
        self._reference = ReferenceGallery(
            self.gallery, normalization=self._declared_normalization, sample_id=self.sample_id
        )

    @property
    def evidence(self) -> AuditHistory:
        return self._exchange.history

    @evidence.setter
    def evidence(self, history: AuditHistory) -> None:
        self._exchange.history = history

    @property
    def normalization(self) -> Normalization | None:
        return self._reference.normalization

    # State

    @property
    def state_key(self) -> str:
        return f"{type(self).__qualname__}{{'name': {self.name!r}}}"

    def state_dict(self) -> dict[str, Any]:
        """Return counters and audits, as plain JSON and without any image; empty where they cannot be written."""
        try:
            return self.evidence.to_dict()
        except Exception as error:  # Lightning asks while it saves
            self.faults.add(error, "keeping the audits for a resumed run")
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
            self.faults.warn(message)
        self.evidence.damage += self._resumed_with

    def __getstate__(self) -> dict[str, Any]:
        """Leave out what lives in this process alone: queue, hooks, log, and the channel between processes."""
        live = {"_capture", "_sampler", "_collector", "_exchange", "faults", "_publisher", "_reference"}
        return {name: value for name, value in self.__dict__.items() if name not in live} | {"_history": self.evidence}

    def __setstate__(self, state: dict[str, Any]) -> None:
        history = state.pop("_history")
        self.__dict__.update(state)
        self._begin(history)

    # Before training

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage != "fit":
            return
        capture = self._make_capture()
        capture.check(trainer, pl_module)
        run_log = None
        if not trainer.fast_dev_run:  # type: ignore[attr-defined]
            # `trainer.log_dir` is a collective: every process asks for it.
            folder = self.dirpath or Path(trainer.log_dir or trainer.default_root_dir) / self.name
            run_log = RunLog(folder) if trainer.is_global_zero else None
        # A new run is judged by its own audits; when it resumes, Lightning loads the state after this hook.
        self._begin(AuditHistory(), capture=capture, run_log=run_log)
        if run_log is not None:
            run_log.create()

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._capture is not None:
            self._wiring = self._capture.start(trainer, pl_module)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        assert self._capture is not None
        auditor = self._make_auditor()
        own: dict[str, Any] = {"auditor": auditor, "exchange": self._exchange, "faults": self.faults}
        self._collector = Collector(publisher=self._publisher, limits=self.limits, **own)
        self._sampler = Sampler(
            schedule=self.schedule, limits=self.limits, capture=self._capture, reference=self._reference, **own
        )
        trained = (name for name, p in pl_module.named_parameters() if p.requires_grad)
        layers = layer_names(trained) if self.settings.analysis else []
        self.evidence.settings = _describe_settings(self, self._capture.threat_model, layers)
        self.evidence.step = logged_step(trainer)
        self._publisher.open(trainer, layers)
        for message in self._wiring:
            self.faults.add(UnsupportedError(message), lasting=True)
        with self.faults.guard():
            self._reference.start(trainer, auditor.baseline)
        with self.faults.guard():
            self._publisher.publish_risk(trainer)

    # During training

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        if self._sampler is not None:
            self._sampler.overhead.step_begins()
            with self._sampler.overhead:
                self._sampler.start_batch(trainer, pl_module, batch, batch_idx)

    def on_after_backward(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._sampler is not None:
            self._sampler.after_backward(trainer, pl_module)

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Any) -> None:
        if self._sampler is not None:
            self._sampler.before_optimizer_step(trainer, pl_module, optimizer)

    def on_before_zero_grad(self, trainer: Trainer, pl_module: LightningModule, optimizer: Any) -> None:
        if self._sampler is not None:
            self._sampler.before_zero_grad(trainer, pl_module)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if self._sampler is not None:
            with self._sampler.overhead:
                self._sampler.end_batch(trainer, pl_module)
                if self._sampler.should_collect:
                    self.drain(trainer)
                if self.evidence.records:
                    self._publisher.publish_age(trainer)
            self._sampler.overhead.step_ends()

    # After training

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._sampler is not None:
            self._sampler.end_training(trainer, pl_module)
        self._finish(trainer, wait=self.limits.final_wait_seconds)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._finish(trainer, wait=0.0)  # `teardown` is not called after an exception

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage == "fit":
            self._finish(trainer, wait=0.0)

    def _finish(self, trainer: Trainer, *, wait: float) -> None:
        """Collect what is there, and shut down; safe to call again."""
        with self.faults.guard("ending the audit"):
            if self._capture is not None:
                self._capture.disarm()
            if self._collector is not None:
                self._collector.finish(trainer, wait=wait)
                self._sampler = self._collector = None

    # Checkpoints

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Notice whose weights a run is resumed with; Lightning loads the callback's state after this."""
        self._resumed_with = [OTHER_WEIGHTS]
        with self.faults.guard("comparing the weights of a resumed run"):
            self._resumed_with = [OTHER_WEIGHTS] if has_other_weights(checkpoint) else []

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        with self.faults.guard("stamping a checkpoint"):
            put_stamp(checkpoint, lambda weights: self.stamp(self.gate, trainer, weights=weights))

    # What others ask

    def stamp(self, gate: RiskGate, trainer: Trainer, *, weights: str | None = None) -> dict[str, Any]:
        """Return verdict and evidence as plain JSON, to be written into a checkpoint that is being saved.

        Args:
            gate: The gate that decides about the checkpoint.
            trainer: Says at which step training stands.
            weights: Digest of the checkpoint's weights, which binds the stamp to them.
        """
        self.evidence.step = logged_step(trainer)
        return make_stamp(self.evidence, gate, weights=weights, global_step=trainer.global_step)

    def verdict(self, gate: RiskGate | None = None) -> Verdict:
        """Judge the run as it stands; call `drain` first for the newest audits."""
        return self.evidence.verdict(self.gate if gate is None else gate)

    def log_verdict(self, verdict: Verdict, *, checkpoint: str, released: bool) -> None:
        """Note a gate's decision about a checkpoint in the run folder."""
        with self.faults.guard():
            self._publisher.log_verdict(verdict, checkpoint=checkpoint, released=released)

    def drain(self, trainer: Trainer, *, wait: float | None = None) -> None:
        """Collect finished audits and log them; with `wait`, give those under way that many seconds.

        Must be called on the main thread, and in several processes by all of them: they exchange their results.
        """
        if self._collector is not None:
            self._collector.drain(trainer, wait=wait)


def _resolve_settings(settings: AuditSettings | None, attack: Attack | None, budget: Budget | None) -> AuditSettings:
    settings = AuditSettings() if settings is None else settings
    if attack is not None:
        settings = replace(settings, attack=attack)
    if budget is not None:
        settings = replace(settings, budget=budget)
    return settings.with_defaults(analysis=True, confirm=DEFAULT_CANDIDATES, rungs=True)


def _resolve_pairs(log_images: bool | int) -> int:
    if log_images < 0:
        raise InvalidInputError(f"log_images: expected True, False or a number of pairs >= 0, got {log_images!r}.")
    return DEFAULT_PAIRS if log_images is True else int(log_images)


def _resolve_threat_model(view: View | None, threat_model: ThreatModel | None) -> ThreatModel:
    if threat_model is None:
        return ThreatModel(view="local" if view is None else view)
    if view is not None and view != threat_model.view:
        raise InvalidInputError(
            f"view={view!r} contradicts the threat model's view={threat_model.view!r}; "
            f"say it once: threat_model=ThreatModel(view={view!r}, ...)."
        )
    return threat_model


def _describe_settings(audit: GradAudit, threat_model: ThreatModel, layers: Sequence[str]) -> dict[str, str]:
    """Return the settings of a run as text, for its evidence."""
    attack = audit.settings.attack
    return {
        "attack": f"{default_attack().name}()" if attack is None else repr(attack),
        "budget": repr(audit.settings.budget),
        "schedule": repr(audit.schedule),
        "threat_model": repr(threat_model),
        "gate": repr(audit.gate),
        "executor": str(audit.executor),
        "max_overhead": str(audit.limits.max_overhead),
        "seed": str(audit.settings.seed),
        "layers": ", ".join(layers),
    }

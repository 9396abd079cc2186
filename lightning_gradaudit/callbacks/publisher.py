"""What is published of audits and verdicts: run log, loggers, callback metrics, progress bar."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric
from torchvision.utils import make_grid

from lightning_gradaudit.audit.engine_check import EngineCheck
from lightning_gradaudit.audit.record import AuditRecord
from lightning_gradaudit.audit.record_checks import check_record
from lightning_gradaudit.callbacks.curves import CURVES, layer_curve, row, user_metrics
from lightning_gradaudit.callbacks.exchange import RankExchange
from lightning_gradaudit.callbacks.faults import FaultLog
from lightning_gradaudit.callbacks.loggers import Sink, describe, sink
from lightning_gradaudit.capture.trainer_state import live_callback_metrics, logged_step
from lightning_gradaudit.risk.gate import RiskGate
from lightning_gradaudit.risk.run_log import RunLog
from lightning_gradaudit.risk.verdict import Verdict

UNKNOWN_RISK = 1.0
"""What `trainer.callback_metrics` says before the first valid audit: unknown counts as the worst."""


class Publisher:
    """Publish finished audits, and the risk of the run.

    Args:
        name: Prefix of every key.
        gate: Judges the run.
        metrics: Further torchmetrics metrics, by name.
        pairs: Most image pairs shown of an audit; 0: images are not published.
        exchange: Holds the run's history.
        faults: Keeps failures of loggers out of training.
        run_log: The run's log; None: none is kept in this process.
    """

    def __init__(
        self,
        *,
        name: str,
        gate: RiskGate,
        metrics: Mapping[str, Metric],
        pairs: int,
        exchange: RankExchange,
        faults: FaultLog,
        run_log: RunLog | None,
    ) -> None:
        self.name, self.gate, self.metrics, self.pairs = name, gate, metrics, pairs
        self.exchange, self.faults, self.run_log = exchange, faults, run_log
        self._layers: Sequence[str] = ()

    @property
    def needs_images(self) -> bool:
        """Whether images of an audit are published, or given to metrics."""
        return bool(self.pairs or self.metrics)

    def open(self, trainer: Any, layers: Sequence[str]) -> None:
        """Begin the run's log, and declare the curves to the loggers.

        Args:
            trainer: Of the run.
            layers: Names of the layers that have a curve.
        """
        self._layers = layers
        if self.run_log is not None:
            with self.faults.guard():
                self.run_log.begin(self.exchange.history)
        keys = [f"{self.name}/{key}" for key in (*CURVES, *map(layer_curve, layers), *self.metrics)]
        self._write(trainer, lambda logger: logger.declare(keys), what="declaring curves to")

    def accept(self, trainer: Any, record: AuditRecord) -> None:
        """Keep a finished audit and publish it; its images only where that was asked for."""
        check_record(record)
        history = self.exchange.history
        history.add(record.without_images())
        verdict = history.verdict(self.gate, prove=False)
        values = row(
            record,
            verdict,
            lag_steps=logged_step(trainer) - record.step,
            age_steps=self._age(trainer),
            dropped=history.dropped,
            skipped=history.skipped,
            failed=len(history.faults),
            layers=self._layers,
        )
        picture = pairs_picture(record, self.pairs)
        if self.run_log is not None:
            line = record.to_dict() | {"risk": verdict.to_dict(), "lag_steps": values["lag_steps"]}
            with self.faults.guard():
                self.run_log.add_record(line, picture)
        self.publish_risk(trainer, verdict)
        values |= user_metrics(self.metrics, record.published(self.gate.max_risk))
        named = {f"{self.name}/{key}": value for key, value in values.items()}
        self._write(trainer, lambda logger: logger.scalars(named, step=record.step))
        if picture is not None:
            key = f"{self.name}/reconstructions"
            self._write(trainer, lambda logger: logger.picture(picture, step=record.step, key=key))

    def log_table(self, trainer: Any) -> None:
        """Give every logger that holds tables the images that were exposed most."""
        images, step = self.exchange.history.most_exposed(), self.exchange.history.step or 0
        if images:
            self._write(trainer, lambda logger: logger.table(images, key=f"{self.name}/most_exposed", step=step))

    def publish_risk(self, trainer: Any, verdict: Verdict | None = None) -> None:
        """Set the risk and its age in callback metrics and progress bar.

        Args:
            trainer: Of the run.
            verdict: The run's; None: it is judged now.
        """
        risk = (self.exchange.history.verdict(self.gate, prove=False) if verdict is None else verdict).risk
        risk = risk if math.isfinite(risk) else UNKNOWN_RISK
        trainer.callback_metrics[f"{self.name}/risk"] = torch.tensor(risk)
        self.publish_age(trainer)
        # The live dict of the progress bar: `pl_module.log` would stamp the current step instead.
        trainer.progress_bar_metrics["risk"] = round(risk, 3)

    def publish_age(self, trainer: Any) -> None:
        """Set the age of the newest valid audit in the callback metrics."""
        live_callback_metrics(trainer)[f"{self.name}/age_steps"] = torch.tensor(float(self._age(trainer)))

    def note_engine(self, engine: EngineCheck | None) -> None:
        """Keep the result of the engine check; None: not known yet."""
        history = self.exchange.history
        if engine is not None and history.engine != engine:
            history.engine = engine
            if not engine.passed:
                self.faults.warn(str(engine))
            if self.run_log is not None:
                self.run_log.append("engine", engine.to_dict())

    def log_verdict(self, verdict: Verdict, *, checkpoint: str, released: bool) -> None:
        """Note a gate's decision about a checkpoint in the run's log."""
        if self.run_log is not None:
            decision = {"checkpoint": checkpoint, "released": released, "step": self.exchange.history.step}
            self.run_log.append("verdict", verdict.to_dict() | decision)

    def close(self, trainer: Any) -> None:
        """Note in the run's log where training ended."""
        ledger = self.exchange.history.privacy
        if self.run_log is not None and ledger is not None:
            self.run_log.append("privacy", {"ledger": ledger.to_dict()})
        if self.run_log is not None:
            self.run_log.append("step", {"step": logged_step(trainer), "lost": self.exchange.history.lost.to_dict()})

    def _age(self, trainer: Any) -> int:
        """Return the training steps since the newest valid audit, or since the start of the run."""
        records = reversed(self.exchange.history.records)
        return logged_step(trainer) - next((record.step for record in records if record.conclusive), 0)

    def _write(self, trainer: Any, write: Callable[[Sink], None], *, what: str = "logging to") -> None:
        """Write to every logger, in the process that logs; a logger that fails is no fault of the audit."""
        for logger in trainer.loggers if trainer.is_global_zero else ():
            with self.faults.guard(f"{what} {describe(logger)}", fault=False):
                write(sink(logger))


def pairs_picture(record: AuditRecord, count: int, *, enlarge: int = 3) -> Tensor | None:
    """Lay the most exposed true images (top row) over their reconstructions: (3, H, W) in [0, 1].

    Args:
        record: An audit; None is returned when it holds no images.
        count: Most pairs shown.
        enlarge: Screen pixels a pixel.
    """
    if record.truth is None or record.pixels is None or count < 1:
        return None
    worst = record.exposure.argsort(descending=True)[:count]
    rows = torch.cat([record.truth[worst], record.pixels[worst]]).float().clamp(0, 1)
    if rows.shape[1] not in (1, 3):  # no picture holds more channels
        rows = rows.mean(1, keepdim=True)
    rows = torch.nn.functional.interpolate(rows, scale_factor=enlarge, mode="nearest")
    return make_grid(rows, nrow=len(worst), padding=4, pad_value=1.0)

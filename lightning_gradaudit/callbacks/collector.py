"""From the queue of audits to what is published."""

from __future__ import annotations

import logging
import time
from dataclasses import replace
from typing import Any

from lightning_gradaudit.audit.auditor import Auditor
from lightning_gradaudit.audit.record import AuditRecord
from lightning_gradaudit.callbacks.exchange import RankExchange
from lightning_gradaudit.callbacks.faults import FaultLog
from lightning_gradaudit.callbacks.overhead import Limits
from lightning_gradaudit.callbacks.publisher import Publisher
from lightning_gradaudit.capture.trainer_state import logged_step, seconds_left
from lightning_gradaudit.errors import NonFiniteGradientError, UnsupportedError

log = logging.getLogger(__name__)

LEAST_SHARE_OF_NOISE = 0.9
"""Of the noise that DP-SGD declares: less is called out. An estimate from p weights is off by 1/√(2p)."""


class Collector:
    """Take finished audits from the queue, share them between processes, and have them published.

    Args:
        auditor: The queue.
        exchange: The run's history, and what processes tell each other.
        publisher: Publishes finished audits.
        faults: Counts failed ones.
        limits: What the audits may cost, for the message about skipped ones.
    """

    def __init__(
        self, *, auditor: Auditor, exchange: RankExchange, publisher: Publisher, faults: FaultLog, limits: Limits
    ) -> None:
        self.auditor, self.exchange, self.publisher, self.faults = auditor, exchange, publisher, faults
        self.limits = limits
        self._began: tuple[float, int] | None = None
        self._cut = 0
        self._advised = False

    def drain(self, trainer: Any, *, wait: float | None = None) -> None:
        """Collect finished audits and publish them; a collective where there are several processes.

        Args:
            trainer: Of the run.
            wait: Seconds to wait for audits under way; None: take what is there.
        """
        self.collect(trainer, wait=wait)
        if not self.exchange.ranks.is_single:
            with self.faults.guard():
                self._meet(trainer)

    def collect(self, trainer: Any, *, wait: float | None) -> None:
        """Collect this process' finished audits; in several processes they are published when these meet.

        Args:
            trainer: Of the run.
            wait: As in `drain`.
        """
        step = self.exchange.history.step = logged_step(trainer)
        self._began = self._began or (time.monotonic(), step)
        deadline = None if wait is None else time.monotonic() + wait
        if wait is None:
            ends = seconds_left(trainer, self._began)
            self.auditor.plan(training=ends, results=ends + self.limits.final_wait_seconds)
        while True:
            left = None if deadline is None else max(0.0, deadline - time.monotonic())
            try:
                records = self.auditor.collect(wait=left)
            except NonFiniteGradientError as error:
                self.exchange.lost.drop(step, in_a_row=False)
                self.faults.warn(str(error))
                continue
            except Exception as error:
                self.faults.add(error, "auditing")
                if self.faults.strict:
                    raise
                continue
            if self.exchange.ranks.is_single:
                with self.faults.guard():
                    self.publisher.note_engine(self.auditor.engine)
            if not records:  # an error in the queue separates the results before it from those behind it
                break
            for record in records:
                self._take(trainer, record)
            self.exchange.lost.cut_short += self.auditor.cut - self._cut
            self._cut = self.auditor.cut
            with self.faults.guard("telling how far audits are", fault=False):
                self._tell_progress(trainer)

    def _tell_progress(self, trainer: Any) -> None:
        """Show how far the audits are, in the log and the progress bar; say once what would fit where they do not."""
        log.info("GradAudit: %s.", self.auditor.progress)
        done = self.auditor.completed
        trainer.progress_bar_metrics["audits"] = f"{done} of {done + self.auditor.pending}"
        if not self._advised and not self.auditor.fits:
            self._advised = True
            log.info("GradAudit: not all audits will have their whole budget. %s", self.auditor.advice)

    def _take(self, trainer: Any, record: AuditRecord) -> None:
        self._check_noise(record)
        ranks = self.exchange.ranks
        if ranks.is_single:
            with self.faults.guard():
                self.publisher.accept(trainer, record)
        else:
            record = replace(record, rank=ranks.rank)
            kept = replace(record, reconstruction=None) if self.publisher.needs_images else record.without_images()
            self.exchange.outbox.records.append(kept)

    def _meet(self, trainer: Any) -> None:
        found = self.exchange.meet(self.auditor.engine)
        self.publisher.note_engine(found.engine)
        for fault in found.faults:
            self.faults.record(fault)
        for record in found.records:
            with self.faults.guard():
                self.publisher.accept(trainer, record)

    def _check_noise(self, record: AuditRecord) -> None:
        """Count it as a fault when DP-SGD adds less noise than it declares."""
        if record.noise < LEAST_SHARE_OF_NOISE * record.declared_noise:
            self.faults.add(
                UnsupportedError(
                    f"Opacus declares a noise multiplier of {record.declared_noise:g}, the gradient of step "
                    f"{record.step} carries {record.noise:.3g}: the privacy that is accounted for is not there."
                ),
                lasting=True,
            )

    def _end_early(self, trainer: Any, *, exchanged: bool) -> int:
        """Publish what unfinished audits have found, and count them; return how many there are."""
        left, records = self.auditor.pending, self.auditor.cut_short()
        for record in records:
            self._take(trainer, record)
        lost = self.exchange.lost if exchanged else self.exchange.history.lost
        lost.given_up += left - len(records)
        lost.cut_short += len(records)
        if left > len(records):
            self.faults.warn(f"{left - len(records)} unfinished audits were given up when training ended.")
        if left or self.auditor.cut:
            self.faults.warn(self.auditor.advice)
        return left

    def finish(self, trainer: Any, *, wait: float) -> None:
        """Collect, tabulate, and shut the queue down.

        Args:
            trainer: Of the run.
            wait: Seconds to wait for audits under way; 0 after an exception or another early end, when other processes
                may be gone: nothing is exchanged then.
        """
        self.auditor.end_by(wait)
        with self.faults.guard():
            self.collect(trainer, wait=wait)
        left = self.auditor.pending
        with self.faults.guard():
            left = self._end_early(trainer, exchanged=bool(wait))
        if wait and not self.exchange.ranks.is_single:
            with self.faults.guard():
                self._meet(trainer)
        if wait:
            with self.faults.guard("tabulating the most exposed images", fault=False):
                self.publisher.log_table(trainer)
        self.auditor.close(wait=left == 0)
        self.exchange.ranks.close()
        if self.exchange.history.skipped:
            log.info(
                "GradAudit: %d due audits were not made, to stay below max_overhead=%g.",
                self.exchange.history.skipped,
                self.limits.max_overhead,
            )
        with self.faults.guard():
            self.publisher.close(trainer)

"""From training batches to the queue of audits."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from lightning_gradaudit.audit.auditor import Auditor
from lightning_gradaudit.callbacks.exchange import RankExchange
from lightning_gradaudit.callbacks.faults import FaultLog
from lightning_gradaudit.callbacks.overhead import Limits, Overhead
from lightning_gradaudit.callbacks.reference_gallery import ReferenceGallery
from lightning_gradaudit.callbacks.schedules import Schedule
from lightning_gradaudit.capture.controller import Capture
from lightning_gradaudit.capture.trainer_state import batch_index, ends_optimizer_step, logged_step
from lightning_gradaudit.simulation.normalization import Normalization


class Sampler:
    """Record the gradients of due batches, and submit their snapshots.

    Its methods are called by the hooks of the callback, in the order of a training step.

    Args:
        schedule: Which batches are due.
        limits: What the audits may cost.
        capture: Records gradients.
        auditor: The queue.
        reference: The gallery, filled from the batches, and the normalization of images.
        exchange: Where dropped and skipped samples are counted.
        faults: Keeps failures out of training.

    Attributes:
        overhead: Times the training thread; a context around whatever the audit does on it.
        sampled: Whether the present batch is due.
    """

    def __init__(
        self,
        *,
        schedule: Schedule,
        limits: Limits,
        capture: Capture,
        auditor: Auditor,
        reference: ReferenceGallery,
        exchange: RankExchange,
        faults: FaultLog,
    ) -> None:
        self.schedule, self.limits, self.capture, self.auditor = schedule, limits, capture, auditor
        self.reference, self.exchange, self.faults = reference, exchange, faults
        self.overhead = Overhead(limits.max_overhead)
        self.sampled = False

    def start_batch(self, trainer: Any, module: Any, batch: Any, batch_idx: int) -> None:
        """Read the batch for the gallery, ask whether it is due, and open a recorder where it is."""
        if self.reference.needs_batches:
            with self.faults.guard():
                self.reference.add_batch(batch)
        self.sampled = False
        with self.faults.guard("asking the schedule", lasting=True):
            self.sampled = bool(self.schedule(batch_index(trainer)))
        if self.sampled and self.limits.max_overhead is not None:
            self.sampled = False
            with self.faults.guard():  # all processes meet here, and decide alike
                self.sampled = self.overhead.allows(self.capture.ranks.gather(self.overhead.spent()))
                self.exchange.history.lost.skipped += not self.sampled
        if self.sampled or self.capture.waiting:
            with self.faults.guard():
                self._record_batch(trainer, module, batch, batch_idx)

    def _record_batch(self, trainer: Any, module: Any, batch: Any, batch_idx: int) -> None:
        step = self.exchange.history.step = logged_step(trainer)
        room = self.auditor.pending < self.limits.queue_size  # what would be dropped is not even copied
        kept = self.capture.batch_start(trainer, module, batch, batch_idx, due=self.sampled, room=room, step=step)
        self.exchange.count_sample(step, due=self.sampled, dropped=not kept)

    def after_backward(self, trainer: Any, module: Any) -> None:
        """Tell the open recorder that a backward pass has ended."""
        if (recorder := self.capture.recorder) is not None:
            with self._recording(trainer, module):
                recorder.note_draws()
                recorder.after_backward()

    def before_optimizer_step(self, trainer: Any, module: Any, optimizer: Any) -> None:
        """Tell the open recorder that an optimizer is about to step."""
        if (recorder := self.capture.recorder) is not None:
            with self._recording(trainer, module):
                recorder.before_optimizer_step(optimizer)

    def before_zero_grad(self, trainer: Any, module: Any) -> None:
        """Tell the open recorder that gradients are about to be zeroed."""
        if (recorder := self.capture.recorder) is not None:
            with self._recording(trainer, module):
                recorder.before_zero_grad()

    def end_batch(self, trainer: Any, module: Any) -> None:
        """Tell the open recorder that the batch has ended."""
        if (recorder := self.capture.recorder) is not None:
            with self._recording(trainer, module, stepped=ends_optimizer_step(trainer)):
                recorder.note_draws()
                recorder.end_of_batch()

    def end_training(self, trainer: Any, module: Any) -> None:
        """Tell the open recorder that there will be no further batch."""
        if (recorder := self.capture.recorder) is not None:
            with self._recording(trainer, module, stepped=True):
                recorder.end_of_training()

    @contextmanager
    def _recording(self, trainer: Any, module: Any, *, stepped: bool = False) -> Iterator[None]:
        """Time and guard what the recorder is told, then submit its snapshot if it is complete."""
        seconds = self.capture.seconds
        with self.overhead, self.faults.guard():
            yield
            if self.capture.ready(stepped=stepped):
                snapshot = self.capture.take(trainer, module, self.reference.normalization or Normalization())
                if snapshot is not None and not self.auditor.submit(snapshot):
                    self.exchange.count_sample(snapshot.step, due=self.sampled, dropped=True)
        self.overhead.add(self.capture.seconds - seconds)

    @property
    def should_collect(self) -> bool:
        """Whether finished audits are collected after this batch: several processes do so together, when it is due."""
        return self.auditor.pending > 0 if self.capture.ranks.is_single else self.sampled

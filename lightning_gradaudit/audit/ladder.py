"""The rungs of several audits on one executor: short ones first."""

from __future__ import annotations

import math
import time
from concurrent.futures import Executor, Future
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass, field, replace
from threading import Condition
from typing import Any

import torch

from lightning_gradaudit.audit.engine import audit_snapshot
from lightning_gradaudit.audit.record import AuditRecord
from lightning_gradaudit.audit.rungs import combined, ended_early
from lightning_gradaudit.audit.settings import AuditSettings
from lightning_gradaudit.execution.executors import (
    InlineExecutor,
    accepts_deferred,
    is_broken,
    leaves_process,
    workers_of,
)
from lightning_gradaudit.execution.remote import Deferred
from lightning_gradaudit.metrics.baseline import Baseline
from lightning_gradaudit.simulation.snapshot import Snapshot
from lightning_gradaudit.utils.digests import ImageKey

HOPELESS = 3.0
"""Times the time that is left which a last rung may be expected to take: a pace read from a few evaluations, in which
there is more than the attack, may be as far off."""


def _run_job(
    snapshot: Snapshot, settings: AuditSettings, baseline: Baseline, image_key: ImageKey, ready: Any
) -> AuditRecord:
    """Audit one snapshot in the worker, on a CUDA stream of its own where there is one."""
    with ExitStack() as stack:
        for context in _side_stream(snapshot.observation.device, settings.device, ready):
            stack.enter_context(context)
        return audit_snapshot(snapshot, settings, baseline=baseline, image_key=image_key)


def _fetched(snapshot: Snapshot, ready: Any) -> Snapshot:
    """Return a snapshot on the CPU; the training stream does not wait for the copies."""
    with ExitStack() as stack:
        for context in _side_stream(snapshot.observation.device, None, ready):
            stack.enter_context(context)
        return snapshot.to("cpu")


def _side_stream(source: torch.device, target: str | None, ready: Any) -> list[AbstractContextManager[Any]]:
    """Order a side stream behind the capture; the training stream never waits for it.

    The record comes back on the CPU, so the worker has synchronised its own stream before it lets go of the
    snapshot: no `record_stream` is needed. Autograd's device thread is shared with training, so the worker's
    backward passes run on its own thread.
    """
    if source.type != "cuda" or ready is None:
        return []
    stream = torch.cuda.Stream(device=target if target is not None else source)
    stream.wait_event(ready)
    return [torch.cuda.stream(stream), torch.autograd.set_multithreading_enabled(False)]


class Parcel:
    """A snapshot as its audit's rungs send it: one that leaves the process is copied to the CPU once.

    Args:
        snapshot: The step.
    """

    def __init__(self, snapshot: Snapshot) -> None:
        self.device = snapshot.observation.device
        self._snapshot = snapshot
        self._ready: Any = None
        if self.device.type == "cuda":
            self._ready = torch.cuda.current_stream(self.device).record_event()

    def arguments(self, executor: Executor) -> tuple[Any, Any]:
        """Return the first and the last argument of a job: the snapshot and the event behind which it may be read."""
        if not leaves_process(executor):
            return self._snapshot, self._ready
        return Deferred(self._on_cpu) if accepts_deferred(executor) else self._on_cpu(), None

    def _on_cpu(self) -> Snapshot:
        self._snapshot, self._ready = _fetched(self._snapshot, self._ready), None
        return self._snapshot


def _failed(future: Future[Any]) -> bool:
    return future.cancelled() or future.exception() is not None


@dataclass(eq=False)
class Audit:
    """One audit in the queue.

    Attributes:
        number: In the order of submission.
        step: The logger's step.
        parcel: What its jobs are given; None once the last rung was handed over.
        baseline: Gallery and null as they were at submission, for all rungs.
        futures: Of the rungs that were handed over.
        collected: How many of them the caller has seen.
        record: What they found together; None before the first.
        started: When the newest of them was handed over.
        ended: No further rung is handed over.
    """

    number: int
    step: int
    parcel: Parcel | None
    baseline: Baseline
    futures: list[Future[AuditRecord]] = field(default_factory=list)
    collected: int = 0
    record: AuditRecord | None = None
    started: float = 0.0
    ended: bool = False

    @property
    def running(self) -> bool:
        """Whether a rung was handed over and has not ended."""
        return bool(self.futures) and not self.futures[-1].done()


class Ladder:
    """Audits under way. Threads of the executor hand over further rungs as earlier ones end.

    Shorter rungs go first, and of equal ones the audit that was submitted first. Every first rung is handed over at
    once, a later one when a worker is free.

    Args:
        rungs: Settings of each rung.
        image_key: Tells the images of the run apart.

    Attributes:
        audits: Not yet collected to their end, oldest first.
        changed: Guards them, and is notified when a rung ends.
        pace: Seconds for each evaluation of the newest rung that ended; NaN before.
    """

    def __init__(self, rungs: list[AuditSettings], image_key: ImageKey) -> None:
        self.rungs, self.image_key = rungs, image_key
        self.audits: list[Audit] = []
        self.changed = Condition()
        self.executor: Executor | None = None
        self.pace = math.nan
        self._plan = math.inf, math.inf  # when samples cease, when results do
        self._arrivals: list[float] = []
        self._first_seconds = 0.0

    def plan(self, training: float, results: float) -> None:
        """Note how many seconds samples will come, and results be read."""
        now = time.monotonic()
        with self.changed:
            self._plan = now + training, now + results

    @property
    def stalled(self) -> bool:
        """Whether no rung is under way, and none will be begun in the time that is left."""
        with self.changed:
            self.hand_over()  # what a thread of the executor may be about to do
            return not any(audit.running for audit in self.audits)

    def add(self, audit: Audit) -> None:
        """Queue an audit."""
        with self.changed:
            self.audits.append(audit)
            self._arrivals.append(time.monotonic())
            try:
                self.hand_over()
            finally:
                if not audit.futures:  # the executor refused it, or the user stopped it
                    self.audits.remove(audit)

    def hand_over(self) -> None:
        """Hand over what the executor has room for."""
        with self.changed:
            while self.executor is not None and not is_broken(self.executor) and (audit := self._next(self.executor)):
                self._send(audit, self.executor)

    def _next(self, executor: Executor) -> Audit | None:
        waiting = [audit for audit in self.audits if self._may_go_on(audit, executor)]
        first = min(waiting, key=lambda audit: len(audit.futures), default=None)
        room = sum(audit.running for audit in self.audits) < workers_of(executor)
        return first if first is not None and (room or not first.futures) else None

    def _may_go_on(self, audit: Audit, executor: Executor) -> bool:
        """Whether an audit has a further rung, which is not without a chance to end."""
        if audit.ended or audit.running or (audit.futures and _failed(audit.futures[-1])):
            return False
        if not audit.futures or isinstance(executor, InlineExecutor) or not math.isfinite(self.pace):
            return True
        count, left = self.rungs[-1].budget.evaluations or 0, self._plan[1] - time.monotonic()
        return len(audit.futures) < len(self.rungs) - 1 or count * self.pace <= HOPELESS * left

    def _settings(self, rung: int, executor: Executor) -> AuditSettings:
        """Return the settings of a rung; one between the first and the last gets no more time than there is.

        What the first rungs of the samples to come will take is set aside.
        """
        settings = self.rungs[rung]
        if not 0 < rung < len(self.rungs) - 1 or isinstance(executor, InlineExecutor):
            return settings
        now = time.monotonic()
        training, results = (max(0.0, until - now) for until in self._plan)
        if math.isinf(results):
            return settings
        distance = (now - self._arrivals[0]) / len(self._arrivals)
        reserved = self._first_seconds * training / max(distance, 1e-3)
        seconds = max((results - reserved) / 2, self._first_seconds, 1.0)  # half, for there is the analysis besides
        limit = settings.budget.seconds
        return replace(settings, budget=replace(settings.budget, seconds=min(seconds, limit or seconds)))

    def _send(self, audit: Audit, executor: Executor) -> None:
        assert audit.parcel is not None
        rung = len(audit.futures)
        snapshot, ready = audit.parcel.arguments(executor)
        if rung == len(self.rungs) - 1:
            audit.parcel, audit.ended = None, True
        audit.started = time.monotonic()
        future = executor.submit(
            _run_job, snapshot, self._settings(rung, executor), audit.baseline, self.image_key, ready
        )
        audit.futures.append(future)
        future.add_done_callback(lambda done: self._rung_ended(audit, done))

    def _rung_ended(self, audit: Audit, future: Future[AuditRecord]) -> None:
        with self.changed:
            if _failed(future):
                audit.parcel, audit.ended = None, True
            self.hand_over()
            self.changed.notify_all()

    def next_result(self) -> Audit | None:
        """Return an audit with a rung that ended and was not collected; rungs of one length in the order of audits."""
        for rung in range(len(self.rungs)):
            audit = next((audit for audit in self.audits if audit.collected == rung), None)
            if audit is not None and len(audit.futures) > rung and audit.futures[rung].done():
                return audit
        return None

    def take(self, audit: Audit) -> AuditRecord:
        """Return what an audit found with the rung that `next_result` told of."""
        record = audit.futures[audit.collected - 1].result()
        pace = record.seconds / max(1, record.evaluations)
        self.pace = pace if audit.collected > 1 or math.isnan(self.pace) else min(pace, self.pace)
        self._first_seconds = record.seconds if audit.collected == 1 else self._first_seconds
        if len(self.rungs) > 1:
            record = replace(record, rung=audit.collected, rungs=len(self.rungs), audit=audit.number)
        audit.record = combined(audit.record, record)
        return audit.record

    def cut_short(self) -> list[AuditRecord]:
        """Return the records of audits that have some, but do not go on."""
        records = [audit.record for audit in self.audits if audit.record is not None]
        return [ended_early(record, self.rungs[-1]) for record in records]

    def progress(self) -> str:
        """Return how many audits are under way, and when the next result is due, in one sentence."""
        running = [audit for audit in self.audits if audit.running]
        text = f"{len(running)} running, {len(self.audits) - len(running)} waiting"
        if not math.isfinite(self.pace):
            return text
        text += f", {self.pace:.2g} s for each evaluation"
        due = [self._seconds(audit) - (time.monotonic() - audit.started) for audit in running]
        return f"{text}, next result in about {max(0.0, min(due)):.0f} s" if due else text

    def advice(self) -> str:
        """Return what would let unfinished audits end, in one sentence or two."""
        text = "What would fit: "
        count = self.rungs[-1].budget.evaluations
        if count is not None and math.isfinite(self.pace) and self._arrivals:
            whole, spent = count * self.pace, time.monotonic() - self._arrivals[0]
            share = max(1, round(whole * len(self._arrivals) / max(spent, 1e-3)))
            text = (
                f"An evaluation takes {self.pace:.2g} s on this model, an audit of {count} about {whole / 60:.2g} min; "
                f"{len(self._arrivals)} were begun in {spent / 60:.2g} min. {text}every_n_steps= {share} times as "
                f"large, budget=Budget(evaluations={max(1, count // share)}), "
            )
        return (
            text
            + "settings=AuditSettings(compile=True) or AuditSettings(device=...) where another device is to be had, "
            "threat_model=ThreatModel(batch_size=1) to ask about single images."
        )

    def _seconds(self, audit: Audit) -> float:
        """Return how long the rung under way takes."""
        budget = self.rungs[len(audit.futures) - 1].budget
        by_count = math.inf if budget.evaluations is None else budget.evaluations * self.pace
        return min(by_count, math.inf if budget.seconds is None else budget.seconds)

    def close(self, *, cancel: bool) -> None:
        """Hand nothing more over, and cancel what has not begun."""
        with self.changed:
            self.executor = None
            audits, self.audits = self.audits, []
        for audit in audits:
            if audit.futures and cancel:
                audit.futures[-1].cancel()

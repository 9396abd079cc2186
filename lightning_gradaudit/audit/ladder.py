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

from lightning_gradaudit.audit.engine import ATTACK_SHARE, audit_snapshot
from lightning_gradaudit.audit.record import AuditRecord
from lightning_gradaudit.audit.rungs import MEASURED_ONCE, combined, ended_early, is_cut
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
from lightning_gradaudit.utils.time_limit import EndNotice, limited_time

WHOLE_SHARE = 0.5
"""Of the time left, what a rung with all evaluations may take while others wait; a longer one gets an equal part."""
EASILY = 4.0
"""Times a rung fits into its part of the time before it is not limited: without a limit its result does not depend on
the machine's speed."""
LEAST_GAIN = 1.5
"""Evaluations of a rung that is limited by time, over those its audit has made already; with fewer it is not begun."""
ANALYSIS_EVALUATIONS = 60
"""What an analysis costs, in evaluations: a first guess; the first one that ends is measured."""
TAIL_SHARE = 0.1
"""Of the time until a running rung must have ended, what is left to score its result."""
MOST_TO_COME = 4
"""Most samples to come that time is set aside for."""


def _run_job(
    snapshot: Snapshot, settings: AuditSettings, baseline: Baseline, image_key: ImageKey, ready: Any, notice: EndNotice
) -> AuditRecord:
    """Audit one snapshot in the worker, on a CUDA stream of its own where there is one."""
    with ExitStack() as stack:
        stack.enter_context(limited_time(notice=notice))
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
        notice: Tells the rung under way to end.
        sent: Which rungs were handed over, by index.
        seconds: What each was given; infinite without a limit.
        futures: Of these rungs.
        collected: How many of them the caller has seen.
        record: What they found together; None before the first.
        started: When the newest of them was handed over.
        ended: No further rung is handed over.
    """

    number: int
    step: int
    parcel: Parcel | None
    baseline: Baseline
    notice: EndNotice = field(default_factory=EndNotice)
    sent: list[int] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    futures: list[Future[AuditRecord]] = field(default_factory=list)
    collected: int = 0
    record: AuditRecord | None = None
    started: float = 0.0
    ended: bool = False

    @property
    def running(self) -> bool:
        """Whether a rung was handed over and has not ended."""
        return bool(self.futures) and not self.futures[-1].done()

    @property
    def is_collected(self) -> bool:
        """Whether the caller has seen all that there will be."""
        return self.ended and self.collected == len(self.futures)


class Ladder:
    """Audits under way. Threads of the executor hand over further rungs as earlier ones end.

    Shorter rungs go first, and of equal ones the audit that was submitted first. Every first rung is handed over at
    once, a later one when a worker is free. Where it is known when results cease to be read, later rungs are chosen and
    limited so that audits end by then.

    Args:
        rungs: Settings of each rung.
        image_key: Tells the images of the run apart.

    Attributes:
        audits: Not yet collected to their end, oldest first.
        changed: Guards them, and is notified when a rung ends.
        pace: Seconds of an attack for each evaluation, the least of the rungs so far; NaN before.
    """

    def __init__(self, rungs: list[AuditSettings], image_key: ImageKey) -> None:
        self.rungs, self.image_key = rungs, image_key
        self.audits: list[Audit] = []
        self.changed = Condition()
        self.executor: Executor | None = None
        self.pace = self._analysis_seconds = math.nan
        self._plan = math.inf, math.inf  # when samples cease, when results do
        self._arrivals: list[float] = []
        self._first_seconds = 0.0

    def plan(self, training: float, results: float) -> None:
        """Note how many seconds samples will come, and results be read."""
        now = time.monotonic()
        with self.changed:
            self._plan = now + training, now + results

    def end_by(self, seconds: float) -> None:
        """Let what is under way end in this time: no sample comes any more, and no result is read later."""
        self.plan(0.0, seconds)
        with self.changed:
            left, share = self._time_left()
            for audit in self.audits:
                if audit.running and not isinstance(self.executor, InlineExecutor):
                    elapsed = time.monotonic() - audit.started
                    fits = audit.sent[-1] == 0 or self._expected(audit.sent[-1]) - elapsed <= max(share, left / 2)
                    given = left if fits else share
                    audit.notice.give((1 - TAIL_SHARE) * given)
                    audit.seconds[-1] = min(audit.seconds[-1], elapsed + given)

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
            while self.executor is not None and not is_broken(self.executor):
                found = self._next(self.executor)
                if found is None:
                    return
                self._send(*found, self.executor)

    def _next(self, executor: Executor) -> tuple[Audit, int, float] | None:
        """Return the audit that goes on next, with which rung and in how many seconds; None: none does now."""
        planned = [(audit, self._next_rung(audit, executor)) for audit in self.audits]
        waiting = [(audit, *rung) for audit, rung in planned if rung is not None]
        first = min(waiting, key=lambda one: len(one[0].futures), default=None)
        room = sum(audit.running for audit in self.audits) < workers_of(executor)
        return first if first is not None and (room or not first[0].futures) else None

    def _next_rung(self, audit: Audit, executor: Executor) -> tuple[int, float] | None:
        """Return the next rung of an audit and the seconds it is given; None: there is none that would tell more.

        A rung that fits easily, or has a right to the whole budget, is not limited; `end_by` may still end it.
        """
        if audit.ended or audit.running or (audit.futures and _failed(audit.futures[-1])):
            return None
        rung, last = (audit.sent[-1] + 1 if audit.sent else 0), len(self.rungs) - 1
        left, share = self._time_left()
        known = math.isfinite(self.pace) and math.isfinite(left) and not isinstance(executor, InlineExecutor)
        if not rung or not known:
            return rung, math.inf
        if rung < last and self._expected(rung) <= share:
            return rung, (math.inf if EASILY * self._expected(rung) <= share else share)
        measures = rung <= MEASURED_ONCE and bool(self.rungs[MEASURED_ONCE].analysis)
        if self._expected(last) + measures * self._analysis_cost <= max(share, WHOLE_SHARE * left):
            return last, math.inf
        made = self.rungs[audit.sent[-1]].budget.evaluations or 0
        attacks = LEAST_GAIN * made * self.pace / ATTACK_SHARE
        least = attacks + measures * min(self._analysis_cost, attacks)
        return (last, max(share, least)) if least <= left else None

    def _time_left(self) -> tuple[float, float]:
        """Return the seconds left for later rungs, and an equal part of them for each audit there is or will be.

        What the first rungs of the samples to come will take is set aside.
        """
        now = time.monotonic()
        training, results = (max(0.0, until - now) for until in self._plan)
        if math.isinf(results):
            return results, results
        distance = (now - self._arrivals[0]) / len(self._arrivals) if self._arrivals else math.inf
        coming = min(MOST_TO_COME, training / max(distance, 1e-3))
        first = sum(audit.running and audit.sent[-1] == 0 for audit in self.audits)
        left = max(0.0, results - self._first_seconds * (coming + first))
        going_on = sum(not audit.ended or audit.running for audit in self.audits)
        return left, left / max(1.0, going_on + coming)

    def _expected(self, rung: int) -> float:
        """Return how many seconds a rung takes that is not limited; NaN: unknown."""
        budget = self.rungs[rung].budget
        by_count = math.inf if budget.evaluations is None else budget.evaluations * self.pace
        whole = by_count + (self._analysis_cost if self.rungs[rung].analysis else 0.0)
        return min(whole, math.inf if budget.seconds is None else budget.seconds)

    @property
    def _analysis_cost(self) -> float:
        return self._analysis_seconds if math.isfinite(self._analysis_seconds) else ANALYSIS_EVALUATIONS * self.pace

    def _settings(self, audit: Audit, rung: int, seconds: float) -> AuditSettings:
        """Return the settings of a rung; what a rung that was left out would have measured, it measures."""
        settings = self.rungs[rung]
        if len(self.rungs) > MEASURED_ONCE < rung and MEASURED_ONCE not in audit.sent:
            once = self.rungs[MEASURED_ONCE]
            settings = replace(settings, analysis=once.analysis, confirm=once.confirm)
        if math.isinf(seconds):
            return settings
        given = min(max(seconds, 1e-3), settings.budget.seconds or math.inf)
        return replace(settings, budget=replace(settings.budget, seconds=given))

    def _send(self, audit: Audit, rung: int, seconds: float, executor: Executor) -> None:
        assert audit.parcel is not None
        snapshot, ready = audit.parcel.arguments(executor)
        settings = self._settings(audit, rung, seconds)
        if rung == len(self.rungs) - 1:
            audit.parcel, audit.ended = None, True
        audit.started = time.monotonic()
        audit.notice.withdraw()
        future = executor.submit(_run_job, snapshot, settings, audit.baseline, self.image_key, ready, audit.notice)
        audit.sent.append(rung)
        audit.seconds.append(seconds)
        audit.futures.append(future)
        future.add_done_callback(lambda done: self._rung_ended(audit, done))

    def _rung_ended(self, audit: Audit, future: Future[AuditRecord]) -> None:
        with self.changed:
            if _failed(future):
                audit.parcel, audit.ended = None, True
            else:
                self._note_pace(future.result(), first=audit.sent[-1] == 0)
            self.hand_over()
            self.changed.notify_all()

    def _note_pace(self, record: AuditRecord, *, first: bool) -> None:
        analysis = 0.0 if record.leakage is None else record.leakage.seconds
        pace = (record.seconds - analysis) / max(1, record.evaluations)
        self.pace = min(pace, pace if math.isnan(self.pace) else self.pace)
        if analysis:
            self._analysis_seconds = analysis
        if first:
            self._first_seconds = record.seconds

    def next_result(self) -> Audit | None:
        """Return an audit with a rung that ended and was not collected; rungs of one length in the order of audits."""
        for count in range(len(self.rungs)):
            audit = next((audit for audit in self.audits if audit.collected == count), None)
            if audit is not None and len(audit.futures) > count and audit.futures[count].done():
                return audit
        return None

    def take(self, audit: Audit) -> AuditRecord:
        """Return what an audit found with the rung that `next_result` told of."""
        at = audit.collected - 1
        record = audit.futures[at].result()
        rung, rungs = audit.sent[at] + 1, len(self.rungs)
        cut = rung == rungs and is_cut(record, self.rungs[-1].budget, audit.seconds[at])
        if cut:  # its last rung has not ended
            rungs = max(2, rungs)
            rung = rungs - 1
        if rungs > 1:
            record = replace(record, rung=rung, rungs=rungs, audit=audit.number)
        record = combined(audit.record, record)
        audit.record = ended_early(record, self.rungs[-1]) if cut else record
        return audit.record

    def cut_short(self) -> list[AuditRecord]:
        """Return the records of audits that have some, but do not go on."""
        records = [audit.record for audit in self.audits if audit.record is not None]
        return [ended_early(record, self.rungs[-1]) for record in records]

    @property
    def fits(self) -> bool:
        """Whether a last rung with all evaluations fits into the time left, as far as that is known."""
        left, share = self._time_left()
        return not self._expected(len(self.rungs) - 1) > max(share, WHOLE_SHARE * left)  # NaN: not known

    def progress(self) -> str:
        """Return how many audits are under way, and when the next result is due, in one sentence."""
        running = [audit for audit in self.audits if audit.running]
        text = f"{len(running)} running, {len(self.audits) - len(running)} waiting"
        if not math.isfinite(self.pace):
            return text
        text += f", {self.pace:.2g} s for each evaluation"
        due = [
            min(self._expected(audit.sent[-1]), audit.seconds[-1]) - (time.monotonic() - audit.started)
            for audit in running
        ]
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

    def close(self, *, cancel: bool) -> None:
        """Hand nothing more over, and cancel what has not begun."""
        with self.changed:
            self.executor = None
            audits, self.audits = self.audits, []
        for audit in audits:
            if audit.futures and cancel:
                audit.futures[-1].cancel()
            audit.notice.withdraw()

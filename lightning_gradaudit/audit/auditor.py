"""A bounded queue of audits that needs no Trainer and never stalls its caller."""

from __future__ import annotations

import time
from concurrent.futures import CancelledError, Executor, Future
from concurrent.futures import wait as wait_for
from typing import TYPE_CHECKING, Any, get_args

import torch

from lightning_gradaudit.attacks.defaults import default_attack
from lightning_gradaudit.attacks.reconstruction import Outcome
from lightning_gradaudit.audit.engine_check import EngineCheck, check_engine
from lightning_gradaudit.audit.ladder import Audit, Ladder, Parcel
from lightning_gradaudit.audit.record import AuditRecord
from lightning_gradaudit.audit.rungs import rungs_of
from lightning_gradaudit.audit.settings import AuditSettings, SettingsChanges, changed_settings
from lightning_gradaudit.errors import AuditLostError, InvalidInputError, described
from lightning_gradaudit.execution.executors import (
    ExecutorName,
    is_broken,
    make_executor,
    shut_down,
)
from lightning_gradaudit.metrics.baseline import Baseline
from lightning_gradaudit.simulation.snapshot import Snapshot
from lightning_gradaudit.utils.digests import ImageKey
from lightning_gradaudit.utils.formatting import html_table

if TYPE_CHECKING:
    from typing_extensions import Unpack


def _error_of(future: Future[Any]) -> BaseException | None:
    """Return the error of a finished future.

    `future.exception()` and not `except` around `future.result()`, which would also catch the user's Ctrl-C.
    """
    try:
        return future.exception()
    except CancelledError as error:
        return error


def _for_training(error: BaseException, what: str) -> Exception:
    """Return what to raise into training; errors that would end the process, such as `SystemExit`, are wrapped."""
    if isinstance(error, CancelledError):
        lost = AuditLostError(f"the executor cancelled {what}.")
    elif isinstance(error, Exception):
        return error
    else:
        lost = AuditLostError(f"{what} ended with {described(error)}")
    lost.__cause__ = error
    return lost


class Auditor:
    """A bounded queue of audits that needs no Trainer and never stalls its caller.

    Args:
        settings: How to audit; None: `AuditSettings()`.
        baseline: Gallery and null; it grows with every finished audit.
        executor: Where audits run (see `executors.make_executor`).
        queue_size: Most unfinished audits; beyond it `submit` drops.
        engine_check: Attack the built-in reference before the first audit.
        changes: Fields of `AuditSettings` by name, as in `audit_snapshot`.

    Attributes:
        settings: How audits are made, defaults filled in.
        submitted, dropped, completed, failed: Counters.
        cut: Completed audits whose last rung ended before its budget, for want of time.
        engine: Result of the engine check; None until it is known.

    Raises:
        InvalidInputError: When an argument is out of range.
        TypeError: When a keyword is no field of `AuditSettings`.
    """

    def __init__(
        self,
        settings: AuditSettings | None = None,
        *,
        baseline: Baseline | None = None,
        executor: ExecutorName | Executor = "auto",
        queue_size: int = 4,
        engine_check: bool = True,
        **changes: Unpack[SettingsChanges],
    ) -> None:
        if queue_size < 1:
            raise InvalidInputError(f"queue_size must be >= 1, got {queue_size!r}.")
        if not isinstance(executor, Executor) and executor not in get_args(ExecutorName):
            raise InvalidInputError(
                f"executor: expected one of {get_args(ExecutorName)} or a concurrent.futures.Executor, "
                f"got {executor!r}."
            )
        settings = changed_settings(settings, changes, caller="Auditor()")
        self.settings = settings.with_defaults(analysis=False, confirm=0)
        self._ladder = Ladder(rungs_of(self.settings), ImageKey())
        self.baseline = Baseline() if baseline is None else baseline
        self.queue_size = queue_size
        self._wanted = executor
        self._executor: Executor | None = None
        self._owned = False
        self._engine: Future[EngineCheck] | None = None
        self._check_engine = engine_check
        self.engine: EngineCheck | None = None
        self.submitted = self.dropped = self.completed = self.failed = self.cut = 0

    @property
    def pending(self) -> int:
        """Audits submitted and not yet collected to their end."""
        return len(self._ladder.audits)

    @property
    def progress(self) -> str:
        """How many audits are done, running and waiting, and when the next result is due."""
        return f"audits: {self.completed} done, {self._ladder.progress()}"

    @property
    def fits(self) -> bool:
        """Whether whole audits fit into the time that is left, as far as that is known."""
        return not self.cut and self._ladder.fits

    def plan(self, *, training: float, results: float) -> None:
        """Say how long samples will come, and how long results are read, in seconds from now.

        Later rungs are then chosen and limited so that audits end by then.
        """
        self._ladder.plan(training, results)

    @property
    def advice(self) -> str:
        """What would let unfinished audits end, in one sentence or two."""
        return self._ladder.advice()

    def cut_short(self) -> list[AuditRecord]:
        """Return the records of audits of which some rungs ended, when there is no time for the others."""
        return self._ladder.cut_short()

    def end_by(self, seconds: float) -> None:
        """Let audits under way end in this time, with what they have found: no further snapshot comes."""
        self._ladder.end_by(seconds)

    def _repr_html_(self) -> str:
        """Show settings and counters in a notebook."""
        s = self.settings
        counters = {name: getattr(self, name) for name in ("pending", "submitted", "completed", "dropped", "failed")}
        shown: dict[str, Any] = {
            "attack": s.attack or default_attack(),
            "budget": s.budget,
            "engine check": self.engine or "no result yet",
            "gallery": 0 if self.baseline.gallery is None else len(self.baseline.gallery),
            **counters,
        }
        return html_table([["Auditor", ""], *([key, str(value)] for key, value in shown.items())], caption="")

    def submit(self, snapshot: Snapshot) -> bool:
        """Queue an audit; return False when the queue is full and the snapshot was dropped (and counted)."""
        if self.pending >= self.queue_size:
            self.dropped += 1
            return False
        self._start(snapshot.observation.device)
        self.submitted += 1
        self._ladder.add(Audit(self.submitted, snapshot.step, Parcel(snapshot), self.baseline.frozen()))
        return True

    def _start(self, device: torch.device) -> None:
        if self._executor is None:
            self._executor, self._owned = make_executor(self._wanted, device=device)
            if self._check_engine and self._engine is None:
                s = self.settings
                self._engine = self._executor.submit(check_engine, s.attack, s.budget, closed_forms=s.closed_forms)
        self._ladder.executor = self._executor

    def collect(self, *, wait: float | None = None) -> list[AuditRecord]:
        """Return finished audits, first in, first out; with `AuditSettings.rungs` also what each rung adds to one.

        Args:
            wait: Seconds to wait for those under way; None: take what is there.

        Raises:
            Exception: A worker's error, once, when its turn comes; audits before and after it are not lost.
        """
        deadline = None if wait is None else time.monotonic() + wait
        self._read_engine(deadline)
        records: list[AuditRecord] = []
        while self._ladder.audits and (audit := self._await(deadline)) is not None:
            if records and _error_of(audit.futures[audit.collected]) is not None:
                break  # hand over what is good first
            records.append(self._finish(audit))
        return records

    def _await(self, deadline: float | None) -> Audit | None:
        left = 0.0 if deadline is None else max(0.0, deadline - time.monotonic())
        with self._ladder.changed:
            found = self._ladder.next_result
            self._ladder.changed.wait_for(lambda: found() is not None or self._ladder.stalled, timeout=left)
            return found()

    def _finish(self, audit: Audit) -> AuditRecord:
        error = _error_of(audit.futures[audit.collected])
        audit.collected += 1
        with self._ladder.changed:
            if error is not None or audit.is_collected:
                self._ladder.audits.remove(audit)
                audit.notice.withdraw()
        if error is not None:
            self.failed += 1
            self._recover()
            raise _for_training(error, f"the audit of step {audit.step}")
        record = self._ladder.take(audit)
        if audit.is_collected:
            self.completed += 1
            self.cut += not record.finished
        attacked = record.finished and record.outcome is not Outcome.NOT_APPLICABLE
        if attacked and record.pixels is not None and record.truth is not None:
            self.baseline.remember(record.pixels, record.truth)
        return record

    def _read_engine(self, deadline: float | None) -> None:
        if self._engine is None or self.engine is not None:
            return
        left = 0.0 if deadline is None else max(0.0, deadline - time.monotonic())
        if not self._engine.done() and (left == 0 or not wait_for([self._engine], timeout=left).done):
            return
        error = _error_of(self._engine)
        if error is not None:
            self._engine = None
            self._recover()
            raise _for_training(error, "the engine check")
        self.engine = self._engine.result()

    def _recover(self) -> None:
        """Drop an executor that lost a worker process; the next submission makes a new one."""
        # The executor's state decides: an error of an earlier executor may arrive after the next one began.
        if self._executor is not None and self._owned and is_broken(self._executor):
            self._ladder.executor = None
            shut_down(self._executor, wait=False)
            self._executor = None
            device = next((audit.parcel.device for audit in self._ladder.audits if audit.parcel is not None), None)
            if device is not None:  # rungs that were waiting
                self._start(device)
                self._ladder.hand_over()

    def close(self, *, wait: bool = True) -> None:
        """Shut the executor down if it was made here; safe to call twice. Uncollected audits are given up."""
        cancel = wait or not self._owned  # on a user's own executor they would go on after training
        self._ladder.close(cancel=cancel)
        if self._engine is not None and cancel:
            self._engine.cancel()
        if self._executor is not None and self._owned:
            shut_down(self._executor, wait=wait)
        self._executor = None

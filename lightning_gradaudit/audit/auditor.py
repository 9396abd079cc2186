"""A bounded queue of audits that needs no Trainer and never stalls its caller."""

from __future__ import annotations

import time
from collections import deque
from concurrent.futures import CancelledError, Executor, Future
from concurrent.futures import wait as wait_for
from contextlib import AbstractContextManager, ExitStack
from functools import partial
from typing import TYPE_CHECKING, Any, get_args

import torch

from lightning_gradaudit.attacks.defaults import default_attack
from lightning_gradaudit.attacks.reconstruction import Outcome
from lightning_gradaudit.audit.engine import audit_snapshot
from lightning_gradaudit.audit.engine_check import EngineCheck, check_engine
from lightning_gradaudit.audit.record import AuditRecord
from lightning_gradaudit.audit.settings import AuditSettings, SettingsChanges, changed_settings
from lightning_gradaudit.errors import AuditLostError, InvalidInputError, described
from lightning_gradaudit.execution.executors import (
    ExecutorName,
    accepts_deferred,
    is_broken,
    leaves_process,
    make_executor,
    shut_down,
)
from lightning_gradaudit.execution.remote import Deferred
from lightning_gradaudit.metrics.baseline import Baseline
from lightning_gradaudit.simulation.snapshot import Snapshot
from lightning_gradaudit.utils.digests import ImageKey
from lightning_gradaudit.utils.formatting import html_table

if TYPE_CHECKING:
    from typing_extensions import Unpack


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
        self._image_key = ImageKey()
        self.baseline = Baseline() if baseline is None else baseline
        self.queue_size = queue_size
        self._wanted = executor
        self._executor: Executor | None = None
        self._owned = False
        self._pending: deque[tuple[int, Future[AuditRecord]]] = deque()
        self._engine: Future[EngineCheck] | None = None
        self._check_engine = engine_check
        self.engine: EngineCheck | None = None
        self.submitted = self.dropped = self.completed = self.failed = 0

    @property
    def pending(self) -> int:
        """Audits submitted and not yet collected."""
        return len(self._pending)

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
        executor = self._start(snapshot.observation.device)
        device = snapshot.observation.device
        ready = torch.cuda.current_stream(device).record_event() if device.type == "cuda" else None
        sent: Any = snapshot
        if leaves_process(executor):
            fetched = partial(_fetched, snapshot, ready)
            sent, ready = Deferred(fetched) if accepts_deferred(executor) else fetched(), None
        future = executor.submit(_run_job, sent, self.settings, self.baseline.frozen(), self._image_key, ready)
        self._pending.append((snapshot.step, future))
        self.submitted += 1
        return True

    def _start(self, device: torch.device) -> Executor:
        if self._executor is None:
            self._executor, self._owned = make_executor(self._wanted, device=device)
            if self._check_engine and self._engine is None:
                s = self.settings
                self._engine = self._executor.submit(check_engine, s.attack, s.budget, closed_forms=s.closed_forms)
        return self._executor

    def collect(self, *, wait: float | None = None) -> list[AuditRecord]:
        """Return finished audits, first in, first out.

        Args:
            wait: Seconds to wait for those under way; None: take what is there.

        Raises:
            Exception: A worker's error, once, when its turn comes; audits before and after it are not lost.
        """
        deadline = None if wait is None else time.monotonic() + wait
        self._read_engine(deadline)
        records: list[AuditRecord] = []
        while self._pending:
            step, future = self._pending[0]
            if not future.done():
                left = 0.0 if deadline is None else deadline - time.monotonic()
                if left <= 0 or not wait_for([future], timeout=left).done:
                    break
            failed = future.cancelled() or future.exception() is not None
            if failed and records:
                break  # hand over what is good first
            self._pending.popleft()
            records.append(self._finish(step, future))
        return records

    def _finish(self, step: int, future: Future[AuditRecord]) -> AuditRecord:
        error = _error_of(future)
        if error is not None:
            self.failed += 1
            self._recover()
            raise _for_training(error, f"the audit of step {step}")
        record = future.result()
        self.completed += 1
        if record.pixels is not None and record.truth is not None and record.outcome is not Outcome.NOT_APPLICABLE:
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
            shut_down(self._executor, wait=False)
            self._executor = None

    def close(self, *, wait: bool = True) -> None:
        """Shut the executor down if it was made here; safe to call twice. Uncollected audits are given up."""
        for future in (self._engine, *(future for _, future in self._pending)):
            if future is not None and (wait or not self._owned):
                future.cancel()  # on a user's own executor they would go on after training
        if self._executor is not None and self._owned:
            shut_down(self._executor, wait=wait)
        self._executor = None
        self._pending.clear()

"""Calls that wait for an executor, sent on together."""

from __future__ import annotations

import pickle
import threading
import traceback
from collections import deque
from collections.abc import Callable
from concurrent.futures import CancelledError, Executor, Future
from concurrent.futures import wait as wait_for
from dataclasses import dataclass
from functools import partial
from typing import Any

from lightning_gradaudit.attacks.compilation.batching import run_interleaved
from lightning_gradaudit.execution.remote import settle

_Outcome = tuple[Any, BaseException | None, str]  # a result, or an error and its traceback as text


@dataclass(frozen=True)
class _Call:
    future: Future[Any]
    work: Callable[..., Any]
    arguments: tuple[Any, ...]


class BatchingExecutor(Executor):
    """Send calls that wait on together: whoever does them has them take turns (see `attacks.side_by_side`).

    Nothing waits while the executor is idle: the first call goes on at once and alone, and those that come meanwhile
    go on together when it is done.

    Args:
        executor: Does one bundle at a time, with one worker. It is shut down with this one.
        batch_audits: Most calls in a bundle.
    """

    def __init__(self, executor: Executor, batch_audits: int) -> None:
        self.executor, self.batch_audits = executor, batch_audits
        self._waiting: deque[_Call] = deque()
        self._unsettled: set[Future[Any]] = set()
        self._lock = threading.Lock()
        self._busy = self._ended = False

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        future: Future[Any] = Future()
        with self._lock:
            if self._ended:
                raise RuntimeError("cannot submit to an executor that was shut down")
            self._waiting.append(_Call(future, partial(fn, **kwargs), args))
            self._unsettled.add(future)
        future.add_done_callback(self._unsettled.discard)
        self._send()
        return future

    def _send(self) -> None:
        """Send the next bundle on, unless one is under way."""
        while calls := self._taken():
            futures = [call.future for call in calls]
            arguments = [argument for call in calls for argument in call.arguments]
            work = [(call.work, len(call.arguments)) for call in calls]
            try:
                sent = self.executor.submit(_do, work, *arguments)
            except BaseException as error:  # an executor that broke or was shut down, or Ctrl-C while it works inline
                self._settle(futures, [(None, error, "")] * len(futures))
                if isinstance(error, KeyboardInterrupt):
                    raise
                continue
            for future in futures:
                future.add_done_callback(partial(_give_up, sent, futures))
            del calls, arguments, work  # snapshots need not live as long as what is done with them elsewhere
            sent.add_done_callback(partial(self._arrived, futures))
            return

    def _taken(self) -> list[_Call]:
        """Take the next bundle from those that wait; none while one is under way."""
        calls: list[_Call] = []
        with self._lock:
            while not self._busy and self._waiting and len(calls) < self.batch_audits:
                call = self._waiting.popleft()
                if call.future.cancelled():
                    call.future.set_running_or_notify_cancel()
                else:
                    calls.append(call)
            self._busy = self._busy or bool(calls)
        return calls

    def _arrived(self, futures: list[Future[Any]], sent: Future[Any]) -> None:
        lost: BaseException | None = CancelledError() if sent.cancelled() else sent.exception()
        self._settle(futures, sent.result() if lost is None else [(None, lost, "")] * len(futures))
        self._send()

    def _settle(self, futures: list[Future[Any]], outcomes: list[_Outcome]) -> None:
        for future, (result, error, trace) in zip(futures, outcomes, strict=True):
            if error is not None and error.__traceback__ is None and trace:
                error.__cause__ = RuntimeError(f"in the worker:\n{trace}")
            settle(future, result, error=error)
        with self._lock:
            self._busy = False

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        """Take no more calls; do those that wait, or give them up. Without waiting they can only be given up."""
        with self._lock:
            self._ended = True
        unsettled = list(self._unsettled)
        if cancel_futures or not wait:
            for future in unsettled:
                future.cancel()
        else:
            wait_for(unsettled)
        self.executor.shutdown(wait=wait, cancel_futures=cancel_futures)


def _do(work: list[tuple[Callable[..., Any], int]], *arguments: Any) -> list[_Outcome]:
    """Do the calls of a bundle; return the outcome of each. Arguments come one after the other."""
    jobs, rest = [], iter(arguments)
    for call, count in work:
        jobs.append(partial(call, *[next(rest) for _ in range(count)]))
    return [_outcome(done) for done in run_interleaved(jobs)]


def _outcome(done: Future[Any]) -> _Outcome:
    error = done.exception()
    if error is None:
        return done.result(), None, ""
    trace = "".join(traceback.format_exception(error))
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:  # it would take the whole bundle with it
        error = RuntimeError(f"{type(error).__name__}: {error}")
    return None, error, trace


def _give_up(sent: Future[Any], futures: list[Future[Any]], _: Future[Any]) -> None:
    """Give a bundle up that nobody waits for any more."""
    if all(future.cancelled() for future in futures):
        sent.cancel()

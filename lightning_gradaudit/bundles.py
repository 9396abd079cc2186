"""Calls that wait for an executor, sent on together."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable
from concurrent.futures import CancelledError, Executor, Future
from concurrent.futures import wait as wait_for
from dataclasses import dataclass
from functools import partial
from typing import Any

from lightning_gradaudit.attacks.side_by_side import take_turns
from lightning_gradaudit.parcels import settle


@dataclass(frozen=True)
class _Call:
    future: Future[Any]
    work: Callable[..., Any]
    arguments: tuple[Any, ...]


class BundlingExecutor(Executor):
    """Send calls that wait on together: whoever does them has them take turns (see `attacks.side_by_side`).

    Nothing waits while the executor is idle: the first call goes on at once and alone, and those that come meanwhile
    go on together when it is done.

    Args:
        executor: Does one bundle at a time, with one worker. It is shut down with this one.
        at_once: Most calls in a bundle.
    """

    def __init__(self, executor: Executor, at_once: int) -> None:
        self.executor, self.at_once = executor, at_once
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
        with self._lock:
            calls = [] if self._busy else self._next()
            self._busy = self._busy or bool(calls)
        if not calls:
            return
        try:
            arguments = [argument for call in calls for argument in call.arguments]
            work = [(call.work, len(call.arguments)) for call in calls]
            self.executor.submit(_do, work, *arguments).add_done_callback(partial(self._arrived, calls))
        except Exception as error:  # an executor that broke or was shut down
            self._arrived(calls, _failed(error))

    def _next(self) -> list[_Call]:
        calls: list[_Call] = []
        while self._waiting and len(calls) < self.at_once:
            call = self._waiting.popleft()
            if not call.future.cancelled():
                calls.append(call)
        return calls

    def _arrived(self, calls: list[_Call], done: Future[Any]) -> None:
        lost: BaseException | None = CancelledError() if done.cancelled() else done.exception()
        outcomes = [(None, lost)] * len(calls) if lost is not None else done.result()
        for call, (result, error) in zip(calls, outcomes, strict=True):
            settle(call.future, result, error=error)
        with self._lock:
            self._busy = False
        self._send()

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


def _do(work: list[tuple[Callable[..., Any], int]], *arguments: Any) -> list[tuple[Any, BaseException | None]]:
    """Do the calls of a bundle; return the result or the error of each. Arguments come one after the other."""
    jobs, rest = [], iter(arguments)
    for call, count in work:
        jobs.append(partial(call, *[next(rest) for _ in range(count)]))
    done = take_turns(jobs)
    return [(None, each.exception()) if each.exception() else (each.result(), None) for each in done]


def _failed(error: BaseException) -> Future[Any]:
    future: Future[Any] = Future()
    future.set_exception(error)
    return future

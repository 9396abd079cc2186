"""An executor whose calls travel to another process through shared memory."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from concurrent.futures import CancelledError, Executor, Future, ThreadPoolExecutor
from concurrent.futures import wait as wait_for
from dataclasses import dataclass
from typing import Any

from lightning_gradaudit.execution.shared_memory import PackedObject, Packer
from lightning_gradaudit.utils.threads import use_single_thread


@dataclass(frozen=True)
class Deferred:
    """An argument that the packing thread makes, so that the caller of `submit` does not wait for it."""

    make: Callable[[], Any]


class RemoteExecutor(Executor):
    """An executor in other processes: a thread of its own packs and sends the work, so that `submit` returns at once.

    Arguments may be `Deferred`.

    Args:
        packer: Packs the work; None: the work is sent as it is.
    """

    def __init__(self, packer: Packer | None) -> None:
        self._packer = packer
        self._packing = ThreadPoolExecutor(1, thread_name_prefix="gradaudit-packer", initializer=use_single_thread)
        self._pending: set[Future[Any]] = set()

    @abstractmethod
    def _send(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> tuple[Future[Any], Callable[[], object]]:
        """Send work; return its future, and a function that cancels it."""

    @staticmethod
    def _unwrap(error: BaseException) -> BaseException:
        """Return the error that the work raised, without what the executor wraps around it."""
        return error

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        future: Future[Any] = Future()
        self._pending.add(future)
        future.add_done_callback(self._pending.discard)
        self._packing.submit(self._pack_and_send, future, fn, args, kwargs)
        return future

    def _pack_and_send(self, future: Future[Any], fn: Callable[..., Any], args: Any, kwargs: Any) -> None:
        if future.cancelled():
            future.set_running_or_notify_cancel()
            return
        packed: list[PackedObject] = []  # referred to until the work is done, which keeps its buffers alive
        try:
            args = tuple(each.make() if isinstance(each, Deferred) else each for each in args)
            try:
                packed += [] if self._packer is None else [self._packer.pack((fn, args, kwargs))]
            except OSError:  # there is no room in shared memory
                packed.clear()
            running, cancel = self._send(_unpack_and_call, packed[0]) if packed else self._send(fn, *args, **kwargs)
        except BaseException as error:  # nothing reads the packing thread's own future
            _complete(future, error=error)
            return
        future.add_done_callback(lambda done: cancel() if done.cancelled() else None)

        def finish(done: Future[Any]) -> None:
            packed.clear()
            error = CancelledError() if done.cancelled() else done.exception()
            if error is None:
                _complete(future, done.result())
            else:
                _complete(future, error=self._unwrap(error))

        running.add_done_callback(finish)

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        """Accept no more work; wait for the work under way, or cancel it."""
        pending = list(self._pending)
        if cancel_futures:
            for future in pending:
                future.cancel()
        self._packing.shutdown(wait=wait)
        if wait and not cancel_futures:
            wait_for(pending)


def _unpack_and_call(packed: PackedObject) -> Any:
    fn, args, kwargs = packed.unpack()
    return fn(*args, **kwargs)


def _complete(future: Future[Any], result: Any = None, *, error: BaseException | None = None) -> None:
    """Set the result or the error of a future, unless it was cancelled."""
    if not future.set_running_or_notify_cancel():
        return
    if error is None:
        future.set_result(result)
    else:
        future.set_exception(error)

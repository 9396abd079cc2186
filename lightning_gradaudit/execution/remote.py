"""An executor whose calls travel to another process by shared memory."""

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
    """An argument that the packing thread makes; whoever submits does not wait for it."""

    make: Callable[[], Any]


class RemoteExecutor(Executor):
    """An executor elsewhere: work is packed and sent by a thread of its own, so that `submit` costs next to nothing.

    Arguments may be `Deferred` by that thread.

    Args:
        sender: Packs; None: work is sent as it is.
    """

    def __init__(self, sender: Packer | None) -> None:
        self._sender = sender
        self._packing = ThreadPoolExecutor(1, thread_name_prefix="gradaudit-sender", initializer=use_single_thread)
        self._unsettled: set[Future[Any]] = set()

    @abstractmethod
    def _send(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> tuple[Future[Any], Callable[[], object]]:
        """Send work off; return its future, and what gives it up."""

    @staticmethod
    def _raised(error: BaseException) -> BaseException:
        """Return what the work raised, out of whatever it arrived in."""
        return error

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        future: Future[Any] = Future()
        self._unsettled.add(future)
        future.add_done_callback(self._unsettled.discard)
        self._packing.submit(self._pack, future, fn, args, kwargs)
        return future

    def _pack(self, future: Future[Any], fn: Callable[..., Any], args: Any, kwargs: Any) -> None:
        if future.cancelled():
            future.set_running_or_notify_cancel()
            return
        kept = []  # until the parcel has been opened
        try:
            args = tuple(each.make() if isinstance(each, Deferred) else each for each in args)
            try:
                kept.append(None if self._sender is None else self._sender.pack((fn, args, kwargs)))
            except OSError:  # no room: it travels as it is
                kept.append(None)
            whole = kept[0] is None
            running, give_up = self._send(fn, *args, **kwargs) if whole else self._send(_open_and_call, kept[0])
        except BaseException as error:  # else nobody would settle the future: this thread's own is not looked at
            settle(future, error=error)
            return
        future.add_done_callback(lambda settled: give_up() if settled.cancelled() else None)

        def arrived(done: Future[Any]) -> None:
            kept.clear()
            error = CancelledError() if done.cancelled() else done.exception()
            if error is None:
                settle(future, done.result())
            else:
                settle(future, error=self._raised(error))

        running.add_done_callback(arrived)

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        """Take no more work; wait for what is under way, or give it up."""
        unsettled = list(self._unsettled)
        if cancel_futures:
            for future in unsettled:
                future.cancel()
        self._packing.shutdown(wait=wait)
        if wait and not cancel_futures:
            wait_for(unsettled)


def _open_and_call(parcel: PackedObject) -> Any:
    fn, args, kwargs = parcel.open()
    return fn(*args, **kwargs)


def settle(future: Future[Any], result: Any = None, *, error: BaseException | None = None) -> None:
    """Settle a future, once: what comes after somebody has cancelled it comes to nothing."""
    if not future.set_running_or_notify_cancel():
        return
    if error is None:
        future.set_result(result)
    else:
        future.set_exception(error)

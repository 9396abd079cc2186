"""Where an audit runs. Any `concurrent.futures.Executor` fits; these are the ones that come along."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from typing import Any, Literal

import torch
from loky.process_executor import ProcessPoolExecutor

ExecutorName = Literal["auto", "inline", "thread", "process"]
_LOWEST_PRIORITY = 19


class InlineExecutor(Executor):
    """Run at once in the calling thread: deterministic, for tests and debugging; training waits."""

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        future: Future[Any] = Future()
        try:
            future.set_result(fn(*args, **kwargs))
        except Exception as error:  # handed to whoever asks for the result, as every executor does
            future.set_exception(error)
        return future


def _start_worker() -> None:
    """Make a worker process yield to training and leave Ctrl-C to the main process."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if hasattr(os, "nice"):
        os.nice(_LOWEST_PRIORITY)
    torch.set_num_threads(max(1, (os.cpu_count() or 2) // 2))


def make_executor(executor: ExecutorName | Executor, *, device: torch.device) -> tuple[Executor, bool]:
    """Return an executor and whether it was made here (and is to be shut down).

    "auto" is a thread with its own CUDA stream where training runs on CUDA, else a process: a thread on the CPU
    would share the interpreter lock and the arithmetic threads with training. Processes come from loky, which
    neither re-imports the user's script nor needs its classes to be importable.
    """
    if isinstance(executor, Executor):
        return executor, False
    if executor == "auto":
        executor = "thread" if device.type == "cuda" else "process"
    if executor == "inline":
        return InlineExecutor(), True
    if executor == "thread":
        return ThreadPoolExecutor(max_workers=1, thread_name_prefix="gradaudit"), True
    return ProcessPoolExecutor(max_workers=1, initializer=_start_worker), True


def leaves_process(executor: Executor) -> bool:
    """Tell whether work may be pickled on its way, so that tensors must lie on the CPU."""
    return not isinstance(executor, (InlineExecutor, ThreadPoolExecutor))


def shut_down(executor: Executor, *, wait: bool) -> None:
    """Stop an executor; without waiting, work that has not begun is cancelled and worker processes are ended."""
    if hasattr(executor, "executor_flags") and not wait:  # loky's own way to end a busy worker
        executor.shutdown(wait=False, kill_workers=True)  # type: ignore[call-arg]
    elif leaves_process(executor):
        executor.shutdown(wait=wait)
    else:
        executor.shutdown(wait=wait, cancel_futures=not wait)

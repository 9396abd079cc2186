"""Where an audit runs. Any `concurrent.futures.Executor` fits; these come with the package."""

from __future__ import annotations

import math
import os
import shutil
import signal
import time
from collections.abc import Callable
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from functools import partial
from pathlib import Path
from threading import Thread
from typing import Any, Literal

import torch
from loky.process_executor import ProcessPoolExecutor

from lightning_gradaudit.errors import InvalidInputError
from lightning_gradaudit.execution.ray_executor import RayExecutor
from lightning_gradaudit.execution.remote import RemoteExecutor
from lightning_gradaudit.execution.shared_memory import Packer, SharedMemoryFile, shared_memory_folder
from lightning_gradaudit.utils.threads import use_single_thread

ExecutorName = Literal["auto", "inline", "thread", "process", "ray"]
_LOWEST_NICENESS = 19
_PARENT_CHECK_SECONDS = 1.0


class InlineExecutor(Executor):
    """Run at once in the calling thread: deterministic, for tests and debugging; training waits.

    Every exception of the work but Ctrl-C becomes its result. A `sys.exit` in a signal handler of the user that runs
    during the work cannot be told from one in the work, and does not end training.
    """

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        future: Future[Any] = Future()
        try:
            future.set_result(fn(*args, **kwargs))
        except KeyboardInterrupt:  # the user wants training to stop
            raise
        except BaseException as error:  # raised where the result is read, as in every executor
            future.set_exception(error)
        return future


def _start_worker(threads: int, parent: int, folder: Path | None) -> None:
    """Give a worker process the lowest priority, leave Ctrl-C to the main process and exit with it."""
    exit_with_parent(parent, folder)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if hasattr(os, "nice"):
        os.nice(_LOWEST_NICENESS)
    torch.set_num_threads(threads)


def exit_with_parent(parent: int, folder: Path | None = None) -> None:
    """Exit once the parent process is dead, for whatever reason, and remove the parent's folder.

    A thread watches, on every POSIX system (Windows does not tell a child that its parent is gone). Linux's
    PR_SET_PDEATHSIG does not help: it is sent when the *thread* that started this process ends. That is the packing
    thread, which ends before the last work is done. Native code that holds the interpreter lock delays the exit.

    Args:
        parent: Process id of the parent, which may be dead already.
        folder: Removed with its content.
    """

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(_PARENT_CHECK_SECONDS)
        if folder is not None:
            shutil.rmtree(folder, ignore_errors=True)
        os._exit(1)  # whatever the main thread is doing: no process is left to read its result

    Thread(target=watch, name="gradaudit-parent", daemon=True).start()


class ProcessExecutor(RemoteExecutor):
    """Worker processes of lowest priority that read large tensors from shared memory.

    The processes come from loky, which neither re-imports the user's script nor needs its classes to be importable.
    Large tensors (weights, gradients, the gallery) are written to memory once and mapped by the worker; what has not
    changed since the last submission (frozen layers, the gallery) is not written again. Where there is no shared
    memory, or no room in it, they are pickled. The processes end within seconds of this one, even if it is killed, and
    remove its files from shared memory.

    Args:
        workers: Number of processes.
        threads: Arithmetic threads of each; None: half of the cores over all of them, so that training keeps its own.

    Raises:
        InvalidInputError: When one of them is not positive.
    """

    def __init__(self, *, workers: int = 1, threads: int | None = None) -> None:
        if workers < 1 or (threads is not None and threads < 1):
            raise InvalidInputError(f"workers and threads must be >= 1, got {workers!r} and {threads!r}.")
        self.workers = workers
        threads = max(1, (os.cpu_count() or 2) // 2 // workers) if threads is None else threads
        self._folder = shared_memory_folder()
        path = None if self._folder is None else self._folder.path
        settings = threads, os.getpid(), path
        self._pool = ProcessPoolExecutor(max_workers=workers, initializer=_start_worker, initargs=settings)
        super().__init__(None if path is None else Packer(partial(SharedMemoryFile, folder=path)))
        self._killing = self._cancelled = False

    def _send(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> tuple[Future[Any], Callable[[], object]]:
        future = self._pool.submit(fn, *args, **kwargs)

        def cancel() -> None:
            if not self._killing:  # else the worker is killed with its work
                self._cancelled |= future.cancel()

        return future, cancel

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        """Stop; with `cancel_futures` even a busy worker is killed."""
        self._killing = cancel_futures
        super().shutdown(wait=wait, cancel_futures=cancel_futures)
        # An idle worker may still run a compiler, so it is killed too. But a pool that is killed while it holds
        # cancelled work breaks.
        self._pool.shutdown(wait=wait, kill_workers=cancel_futures or (wait and not self._cancelled))
        if self._folder is not None and (wait or cancel_futures):  # else work under way may still read from it
            self._folder.remove()

    @property
    def broken(self) -> bool:
        """Whether a worker was lost; the executor then accepts no more work."""
        return self._pool._flags.broken is not None


def make_executor(executor: ExecutorName | Executor, *, device: torch.device) -> tuple[Executor, bool]:
    """Return an executor and whether it was made here (and is to be shut down).

    "auto" is a thread with its own CUDA stream where training runs on CUDA, else a process: a thread on the CPU
    would share the interpreter lock and the arithmetic threads with training.
    """
    if isinstance(executor, Executor):
        return executor, False
    if executor == "auto":
        executor = "thread" if device.type == "cuda" else "process"
    if executor == "inline":
        return InlineExecutor(), True
    if executor == "thread":
        return ThreadPoolExecutor(1, thread_name_prefix="gradaudit", initializer=use_single_thread), True
    if executor == "ray":
        return RayExecutor(), True
    return ProcessExecutor(), True


def leaves_process(executor: Executor) -> bool:
    """Tell whether an executor may pickle its work, so that tensors must lie on the CPU."""
    return not isinstance(executor, (InlineExecutor, ThreadPoolExecutor))


def accepts_deferred(executor: Executor) -> bool:
    """Tell whether arguments may be `Deferred`."""
    return isinstance(executor, RemoteExecutor)


def workers_of(executor: Executor) -> float:
    """Return how many calls an executor runs at once; infinite where it is not known."""
    if isinstance(executor, InlineExecutor):
        return 1
    return getattr(executor, "workers", getattr(executor, "_max_workers", math.inf))


def is_broken(executor: Executor) -> bool:
    """Tell whether an executor of this package has lost a worker process and accepts no more work."""
    return isinstance(executor, ProcessExecutor) and executor.broken


def shut_down(executor: Executor, *, wait: bool) -> None:
    """Stop an executor of this package; without waiting, work that is not done is cancelled."""
    executor.shutdown(wait=wait, cancel_futures=not wait)

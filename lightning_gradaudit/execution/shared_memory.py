"""Objects on their way to another process: small parts pickled, large tensors laid out once where all can read them."""

from __future__ import annotations

import io
import itertools
import os
import pickle
import shutil
import tempfile
import weakref
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from concurrent.futures import CancelledError, Executor, Future, ThreadPoolExecutor
from concurrent.futures import wait as wait_for
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cloudpickle
import torch
from torch import Tensor

from lightning_gradaudit.utils.threads import calculate_alone

_LARGE = 1 << 16  # bytes from which a tensor is laid out; smaller ones are pickled
_SHARED_MEMORY = Path("/dev/shm")  # noqa: S108 - a folder of the user's own is made in it
_PREFIX = "gradaudit-snapshots-"
_TRIES = 8  # to make a folder while others sweep


def take_apart(item: Any, wanted: Callable[[Tensor], bool] = lambda _: True) -> tuple[bytes, list[Tensor]]:
    """Pickle an object without its tensors.

    Args:
        item: Anything that cloudpickle accepts, classes of the user's script included.
        wanted: Which tensors to leave out. Those on the meta device are shapes already and are never left out.

    Returns:
        Equal bytes for objects that differ only in the values of their tensors; and the tensors, without a graph.
    """
    file = io.BytesIO()
    pickler = _Pickler(file, wanted)
    pickler.dump(item)
    return file.getvalue(), pickler.tensors


def put_together(pickled: bytes, tensors: Sequence[Tensor]) -> Any:
    """Undo `take_apart`, with the same tensors or others of their shapes."""
    return _Unpickler(io.BytesIO(pickled), tensors).load()


class _Pickler(cloudpickle.Pickler):  # type: ignore[misc,name-defined]
    def __init__(self, file: io.BytesIO, wanted: Callable[[Tensor], bool]) -> None:
        super().__init__(file)
        self.tensors: list[Tensor] = []
        self._wanted = wanted
        self._places: dict[int, int] = {}

    def persistent_id(self, obj: Any) -> Any:
        if not isinstance(obj, Tensor) or obj.device.type == "meta" or not self._wanted(obj):
            return None
        if id(obj) not in self._places:
            self._places[id(obj)] = len(self.tensors)
            self.tensors.append(obj.detach())
        return (self._places[id(obj)], *form(obj))


class _Unpickler(pickle.Unpickler):
    def __init__(self, file: io.BytesIO, tensors: Sequence[Tensor]) -> None:
        super().__init__(file)
        self.tensors = tensors

    def persistent_load(self, pid: Any) -> Tensor:
        return self.tensors[pid[0]]


def form(tensor: Tensor) -> tuple[object, ...]:
    """Return all of a tensor but its values, as plain Python."""
    return tuple(tensor.shape), tensor.stride(), str(tensor.dtype), str(tensor.device)


class Laid(ABC):
    """Bytes that other processes can read, for as long as somebody here refers to them. Its pickle is a pointer."""

    @abstractmethod
    def read(self) -> Tensor:
        """Return the bytes, uint8 (N,); whoever changes them changes them for nobody else."""


class InFile(Laid):
    """Bytes in a file of the memory file system; it is gone with the last reference in the process that made it."""

    _numbers = itertools.count()

    def __init__(self, content: Tensor, folder: Path) -> None:
        self.size = content.numel()
        self.path = str(folder / str(next(self._numbers)))
        weakref.finalize(self, _remove, self.path, os.getpid())
        # Written, not mapped: where the memory is full, writing fails with an error and not with a signal.
        with Path(self.path).open("xb") as file:
            file.write(content.numpy().data)

    def __reduce__(self) -> tuple[Any, ...]:
        return _FileElsewhere, (self.path, self.size)

    def read(self) -> Tensor:
        return _FileElsewhere(self.path, self.size).read()


@dataclass(frozen=True)
class _FileElsewhere(Laid):
    path: str
    size: int

    def read(self) -> Tensor:
        return torch.from_file(self.path, shared=False, size=self.size, dtype=torch.uint8)


def _remove(path: str, maker: int) -> None:
    if os.getpid() == maker:  # a forked data loader's worker has a copy of the reference, and no say
        Path(path).unlink(missing_ok=True)


@dataclass(frozen=True)
class Parcel:
    """An object as it travels.

    Attributes:
        pickled: The object without its large tensors.
        contents: Those, as bytes.
        forms: Shape and type of each.
    """

    pickled: bytes
    contents: tuple[Laid, ...]
    forms: tuple[tuple[torch.Size, torch.dtype], ...]

    def open(self) -> Any:
        """Return the object."""
        read = [
            laid.read().view(dtype).reshape(shape)
            for laid, (shape, dtype) in zip(self.contents, self.forms, strict=True)
        ]
        return put_together(self.pickled, read)


class Sender:
    """Pack objects, one much like the other; what has not changed since the last is not laid out again.

    Args:
        lay: Lays bytes out; an OSError says that there is no room.
    """

    def __init__(self, lay: Callable[[Tensor], Laid]) -> None:
        self._lay = lay
        self._last: list[Laid] = []

    def pack(self, item: Any) -> Parcel:
        """Return a parcel; it must be kept until it has been opened.

        Raises:
            OSError: When there is no room for it.
        """
        pickled, tensors = take_apart(item, _is_large)
        contents = []
        for number, tensor in enumerate(tensors):
            content = tensor.contiguous().reshape(-1).view(torch.uint8)
            known = self._last[number] if number < len(self._last) else None
            unchanged = known is not None and torch.equal(known.read(), content)
            contents.append(known if known is not None and unchanged else self._lay(content))
        self._last = contents
        return Parcel(pickled, tuple(contents), tuple((t.shape, t.dtype) for t in tensors))


def _is_large(tensor: Tensor) -> bool:
    plain = tensor.device.type == "cpu" and tensor.layout == torch.strided and not tensor.requires_grad
    return plain and tensor.numel() * tensor.element_size() >= _LARGE


class SharedFolder:
    """A folder that only this user can read, in memory and not on a disk; it is gone with the process that made it.

    Snapshots hold private images, which must not outlive the run. Whoever ends as usual removes the folder; where the
    process is killed its worker does (see `executors.end_with_parent`), and if that was killed, too, whoever makes the
    next folder. That a maker lives is told by its lock on the folder, which the kernel takes back when it dies: a
    process id may come again, and says nothing in another container that shares the memory.
    """

    def __init__(self, path: Path, lock: int) -> None:
        self.path = path
        self.remove = weakref.finalize(self, _remove_made, path, lock, os.getpid())


def shared_memory_folder() -> SharedFolder | None:
    """Sweep what dead processes left and make a folder; None where the system has no such memory.

    Snapshots hold private images: they are never written to a disk for want of such a place.
    """
    if not os.access(_SHARED_MEMORY, os.W_OK):
        return None
    _sweep()
    for _ in range(_TRIES):
        path = Path(tempfile.mkdtemp(prefix=_PREFIX, dir=_SHARED_MEMORY))
        lock = _locked(path)
        if lock is not None:
            folder = SharedFolder(path, lock)
            _folders.append(folder)
            return folder
    return None


_folders: list[SharedFolder] = []  # what is under way reads from them, whether or not somebody refers to its executor


def _sweep() -> None:
    """Remove the folders of this user whose makers are dead."""
    for path in _SHARED_MEMORY.glob(f"{_PREFIX}*"):
        lock = _locked(path)
        if lock is not None:
            shutil.rmtree(path, ignore_errors=True)
            os.close(lock)


def _locked(path: Path) -> int | None:
    """Lock a folder; None where it is a link, another user's, gone, or held by a process that lives."""
    import fcntl  # not on Windows, which has no such folder either

    try:
        lock = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    except OSError:
        return None
    try:
        if os.fstat(lock).st_uid == os.geteuid():
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if os.path.samestat(os.fstat(lock), os.lstat(path)):  # else it was swept before it was locked
                return lock
    except OSError:
        pass
    os.close(lock)
    return None


def _remove_made(path: Path, lock: int, maker: int) -> None:
    if os.getpid() == maker:  # as in `_remove`
        shutil.rmtree(path, ignore_errors=True)
        os.close(lock)


@dataclass(frozen=True)
class Made:
    """An argument that the packing thread makes; whoever submits does not wait for it."""

    make: Callable[[], Any]


class ParcelExecutor(Executor):
    """An executor elsewhere: work is packed and sent by a thread of its own, so that `submit` costs next to nothing.

    Arguments may be `Made` by that thread.

    Args:
        sender: Packs; None: work is sent as it is.
    """

    def __init__(self, sender: Sender | None) -> None:
        self._sender = sender
        self._packing = ThreadPoolExecutor(1, thread_name_prefix="gradaudit-sender", initializer=calculate_alone)
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
            args = tuple(each.make() if isinstance(each, Made) else each for each in args)
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


def _open_and_call(parcel: Parcel) -> Any:
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

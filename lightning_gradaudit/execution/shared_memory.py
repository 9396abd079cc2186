"""Objects on their way to another process: small parts pickled, large tensors laid out once where all can read them."""

from __future__ import annotations

import itertools
import os
import shutil
import tempfile
import weakref
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lightning_gradaudit.utils.pickling import join_tensors, split_tensors

_LARGE = 1 << 16  # bytes from which a tensor is laid out; smaller ones are pickled
_SHARED_MEMORY = Path("/dev/shm")  # noqa: S108 - a folder of the user's own is made in it
_PREFIX = "gradaudit-snapshots-"
_TRIES = 8  # to make a folder while others sweep


class SharedBuffer(ABC):
    """Bytes that other processes can read, for as long as somebody here refers to them. Its pickle is a pointer."""

    @abstractmethod
    def read(self) -> Tensor:
        """Return the bytes, uint8 (N,); whoever changes them changes them for nobody else."""


class SharedMemoryFile(SharedBuffer):
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
class _FileElsewhere(SharedBuffer):
    path: str
    size: int

    def read(self) -> Tensor:
        return torch.from_file(self.path, shared=False, size=self.size, dtype=torch.uint8)


def _remove(path: str, maker: int) -> None:
    if os.getpid() == maker:  # a forked data loader's worker has a copy of the reference, and no say
        Path(path).unlink(missing_ok=True)


@dataclass(frozen=True)
class PackedObject:
    """An object as it travels.

    Attributes:
        pickled: The object without its large tensors.
        contents: Those, as bytes.
        forms: Shape and type of each.
    """

    pickled: bytes
    contents: tuple[SharedBuffer, ...]
    forms: tuple[tuple[torch.Size, torch.dtype], ...]

    def open(self) -> Any:
        """Return the object."""
        read = [
            laid.read().view(dtype).reshape(shape)
            for laid, (shape, dtype) in zip(self.contents, self.forms, strict=True)
        ]
        return join_tensors(self.pickled, read)


class Packer:
    """Pack objects, one much like the other; what has not changed since the last is not laid out again.

    Args:
        lay: Lays bytes out; an OSError says that there is no room.
    """

    def __init__(self, lay: Callable[[Tensor], SharedBuffer]) -> None:
        self._lay = lay
        self._last: list[SharedBuffer] = []

    def pack(self, item: Any) -> PackedObject:
        """Return a parcel; it must be kept until it has been opened.

        Raises:
            OSError: When there is no room for it.
        """
        pickled, tensors = split_tensors(item, _is_large)
        contents = []
        for number, tensor in enumerate(tensors):
            content = tensor.contiguous().reshape(-1).view(torch.uint8)
            known = self._last[number] if number < len(self._last) else None
            unchanged = known is not None and torch.equal(known.read(), content)
            contents.append(known if known is not None and unchanged else self._lay(content))
        self._last = contents
        return PackedObject(pickled, tuple(contents), tuple((t.shape, t.dtype) for t in tensors))


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

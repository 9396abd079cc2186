"""Objects on their way to another process: small parts are pickled, large tensors lie in memory that both can read.

Libraries were considered and do not fit: `multiprocessing.shared_memory` and torch's shared tensors write through a
mapping, which ends the process with SIGBUS where the memory is full (a container has 64 MB by default), and joblib
falls back to a disk, where private images must not lie.
"""

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

LARGE_TENSOR_BYTES = 1 << 16
"""Size from which a tensor is written to shared memory; smaller ones are pickled."""
SHARED_MEMORY = Path("/dev/shm")  # noqa: S108 - a folder that only this user can read is made in it
FOLDER_PREFIX = "gradaudit-snapshots-"
_FOLDER_ATTEMPTS = 8  # another process may remove a new folder before it is locked


class SharedBuffer(ABC):
    """Bytes that other processes can read while this process refers to the object. Its pickle is a pointer."""

    @abstractmethod
    def read(self) -> Tensor:
        """Return the bytes, uint8 (N,), copied on write: a change of them reaches no other reader."""


class SharedMemoryFile(SharedBuffer):
    """Bytes in a file of the memory file system, removed with the last reference in the process that made it."""

    _numbers = itertools.count()

    def __init__(self, content: Tensor, folder: Path) -> None:
        self.size = content.numel()
        self.path = str(folder / str(next(self._numbers)))
        weakref.finalize(self, _remove_file, self.path, os.getpid())
        # Written, not mapped: where the memory is full, writing fails with an error and not with a signal.
        with Path(self.path).open("xb") as file:
            file.write(content.numpy().data)

    def __reduce__(self) -> tuple[Any, ...]:
        return _AttachedFile, (self.path, self.size)

    def read(self) -> Tensor:
        return _AttachedFile(self.path, self.size).read()


@dataclass(frozen=True)
class _AttachedFile(SharedBuffer):
    """A `SharedMemoryFile` in a process that did not make it."""

    path: str
    size: int

    def read(self) -> Tensor:
        return torch.from_file(self.path, shared=False, size=self.size, dtype=torch.uint8)


def _remove_file(path: str, owner: int) -> None:
    if os.getpid() == owner:  # a forked process, such as a data loader's worker, has a copy of the reference
        Path(path).unlink(missing_ok=True)


@dataclass(frozen=True)
class PackedObject:
    """An object as it travels.

    Attributes:
        pickled: The object without its large tensors.
        buffers: The bytes of each large tensor.
        forms: Shape and type of each large tensor.
    """

    pickled: bytes
    buffers: tuple[SharedBuffer, ...]
    forms: tuple[tuple[torch.Size, torch.dtype], ...]

    def unpack(self) -> Any:
        """Return the object."""
        pairs = zip(self.buffers, self.forms, strict=True)
        return join_tensors(
            self.pickled, [buffer.read().view(dtype).reshape(shape) for buffer, (shape, dtype) in pairs]
        )


class Packer:
    """Pack objects of the same structure; a tensor that has not changed since the last object is not written again.

    Args:
        write: Makes a shared buffer of bytes; raises OSError where there is no room.
    """

    def __init__(self, write: Callable[[Tensor], SharedBuffer]) -> None:
        self.write = write
        self.last: list[SharedBuffer] = []

    def pack(self, item: Any) -> PackedObject:
        """Return a packed object; the caller keeps it until it has been unpacked.

        Raises:
            OSError: When there is no room for it.
        """
        pickled, tensors = split_tensors(item, _is_large)
        buffers = []
        for number, tensor in enumerate(tensors):
            content = tensor.contiguous().reshape(-1).view(torch.uint8)
            last = self.last[number] if number < len(self.last) else None
            unchanged = last is not None and torch.equal(last.read(), content)
            buffers.append(last if last is not None and unchanged else self.write(content))
        self.last = buffers
        return PackedObject(pickled, tuple(buffers), tuple((t.shape, t.dtype) for t in tensors))


def _is_large(tensor: Tensor) -> bool:
    plain = tensor.device.type == "cpu" and tensor.layout == torch.strided and not tensor.requires_grad
    return plain and tensor.numel() * tensor.element_size() >= LARGE_TENSOR_BYTES


class SharedFolder:
    """A folder in memory that only this user can read; it is removed with the process that made it.

    Snapshots hold private images, which must not outlive the run. A process that ends normally removes its folder;
    where it is killed, its worker does (see `executors.exit_with_parent`), and where the worker is killed too, the next
    process that makes a folder. Whether the owner of a folder lives is told by its lock, which the kernel releases when
    the owner dies: process ids are reused, and mean nothing in another container that shares the memory.
    """

    def __init__(self, path: Path, lock: int) -> None:
        self.path = path
        self.remove = weakref.finalize(self, _remove_folder, path, lock, os.getpid())


open_folders: list[SharedFolder] = []
"""Folders of this process. Work under way reads from them even after the last reference to its executor is gone."""


def shared_memory_folder() -> SharedFolder | None:
    """Remove what dead processes left and make a folder; None where the system has no such memory.

    Snapshots hold private images, so they are not written to a disk instead.
    """
    if not os.access(SHARED_MEMORY, os.W_OK):
        return None
    _remove_abandoned_folders()
    for _ in range(_FOLDER_ATTEMPTS):
        path = Path(tempfile.mkdtemp(prefix=FOLDER_PREFIX, dir=SHARED_MEMORY))
        lock = lock_folder(path)
        if lock is not None:
            open_folders.append(SharedFolder(path, lock))
            return open_folders[-1]
    return None


def _remove_abandoned_folders() -> None:
    """Remove this user's folders whose owners are dead."""
    for path in SHARED_MEMORY.glob(f"{FOLDER_PREFIX}*"):
        lock = lock_folder(path)
        if lock is not None:
            shutil.rmtree(path, ignore_errors=True)
            os.close(lock)


def lock_folder(path: Path) -> int | None:
    """Lock a folder; None where it is a link, another user's, gone, or locked by a process that lives."""
    import fcntl  # not on Windows, which has no such folder either

    try:
        lock = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    except OSError:
        return None
    try:
        if os.fstat(lock).st_uid == os.geteuid():
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if os.path.samestat(os.fstat(lock), os.lstat(path)):  # else it was removed before it was locked
                return lock
    except OSError:
        pass
    os.close(lock)
    return None


def _remove_folder(path: Path, lock: int, owner: int) -> None:
    if os.getpid() == owner:  # as in `_remove_file`
        shutil.rmtree(path, ignore_errors=True)
        os.close(lock)

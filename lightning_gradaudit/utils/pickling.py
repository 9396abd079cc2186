"""Pickling of objects separately from their tensors."""

from __future__ import annotations

import io
import pickle
from collections.abc import Callable, Sequence
from typing import Any

import cloudpickle
from torch import Tensor


def split_tensors(item: Any, wanted: Callable[[Tensor], bool] = lambda _: True) -> tuple[bytes, list[Tensor]]:
    """Pickle an object without its tensors.

    Args:
        item: Anything that cloudpickle accepts, classes of the user's script included.
        wanted: Which tensors to leave out. Those on the meta device have no values and are never left out.

    Returns:
        Equal bytes for objects that differ only in the values of their tensors; and the tensors, without a graph.
    """
    file = io.BytesIO()
    pickler = _Pickler(file, wanted)
    pickler.dump(item)
    return file.getvalue(), pickler.tensors


def join_tensors(pickled: bytes, tensors: Sequence[Tensor]) -> Any:
    """Undo `split_tensors`, with the same tensors or others of their shapes."""
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
    """Return everything about a tensor but its values, as plain Python."""
    return tuple(tensor.shape), tensor.stride(), str(tensor.dtype), str(tensor.device)

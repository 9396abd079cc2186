"""Entries of nested batches: their paths, and what a batch holds beside images and labels."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass, replace
from typing import Any

import cloudpickle
import numpy as np
import torch
from torch import Tensor

Path = tuple[Any, ...]
"""Keys and indices that lead to an entry of a batch; () is the batch itself."""


@dataclass(frozen=True, eq=False)
class OtherEntries:
    """What a batch holds beside its images and labels.

    Attributes:
        entries: Values by path: tensors, arrays, text, numbers, anything.
        samples: Number of samples in the batch; tensors and arrays of this length hold one value for each.
    """

    entries: Mapping[Path, Any]
    samples: int

    def take(self, positions: Sequence[int]) -> OtherEntries:
        """Return the entries of some samples of the batch, in their order."""
        at = list(positions)
        changed = {path: v[at] if self.is_per_sample(v) else v for path, v in self.entries.items()}
        return OtherEntries(changed, len(at))

    def of_size(self, samples: int) -> OtherEntries:
        """Return the entries of as many samples: the first ones, repeated where there are too few."""
        return self if samples == self.samples else self.take([at % self.samples for at in range(samples)])

    def known_to_adversary(self, known: Sequence[str] | None, image: torch.Size) -> OtherEntries:
        """Replace the content of what the adversary does not know: by ones where they are numbers, else by zeros.

        Tensors, arrays and byte strings are hidden, also inside other objects; an object that cannot be copied without
        them is left out. Text and single numbers stay.

        Args:
            known: Names of the entries that are known; None: all but copies of the images.
            image: (C, H, W); a tensor of as many elements a sample, or a multiple, may be a copy of the images.
        """

        def is_hidden(value: Any) -> bool:
            if known is not None or isinstance(value, (bytes, bytearray)):  # of any size: they may be compressed
                return True
            size = value.numel() if isinstance(value, Tensor) else value.size
            each = size // self.samples if self.is_per_sample(value) else size
            return size > 0 and each % image.numel() == 0

        def seen(path: Path, value: Any) -> Any:
            if known is not None and (name_of(path) in known or (bool(path) and str(path[-1]) in known)):
                return value
            return _without(value, is_hidden)

        return replace(self, entries={path: seen(path, value) for path, value in self.entries.items()})

    def copy(self, *, tensors_only: bool = False) -> OtherEntries:
        """Return a copy that shares no tensor and no array, and other objects at will."""
        wanted = (Tensor, np.ndarray) if tensors_only else object
        changed = {path: copied(v) if isinstance(v, wanted) else v for path, v in self.entries.items()}
        return replace(self, entries=changed)

    def to(self, device: torch.device | str) -> OtherEntries:
        """Return the entries on another device."""
        return replace(self, entries={p: v.to(device) if isinstance(v, Tensor) else v for p, v in self.entries.items()})

    def is_per_sample(self, value: Any) -> bool:
        return isinstance(value, (Tensor, np.ndarray)) and value.ndim >= 1 and len(value) == self.samples


def join_entries(parts: Sequence[OtherEntries]) -> OtherEntries:
    """Put the samples of several batches of one layout in a row; what is not per sample is the first batch's."""
    entries = dict(parts[0].entries)
    for path, value in entries.items():
        if parts[0].is_per_sample(value):
            values = [part.entries[path] for part in parts]
            entries[path] = torch.cat(values) if isinstance(value, Tensor) else np.concatenate(values)
    return OtherEntries(entries, sum(part.samples for part in parts))


def copied(value: Any) -> Any:
    """Return a copy of an entry; the entry itself where it cannot be copied."""
    if isinstance(value, Tensor):
        return value.detach().clone()
    try:
        return copy.deepcopy(value)
    except Exception:  # whatever a user's object raises
        return value


def _without(value: Any, is_hidden: Callable[[Any], bool]) -> Any:
    """Return an entry with the content of tensors, arrays and byte strings hidden; None where that cannot be done."""
    if value is None or isinstance(value, (str, bool, int, float, complex, np.generic)):
        return value
    try:
        hidden: list[Any] = []
        file = io.BytesIO()
        _Hider(file, is_hidden, hidden).dump(value)
        return _Shower(io.BytesIO(file.getvalue()), hidden).load()
    except Exception:  # whatever pickling a user's object raises
        return None


class _Hider(cloudpickle.Pickler):  # type: ignore[misc,name-defined]
    """Put blank tensors, arrays and byte strings beside a pickled object, in the place of its own."""

    def __init__(self, file: io.BytesIO, is_hidden: Callable[[Any], bool], kept: list[Any]) -> None:
        super().__init__(file)
        self._is_hidden, self._kept = is_hidden, kept

    def persistent_id(self, value: Any) -> int | None:
        if not isinstance(value, (Tensor, np.ndarray, bytes, bytearray)):
            return None
        self._kept.append(_blank(value) if self._is_hidden(value) else value)
        return len(self._kept) - 1


class _Shower(pickle.Unpickler):
    def __init__(self, file: io.BytesIO, kept: Sequence[Any]) -> None:
        super().__init__(file)
        self._kept = kept

    def persistent_load(self, place: Any) -> Any:
        return self._kept[place]


def _blank(value: Any) -> Any:
    """Return ones of the shape of a tensor or array of numbers, zeros for those of integers and for bytes."""
    if isinstance(value, Tensor):
        return torch.ones_like(value) if value.is_floating_point() else torch.zeros_like(value)
    if isinstance(value, np.ndarray):
        return np.ones_like(value) if value.dtype.kind == "f" else np.zeros(value.shape, value.dtype)
    return type(value)(len(value))


def copy_batch(batch: Any) -> Any:
    """Return a batch that shares no tensor with another."""
    return fill(skeleton_of(batch), {path: copied(value) for path, value in walk(batch)})


def describe(value: Any) -> str:
    """Say what something is, for an error message."""
    if isinstance(value, Tensor):
        return f"a tensor of shape {tuple(value.shape)} and {value.dtype}"
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{k!r}: {describe(v)}" for k, v in value.items()) + "}"
    if _is_sequence(value):
        return "[" + ", ".join(describe(v) for v in value) + "]"
    if _is_record(value):
        return f"{type(value).__name__}(" + ", ".join(f"{k}={describe(v)}" for k, v in _fields_of(value).items()) + ")"
    if isinstance(value, np.ndarray):
        return f"an array of shape {value.shape} and {value.dtype}"
    return type(value).__name__


def name_of(path: Path) -> str:
    """Return the name of an entry: keys and indices with dots between."""
    return ".".join(map(str, path)) or "the batch"


@dataclass(frozen=True)
class _At:
    """Stands for the entry at a path in a skeleton."""

    path: Path


@dataclass(frozen=True)
class _Record:
    """Stands for a dataclass in a skeleton."""

    kind: type
    content: Any


def _is_sequence(value: Any) -> bool:
    return isinstance(value, Sequence) and not isinstance(value, (str, bytes))


def _is_record(value: Any) -> bool:
    return is_dataclass(value) and not isinstance(value, type)


def _fields_of(value: Any) -> dict[str, Any]:
    return {each.name: getattr(value, each.name) for each in fields(value)}


def walk(value: Any, path: Path = ()) -> Iterator[tuple[Path, Any]]:
    """Yield the entries of nested mappings, sequences and dataclasses with their paths."""
    if isinstance(value, Mapping):
        for key, each in value.items():
            yield from walk(each, (*path, key))
    elif _is_record(value):
        yield from walk(_fields_of(value), path)
    elif _is_sequence(value):
        for at, each in enumerate(value):
            yield from walk(each, (*path, at))
    else:
        yield path, value


def skeleton_of(value: Any, path: Path = ()) -> Any:
    """Return the containers of a batch, with the path of each entry in its place."""
    if isinstance(value, Mapping):
        return _like(value, {key: skeleton_of(each, (*path, key)) for key, each in value.items()})
    if _is_sequence(value):
        return _like(value, [skeleton_of(each, (*path, at)) for at, each in enumerate(value)])
    if _is_record(value):
        return _Record(type(value), skeleton_of(_fields_of(value), path))
    return _At(path)


def fill(skeleton: Any, values: Mapping[Path, Any]) -> Any:
    """Return the containers with these values in place of the paths; None where a value is missing."""
    if isinstance(skeleton, _At):
        return values.get(skeleton.path)
    if isinstance(skeleton, _Record):
        made: Any = object.__new__(skeleton.kind)  # without the checks of its constructor, which saw other values
        for name, value in fill(skeleton.content, values).items():
            object.__setattr__(made, name, value)
        return made
    if isinstance(skeleton, Mapping):
        return _like(skeleton, {key: fill(each, values) for key, each in skeleton.items()})
    return _like(skeleton, [fill(each, values) for each in skeleton])


def _like(container: Any, content: Any) -> Any:
    """Return a container of the same class; a plain one where its class cannot be made of its content."""
    kind = type(container)
    try:
        return kind(*content) if hasattr(container, "_fields") else kind(content)
    except TypeError:
        return content if isinstance(container, (Mapping, list)) else tuple(content)

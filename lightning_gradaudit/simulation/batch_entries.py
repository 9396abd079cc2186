"""Entries of nested batches: their paths, and what a batch holds beside images and labels."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

Path = tuple[Any, ...]
"""Keys and indices that lead to an entry of a batch; () is the batch itself."""


@dataclass(frozen=True, eq=False)
class OtherEntries:
    """What a batch holds beside its images and labels.

    Attributes:
        entries: Values by path: tensors, text, numbers, anything.
        samples: Number of samples in the batch; tensors of this length hold one value for each.
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

        Args:
            known: Names of the entries that are known; None: all but copies of the images.
            image: (C, H, W); a tensor of as many elements a sample, or a multiple, may be a copy of the images.
        """

        def is_known(path: Path, value: Tensor) -> bool:
            if known is not None:
                return name_of(path) in known or (bool(path) and str(path[-1]) in known)
            return value.numel() == 0 or value.numel() % (self.samples * image.numel()) != 0

        def seen(path: Path, value: Any) -> Any:
            if not isinstance(value, Tensor) or is_known(path, value):
                return value
            return torch.ones_like(value) if value.is_floating_point() else torch.zeros_like(value)

        return replace(self, entries={path: seen(path, value) for path, value in self.entries.items()})

    def to(self, device: torch.device | str) -> OtherEntries:
        """Return the entries on another device."""
        return replace(self, entries={p: v.to(device) if isinstance(v, Tensor) else v for p, v in self.entries.items()})

    def is_per_sample(self, value: Any) -> bool:
        return isinstance(value, Tensor) and value.ndim >= 1 and len(value) == self.samples


def join_entries(parts: Sequence[OtherEntries]) -> OtherEntries:
    """Put the samples of several batches of one layout in a row; what is not per sample is the first batch's."""
    entries = dict(parts[0].entries)
    for path, value in entries.items():
        if parts[0].is_per_sample(value):
            entries[path] = torch.cat([part.entries[path] for part in parts])
    return OtherEntries(entries, sum(part.samples for part in parts))


def describe(value: Any) -> str:
    """Say what something is, for an error message."""
    if isinstance(value, Tensor):
        return f"a tensor of shape {tuple(value.shape)} and {value.dtype}"
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{k!r}: {describe(v)}" for k, v in value.items()) + "}"
    if _is_sequence(value):
        return "[" + ", ".join(describe(v) for v in value) + "]"
    return type(value).__name__


def name_of(path: Path) -> str:
    """Return the name of an entry: keys and indices with dots between."""
    return ".".join(map(str, path)) or "the batch"


@dataclass(frozen=True)
class _At:
    """Stands for the entry at a path in a skeleton."""

    path: Path


def _is_sequence(value: Any) -> bool:
    return isinstance(value, Sequence) and not isinstance(value, (str, bytes))


def walk(value: Any, path: Path = ()) -> Iterator[tuple[Path, Any]]:
    """Yield the entries of nested mappings and sequences with their paths."""
    if isinstance(value, Mapping):
        for key, each in value.items():
            yield from walk(each, (*path, key))
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
    return _At(path)


def fill(skeleton: Any, values: Mapping[Path, Any]) -> Any:
    """Return the containers with these values in place of the paths; None where a value is missing."""
    if isinstance(skeleton, _At):
        return values.get(skeleton.path)
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

"""A training batch: where images and labels lie in it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lightning_gradaudit.errors import EmptyBatchError, InvalidInputError

SampleId = str | int | Callable[[Any], Sequence[Any]]
"""Where the user's own names of the images are in a batch: the key or index of an entry, or a function of the batch."""

_LABEL_KEYS = ("label", "labels", "target", "targets", "y", "class")


@dataclass(frozen=True)
class Batch:
    """Images and labels of one step.

    Attributes:
        inputs: (B, C, H, W), floating point, in the model's input space (normalised as the model gets them).
        labels: (B,) class indices, or any tensor whose first dimension is B.
        ids: The user's names of the images, (B,) or none.
    """

    inputs: Tensor
    labels: Tensor
    ids: tuple[str, ...] = ()

    def copy(self) -> Batch:
        """Return a copy of its own memory, without a graph."""
        return Batch(self.inputs.detach().clone(), self.labels.detach().clone(), self.ids)

    def to(self, device: torch.device | str) -> Batch:
        """Return the batch on another device."""
        return Batch(self.inputs.to(device), self.labels.to(device), self.ids)


@dataclass(frozen=True, eq=False)
class BatchLayout:
    """Where images and labels lie in the user's batch, so that candidates can be put in their place.

    Other content of the batch never reaches the adversary: other tensors are replaced by zeros.

    Attributes:
        kind: "sequence" or "mapping".
        inputs_key: Index or key of the images.
        labels_key: Index or key of the labels.
        rest: The remaining entries, tensors zeroed.
        sample_id: Where the names of the images lie; None: they have none.
    """

    kind: str
    container: type
    inputs_key: Any
    labels_key: Any
    rest: tuple[tuple[Any, Any], ...] = ()
    sample_id: SampleId | None = None

    @classmethod
    def of(cls, batch: Any, sample_id: SampleId | None = None) -> BatchLayout:
        """Find images and labels in a batch; the entry that names images is not taken for labels.

        Raises:
            InvalidInputError: When the batch is no sequence or mapping, or images or labels are not found.
        """
        if isinstance(batch, Mapping):
            items: list[tuple[Any, Any]] = list(batch.items())
            kind: str = "mapping"
        elif isinstance(batch, Sequence) and not isinstance(batch, str):
            items, kind = list(enumerate(batch)), "sequence"
        else:
            raise InvalidInputError(
                f"batch: expected (images, labels) or a mapping that holds both, got {describe(batch)}. "
                "Let the dataloader yield such a batch."
            )
        inputs_key = _find_inputs(items)
        labels_key = _find_labels([item for item in items if item[0] != sample_id], inputs_key)
        rest = tuple((k, _without_content(v)) for k, v in items if k not in (inputs_key, labels_key))
        return cls(kind, type(batch), inputs_key, labels_key, rest, sample_id)

    @property
    def signature(self) -> tuple[Any, ...]:
        """What must be equal for one replica to serve two batches."""
        rest = tuple((k, (v.shape, v.dtype) if isinstance(v, Tensor) else None) for k, v in self.rest)
        return self.kind, self.container, self.inputs_key, self.labels_key, rest

    def split(self, batch: Any) -> Batch:
        """Take images, labels and names out of a batch of this layout.

        Raises:
            InvalidInputError: When the batch has another layout.
        """
        try:
            inputs, labels = batch[self.inputs_key], batch[self.labels_key]
        except (KeyError, IndexError, TypeError) as error:
            raise InvalidInputError(
                f"batch: its layout changed during the run: expected entries {self.inputs_key!r} and "
                f"{self.labels_key!r}, got {describe(batch)}."
            ) from error
        return Batch(inputs, labels, self._ids(batch, len(inputs)))

    def _ids(self, batch: Any, size: int) -> tuple[str, ...]:
        if self.sample_id is None:
            return ()
        try:
            found = self.sample_id(batch) if callable(self.sample_id) else batch[self.sample_id]
            ids = tuple(str(value) for value in (found.tolist() if isinstance(found, Tensor) else found))
        except (KeyError, IndexError, TypeError) as error:
            raise InvalidInputError(
                f"sample_id: expected the key or index of an entry of the batch, or a function of it, that gives one "
                f"name for each image; {self.sample_id!r} finds none in {describe(batch)}."
            ) from error
        if len(ids) != size:
            raise InvalidInputError(f"sample_id: expected {size} names, one for each image, got {len(ids)}.")
        return ids

    def join(self, inputs: Tensor, labels: Tensor) -> Any:
        """Make a batch of this layout that holds the given images and labels."""
        entries = dict(self.rest) | {self.inputs_key: inputs, self.labels_key: labels}
        if self.kind == "mapping":
            return entries
        values = [entries[k] for k in sorted(entries)]
        return values if self.container is list else tuple(values)


def describe(value: Any) -> str:
    """Say what something is, for an error message."""
    if isinstance(value, Tensor):
        return f"a tensor of shape {tuple(value.shape)} and {value.dtype}"
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{k!r}: {describe(v)}" for k, v in value.items()) + "}"
    if isinstance(value, Sequence) and not isinstance(value, str):
        return "[" + ", ".join(describe(v) for v in value) + "]"
    return type(value).__name__


def _without_content(value: Any) -> Any:
    return torch.zeros_like(value) if isinstance(value, Tensor) else None


def _find_inputs(items: list[tuple[Any, Any]]) -> Any:
    tensors = [(k, v) for k, v in items if isinstance(v, Tensor)]
    images = [k for k, v in tensors if v.ndim == 4 and v.is_floating_point()]
    if len(images) == 1:
        return images[0]
    received = describe(dict(items))
    if len(images) > 1:
        raise InvalidInputError(
            f"batch: expected one image tensor (B, C, H, W), got {len(images)} (entries {images}) in {received}. "
            "Pass the one to audit alone, with loss= for the rest."
        )
    integers = [k for k, v in tensors if v.ndim == 4]
    if integers:
        raise InvalidInputError(
            f"batch: images must be floating point (a gradient with respect to them is needed), entry "
            f"{integers[0]!r} is {dict(items)[integers[0]].dtype}. Convert them with x.float() / 255."
        )
    raise InvalidInputError(
        f"batch: expected images as a floating-point tensor (B, C, H, W), got {received}. "
        "Grayscale images need their channel dimension: x.unsqueeze(1)."
    )


def _find_labels(items: list[tuple[Any, Any]], inputs_key: Any) -> Any:
    size = dict(items)[inputs_key].shape[0]
    if size == 0:
        raise EmptyBatchError("batch: it is empty, so there is no gradient to audit.")
    tensors = [(k, v) for k, v in items if k != inputs_key and isinstance(v, Tensor) and v.ndim >= 1]
    fitting = [(k, v) for k, v in tensors if v.shape[0] == size]
    named = [k for k, _ in fitting if isinstance(k, str) and k.lower() in _LABEL_KEYS]
    integer = [k for k, v in fitting if v.ndim == 1 and not v.is_floating_point()]
    for candidates in (named, integer, [k for k, _ in fitting]):
        if len(candidates) == 1:
            return candidates[0]
    raise InvalidInputError(
        f"batch: expected one label tensor whose first dimension is {size}, got {describe(dict(items))}. "
        "Name it 'label' in a dict batch, or yield (images, labels)."
    )

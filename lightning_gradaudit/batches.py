"""A training batch: where images and labels lie in it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lightning_gradaudit.errors import EmptyBatchError, InvalidInputError

_LABEL_KEYS = ("label", "labels", "target", "targets", "y", "class")


@dataclass(frozen=True)
class Batch:
    """Images and labels of one step.

    Attributes:
        inputs: (B, C, H, W), floating point, in the model's input space (normalised as the model gets them).
        labels: (B,) class indices, or any tensor whose first dimension is B.
    """

    inputs: Tensor
    labels: Tensor

    def to(self, device: torch.device | str) -> Batch:
        """Return the batch on another device."""
        return Batch(self.inputs.to(device), self.labels.to(device))


@dataclass(frozen=True, eq=False)
class BatchLayout:
    """Where images and labels lie in the user's batch, so that candidates can be put in their place.

    Whatever else the batch holds never reaches the adversary: other tensors are replaced by zeros.

    Attributes:
        kind: "sequence" or "mapping".
        inputs_key: Index or key of the images.
        labels_key: Index or key of the labels.
        rest: The remaining entries, tensors zeroed.
    """

    kind: str
    container: type
    inputs_key: Any
    labels_key: Any
    rest: tuple[tuple[Any, Any], ...] = ()

    @classmethod
    def of(cls, batch: Any) -> BatchLayout:
        """Find images and labels in a batch.

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
        labels_key = _find_labels(items, inputs_key)
        rest = tuple((k, _without_content(v)) for k, v in items if k not in (inputs_key, labels_key))
        return cls(kind, type(batch), inputs_key, labels_key, rest)

    @property
    def signature(self) -> tuple[Any, ...]:
        """What must be equal for one replica to serve two batches."""
        rest = tuple((k, (v.shape, v.dtype) if isinstance(v, Tensor) else None) for k, v in self.rest)
        return self.kind, self.container, self.inputs_key, self.labels_key, rest

    def split(self, batch: Any) -> Batch:
        """Take images and labels out of a batch of this layout.

        Raises:
            InvalidInputError: When the batch has another layout.
        """
        try:
            return Batch(batch[self.inputs_key], batch[self.labels_key])
        except (KeyError, IndexError, TypeError) as error:
            raise InvalidInputError(
                f"batch: its layout changed during the run: expected entries {self.inputs_key!r} and "
                f"{self.labels_key!r}, got {describe(batch)}."
            ) from error

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
    came = describe(dict(items))
    if len(images) > 1:
        raise InvalidInputError(
            f"batch: expected one image tensor (B, C, H, W), got {len(images)} (entries {images}) in {came}. "
            "Pass the one to audit alone, with loss= for the rest."
        )
    integers = [k for k, v in tensors if v.ndim == 4]
    if integers:
        raise InvalidInputError(
            f"batch: images must be floating point (a gradient with respect to them is needed), entry "
            f"{integers[0]!r} is {dict(items)[integers[0]].dtype}. Convert them with x.float() / 255."
        )
    raise InvalidInputError(
        f"batch: expected images as a floating-point tensor (B, C, H, W), got {came}. "
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

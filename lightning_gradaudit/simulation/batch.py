"""A training batch: where images and labels lie in it, and what else the training step is given."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from lightning_gradaudit.errors import EmptyBatchError, InvalidInputError
from lightning_gradaudit.simulation.batch_entries import (
    OtherEntries,
    Path,
    copied,
    describe,
    fill,
    name_of,
    skeleton_of,
    walk,
)

SampleId = str | int | Callable[[Any], Sequence[Any]]
"""Where the user's own names of the images lie in a batch: an entry's key or index, or a function of the batch."""

_IMAGE_KEYS = ("image", "images", "img", "imgs", "pixel_values", "pixels", "x", "input", "inputs")
_LABEL_KEYS = ("label", "labels", "target", "targets", "y", "class")
_CHANNELS = (1, 3, 4)  # by which channels are told from heights, widths and views


@dataclass(frozen=True)
class Batch:
    """Images and labels of one step.

    Attributes:
        inputs: (B, C, H, W), floating point, in the model's input space (normalised as the model gets them). Where a
            sample has several images, all of them: first the first image of every sample, then the second.
        labels: (B,) class indices, or any tensor whose first dimension is B; (B, 0) where the batch has no entry that
            can be taken for the labels of its images: whatever labels it holds are then among `other`.
        ids: The user's names of the images, (B,) or none.
        other: What else the batch holds.
    """

    inputs: Tensor
    labels: Tensor
    ids: tuple[str, ...] = ()
    other: OtherEntries | None = field(default=None, repr=False)

    def to(self, device: torch.device | str) -> Batch:
        """Return the batch on another device."""
        other = None if self.other is None else self.other.to(device)
        return Batch(self.inputs.to(device), self.labels.to(device), self.ids, other)

    def copy(self) -> Batch:
        """Return a copy that shares no tensor: training steps may work in place on their batch."""
        other = None if self.other is None else self.other.copy()
        return Batch(copied(self.inputs), copied(self.labels), self.ids, other)


@dataclass(frozen=True)
class ImageEntry:
    """One entry of a batch that holds images, and how its dimensions are arranged.

    Attributes:
        path: Where it lies.
        views: Images of each sample in it.
        arrangement: "BCHW", "BHWC", "BVCHW" (several images a sample), "BCDHW" (a volume: its slices are the images) or
            "CHW" (one image, in a list of them).
        dtype: Of its elements; integers are attacked as the floating-point numbers that they are converted to.
        divisor: By which the replay divides these numbers, so that the step computes on them what it computes on the
            integers; None: the replay rounds them to the integers, through which nothing can be differentiated.
        channels_last: Whether its strides are those of `torch.channels_last`.
    """

    path: Path
    views: int
    arrangement: str
    dtype: torch.dtype
    divisor: float | None = 1.0
    channels_last: bool = False

    def images(self, tensor: Tensor) -> Tensor:
        """Return its images, (n, C, H, W), floating point: first the first one of every sample."""
        tensor = tensor if tensor.is_floating_point() else tensor.float()
        if self.arrangement == "CHW":
            return tensor[None]
        if self.arrangement == "BHWC":
            return tensor.permute(0, 3, 1, 2)
        if self.arrangement == "BVCHW":
            return tensor.transpose(0, 1).flatten(0, 1)
        return tensor.permute(2, 0, 1, 3, 4).flatten(0, 1) if self.arrangement == "BCDHW" else tensor

    def restore(self, images: Tensor) -> Tensor:
        """Return the entry that holds these images, (n, C, H, W).

        In the strides that the batch has, for dropout draws its mask in the order of memory.
        """
        if self.divisor is None:
            images = images.round().to(self.dtype)
        elif self.divisor != 1:
            images = images / self.divisor
        if self.arrangement == "CHW":
            return images[0]
        if self.arrangement == "BHWC":
            return images.permute(0, 2, 3, 1).clone(memory_format=torch.contiguous_format)
        if self.views == 1 and self.arrangement == "BCHW":
            return images.clone(memory_format=torch.channels_last) if self.channels_last else images
        by_view = images.unflatten(0, (self.views, -1))
        entry = by_view.transpose(0, 1) if self.arrangement == "BVCHW" else by_view.permute(1, 2, 0, 3, 4)
        return entry.contiguous()


@dataclass(frozen=True)
class ImageUse:
    """How a training step uses the images of its batches, as trials have shown (`find_image_use`).

    Attributes:
        unused: Entries with images that the loss does not depend on, so that no images of theirs can leak.
        divisor: Of integer images; see `ImageEntry`.
        refusal: Why no images can take the place of the integers; empty: some can.
    """

    unused: frozenset[Path] = frozenset()
    divisor: float = 1.0
    refusal: str = ""


@dataclass(frozen=True, eq=False)
class BatchLayout:
    """Where images and labels lie in the user's batch, so that candidates can be put in their place.

    Attributes:
        skeleton: The containers of the batch, with the path of each entry in its place.
        images: The entries that hold the images.
        labels: Path of the labels; None: see `Batch.labels`.
        sample_id: Where the names of the images lie; None: they have none.
    """

    skeleton: Any
    images: tuple[ImageEntry, ...]
    labels: Path | None
    sample_id: SampleId | None = None

    @classmethod
    def of(cls, batch: Any, sample_id: SampleId | None = None, *, use: ImageUse = ImageUse()) -> BatchLayout:
        """Find images and labels in a batch; the entry that names images is not taken for labels.

        Images are floating-point tensors of 4 dimensions (or 5: several images a sample) or a list of tensors
        (C, H, W), else such tensors of bytes, else of other integers. Where several entries qualify, those that are
        called images, else those of the shape of the first.

        Args:
            batch: As the training step gets it.
            sample_id: Where it holds names of its images.
            use: What the training step does with the images, where it has been tried.

        Raises:
            InvalidInputError: When no images are found, images of different sizes, or integers that the step treats
                unlike floating-point numbers.
            EmptyBatchError: When there is none.
        """
        entries = dict(walk(batch))
        images = _find_images(batch, {path: v for path, v in entries.items() if path not in use.unused})
        if use.refusal:
            raise InvalidInputError(use.refusal)
        images = tuple(replace(entry, divisor=use.divisor) for entry in images)
        views = sum(entry.views for entry in images)
        samples = _samples(images, entries)
        if samples == 0:
            raise EmptyBatchError("batch: it is empty, so there is no gradient to audit.")
        taken = {entry.path for entry in images} | {(sample_id,)}
        others = {path: value for path, value in entries.items() if path not in taken}
        labels = _find_labels(others, samples) if views == 1 and images[0].arrangement != "CHW" else None
        return cls(skeleton_of(batch), images, labels, sample_id)

    @property
    def views(self) -> int:
        """Images of each sample."""
        return 1 if self._is_list else sum(entry.views for entry in self.images)

    @property
    def _is_list(self) -> bool:
        return self.images[0].arrangement == "CHW"

    @property
    def signature(self) -> tuple[Any, ...]:
        """What must be equal for one replica to serve two batches."""
        return repr(self.skeleton), self.images, self.labels

    def split(self, batch: Any) -> Batch:
        """Take images, labels, names and all other entries out of a batch of this layout.

        Raises:
            InvalidInputError: When the batch has another layout.
        """
        entries = dict(walk(batch))
        try:
            inputs = torch.cat([entry.images(entries[entry.path]) for entry in self.images])
            labels = inputs.new_zeros((len(inputs), 0)) if self.labels is None else entries[self.labels]
        except (KeyError, AttributeError, TypeError, RuntimeError) as error:
            wanted = [name_of(entry.path) for entry in self.images]
            wanted += [] if self.labels is None else [name_of(self.labels)]
            raise InvalidInputError(
                f"batch: its layout changed during the run: expected entries {', '.join(wanted)}, got "
                f"{describe(batch)}."
            ) from error
        taken = {entry.path for entry in self.images} | {self.labels}
        samples = len(inputs) // self.views
        other = OtherEntries({path: value for path, value in entries.items() if path not in taken}, samples)
        return Batch(inputs, labels, self._ids(batch, samples), other)

    def _ids(self, batch: Any, samples: int) -> tuple[str, ...]:
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
        if len(ids) != samples:
            raise InvalidInputError(f"sample_id: expected {samples} names, one for each image, got {len(ids)}.")
        if self.views == 1:
            return ids
        return tuple(f"{name}, image {view + 1}" for view in range(self.views) for name in ids)

    def join(self, inputs: Tensor, labels: Tensor, other: OtherEntries | None = None) -> Any:
        """Make a batch of this layout that holds the given images and labels, and these other entries.

        Raises:
            InvalidInputError: When the number of images does not fit the layout.
        """
        if len(inputs) % self.views or (self._is_list and len(inputs) != len(self.images)):
            expected = len(self.images) if self._is_list else f"a multiple of {self.views}"
            raise InvalidInputError(f"batch: its layout takes {expected} images, got {len(inputs)}.")
        samples = len(inputs) // self.views
        # Copies: a step that changes its batch in place must find it unchanged in the next replay.
        values = {} if other is None else dict(other.of_size(samples).copy(tensors_only=True).entries)
        sizes = [entry.views if self._is_list else entry.views * samples for entry in self.images]
        start = 0
        for entry, size in zip(self.images, sizes, strict=True):
            # Narrowed and not split: autograd forbids steps to change what several outputs of one split view.
            values[entry.path] = entry.restore(inputs.narrow(0, start, size))
            start += size
        if self.labels is not None:
            values[self.labels] = labels.clone()
        return fill(self.skeleton, values)

    def model_input(self, inputs: Tensor) -> Tensor:
        """Return what a module gets that is called with the images alone.

        Raises:
            InvalidInputError: When the batch has several entries with images.
        """
        if len(self.images) > 1:
            raise InvalidInputError(
                f"loss: the batch has {len(self.images)} entries with images, and loss(module(images), labels) takes "
                "one. Pass loss=None, so that the module's own training_step is replayed."
            )
        return self.images[0].restore(inputs)


def _find_images(batch: Any, entries: Mapping[Path, Any]) -> tuple[ImageEntry, ...]:
    tensors = {path: value for path, value in entries.items() if isinstance(value, Tensor)}
    floating = {path: v for path, v in tensors.items() if v.is_floating_point()}
    pixels = {path: v for path, v in tensors.items() if v.dtype == torch.uint8}
    integers = {path: v for path, v in tensors.items() if path not in floating and v.dtype != torch.bool}
    for candidates in (floating, pixels, integers):
        found = {path: v for path, v in candidates.items() if v.ndim in (4, 5)}
        found = found or {path: v for path, v in candidates.items() if v.ndim == 3 and _is_in_list(path, v)}
        if found:
            return tuple(_entry(path, v) for path, v in _those_meant(found).items())
    raise InvalidInputError(_no_images(batch, tensors))


def _is_in_list(path: Path, value: Tensor) -> bool:
    """Whether a tensor is one image of a list of them, as detectors take them."""
    return len(path) >= 2 and isinstance(path[-1], int) and value.shape[0] in _CHANNELS


def _those_meant(found: dict[Path, Tensor]) -> dict[Path, Tensor]:
    """Return which of several entries are the images: those named so, else those of the shape of the first."""
    named = {path: v for path, v in found.items() if any(str(key).lower() in _IMAGE_KEYS for key in path)}
    found = named or found
    if len({path[:-1] for path in found}) == 1 and all(len(path) > 1 and isinstance(path[-1], int) for path in found):
        largest = max(v.shape[-2:].numel() for v in found.values())  # crops of several sizes, in one list
        found = {path: v for path, v in found.items() if v.ndim == 3 or v.shape[-2:].numel() == largest}
    if len({v.shape for v in found.values() if v.ndim == 4 and v.shape[1] == 3}) > 1:
        came = ", ".join(f"{name_of(path)}: {_size(v)}" for path, v in found.items())
        raise InvalidInputError(
            f"batch: expected images of one size, got several ({came}). Call the entry to audit 'image' in a "
            "dictionary batch; the others are then known to the adversary."
        )
    coloured = [v for v in found.values() if v.ndim == 4 and v.shape[1] == 3]
    first = coloured[0] if coloured else next(iter(found.values()))
    if first.ndim == 3 and len({v.shape for v in found.values()}) > 1:
        sizes = sorted({_size(v) for v in found.values()})
        raise InvalidInputError(
            f"batch: expected images of one size, got {', '.join(sizes)}. Resize or crop them to one size in "
            "the data set or in collate_fn; an attack searches for images of one shape."
        )
    return {path: v for path, v in found.items() if v.shape == first.shape and v.dtype == first.dtype}


def _size(tensor: Tensor) -> str:
    return "x".join(map(str, tensor.shape))


def _entry(path: Path, value: Tensor) -> ImageEntry:
    shape, views, arrangement = value.shape, 1, "CHW"
    if value.ndim == 4:
        last = shape[3] in _CHANNELS and shape[1] not in _CHANNELS
        arrangement = "BHWC" if last else "BCHW"
    elif value.ndim == 5:
        volume = shape[1] in _CHANNELS and shape[2] not in _CHANNELS
        arrangement, views = ("BCDHW", shape[2]) if volume else ("BVCHW", shape[1])
    return ImageEntry(path, views, arrangement, value.dtype, channels_last=_is_channels_last(value))


def _is_channels_last(value: Tensor) -> bool:
    if value.ndim != 4 or value.stride() == torch.empty(value.shape, device="meta").stride():
        return False
    return value.stride() == torch.empty(value.shape, device="meta", memory_format=torch.channels_last).stride()


def _samples(images: Sequence[ImageEntry], entries: Mapping[Path, Any]) -> int:
    return len(images) if images[0].arrangement == "CHW" else len(entries[images[0].path])


def _no_images(batch: Any, tensors: Mapping[Path, Tensor]) -> str:
    came = f"batch: expected images as a tensor (B, C, H, W), got {describe(batch)}."
    flat = [name_of(path) for path, v in tensors.items() if v.ndim == 3 and v.is_floating_point() and len(path) < 2]
    if flat:
        return f"{came} Grayscale images need their channel dimension: x.unsqueeze(1) (entry {flat[0]})."
    if not tensors:
        return f"{came} Let the dataloader yield tensors."
    return f"{came} Batches without images, such as text or tables, cannot be audited."


def _find_labels(entries: Mapping[Path, Any], samples: int) -> Path | None:
    """Return the entry that holds one label for each image; None where none or several could."""
    fitting = {p: v for p, v in entries.items() if isinstance(v, Tensor) and v.ndim >= 1 and v.shape[0] == samples}
    named = [p for p in fitting if p and str(p[-1]).lower() in _LABEL_KEYS]
    integer = [p for p, v in fitting.items() if v.ndim == 1 and not v.is_floating_point()]
    for candidates in (named, integer, list(fitting)):
        if len(candidates) == 1:
            return candidates[0]
    return integer[0] if integer else None

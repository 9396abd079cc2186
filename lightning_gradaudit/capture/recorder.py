"""The base of all recorders: the micro-batches of one step and the gradient they gave."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from lightning_gradaudit.capture.trainer_state import accumulated, automatic, whole
from lightning_gradaudit.errors import EmptyBatchError
from lightning_gradaudit.simulation.batch import Batch, BatchLayout, ImageUse, SampleId
from lightning_gradaudit.simulation.defences import Defence
from lightning_gradaudit.simulation.replay import ProcessRandomness
from lightning_gradaudit.simulation.sharing import MicroBatch, SharingProtocol


@dataclass(frozen=True)
class RecordedMicroBatch:
    """One micro-batch as it was before its forward pass."""

    truth: Batch
    rng_state: Tensor
    process_rng: ProcessRandomness | None  # None: its step drew nothing from these generators
    rank: int = 0


class GradientRecorder:
    """Record one sampled gradient while training computes it.

    Args:
        trainer, module: Of the run.
        step: The logger's step at its first batch.
        optimizer: Index of the optimizer that is followed.

    Attributes:
        parts: Micro-batches so far; empty ones are left out.
        buffers, frozen: Buffers and frozen weights of the module, before the first forward pass.
        keeps_trained: Whether trained weights are kept from before the first forward pass too, in `trained`.
        layout: Of the batch.
        gradients, parameters: What was captured; complete recorders have both.
        noiseless: See `Snapshot`.
        clip: Clipping that lies between the summed gradient and what was captured.
        fault: The error of a hook; nothing is raised into a backward pass or an optimizer.
        complete: Whether the adversary's gradient is recorded.
        void: Whether it never will be (the optimizer's step was skipped, or all batches were empty).
        sample_id, use: See `BatchLayout.of`.
        shares_buffers: Whether the buffers after the step are kept too, as `buffers_after`.
    """

    sample_id: SampleId | None = None
    use: ImageUse = ImageUse()
    clip: Defence | None = None
    shares_buffers: bool = False
    keeps_trained = False

    def __init__(self, trainer: Any, module: nn.Module, *, step: int, optimizer: int = 0) -> None:
        self.trainer, self.module, self.step = trainer, module, step
        self.index = optimizer
        self.parts: list[RecordedMicroBatch] = []
        self.buffers: dict[str, Tensor] = {}
        self.buffers_after: dict[str, Tensor] | None = None
        self.frozen: dict[str, Tensor] = {}
        self.trained: dict[str, Tensor] = {}
        self.layout: BatchLayout | None = None
        self.gradients: dict[str, Tensor] = {}
        self.parameters: dict[str, Tensor] = {}
        self.noiseless: dict[str, Tensor] | None = None
        self.fault: Exception | None = None
        self.complete = self.void = False
        self._drew: set[int] = set()  # parts whose step drew from Python's or numpy's generator
        self.seconds = 0.0  # in hooks that torch calls
        self._handles: list[Any] = []
        self._open()

    # Events of training, in this order

    def add_batch(self, batch: Any) -> None:
        """Copy a micro-batch before its forward pass: the step may change it in place, and updates BatchNorm.

        Raises:
            InvalidInputError: When it holds no images or labels that can be audited.
        """
        try:
            layout = BatchLayout.of(batch, self.sample_id, use=self.use)
        except EmptyBatchError:
            return
        truth = layout.split(batch)
        if not self.parts:
            self.layout = layout
            # A step may change frozen weights before its gradient is there, as momentum encoders do.
            self.frozen = {name: whole(p) for name, p in self.module.named_parameters() if not p.requires_grad}
            if self.keeps_trained:
                self.trained = {name: whole(p) for name, p in self.module.named_parameters() if p.requires_grad}
            self.buffers = {name: whole(buffer) for name, buffer in self.module.named_buffers()}
        self.parts.append(RecordedMicroBatch(truth.copy(), torch.get_rng_state(), ProcessRandomness.now()))

    def note_draws(self) -> None:
        """Note whether the step has drawn from Python's or numpy's generator since the last batch came."""
        state = self.parts[-1].process_rng if self.parts else None
        if state is not None and not state.is_now():
            self._drew.add(len(self.parts) - 1)

    def after_backward(self) -> None:
        """A backward pass has ended."""

    def before_optimizer_step(self, optimizer: Any) -> None:
        """Gradients are summed, reduced and unscaled; not yet clipped."""

    def before_zero_grad(self) -> None:
        """Gradients are about to be zeroed, by a line search for one."""

    def end_of_batch(self) -> None:
        """The batch has ended."""

    def end_of_training(self) -> None:
        """Training has ended."""
        self.void = not self.complete

    def close(self) -> None:
        """Remove every hook; safe at any time."""
        for handle in self._handles:
            handle.remove()
        self._handles = []

    # What a view defines

    spans_batches = True
    ties_images = False

    @classmethod
    def starts_at(cls, trainer: Any, module: nn.Module, batch_idx: int) -> bool:
        """Tell whether a recorder of this view can start at this batch of the epoch."""
        return not cls.spans_batches or batch_idx % accumulated(trainer, module) == 0

    def _open(self) -> None:
        """Register hooks."""

    def _gradient_share(self) -> float:
        """Return the factor of each micro-batch's mean gradient in what was captured."""
        return 1.0

    def protocol(self, numbered: Sequence[MicroBatch]) -> SharingProtocol:
        """Return how the images became what was captured; `numbered` says which micro-batch has which image."""
        return SharingProtocol(steps=(tuple(numbered),), scale=self._gradient_share(), clip=self.clip)

    # Shared by the views

    @property
    def _optimizer(self) -> Any:
        return self.trainer.optimizers[self.index]

    def _trained_parameters(self) -> dict[str, nn.Parameter]:
        """Return the trained parameters, in the module's order; under manual optimization, those of `optimizer`."""
        named = {name: p for name, p in self.module.named_parameters() if p.requires_grad}
        if automatic(self.module):
            return named
        own = {id(p) for group in self._optimizer.param_groups for p in group["params"]}
        return {name: p for name, p in self.module.named_parameters() if id(p) in own}

    def _current_gradients(self) -> dict[str, Tensor]:
        """Return the gradients that the trained parameters hold now."""
        return {name: whole(p.grad) for name, p in self._trained_parameters().items() if p.grad is not None}

    def _current_weights(self) -> dict[str, Tensor]:
        named = self.module.named_parameters()
        return {name: self.frozen[name] if name in self.frozen else whole(p) for name, p in named}

    def _keep_buffers(self) -> None:
        if self.shares_buffers:
            self.buffers_after = {name: whole(buffer) for name, buffer in self.module.named_buffers()}

    def _watch_gradients(self) -> None:
        """Sum what each backward pass contributes, before any reduction."""
        for name, parameter in self._trained_parameters().items():
            self._handles.append(parameter.register_hook(lambda g, n=name: self._catch_errors(self._accumulate, n, g)))

    def _catch_errors(self, work: Callable[..., None], *args: Any) -> None:
        start = time.perf_counter()
        try:
            work(*args)
        except Exception as error:
            self.fault = error
            self.close()
        self.seconds += time.perf_counter() - start

    def _accumulate(self, name: str, gradient: Tensor) -> None:
        before = self.gradients.get(name)
        kept = gradient.detach()
        self.gradients[name] = kept.clone() if before is None else before + kept

    def _finish(self, gradients: Mapping[str, Tensor], factor: Any = 1) -> None:
        """Keep gradients in the order of the module, and the weights they belong to."""
        self.close()
        names = [name for name, _ in self.module.named_parameters() if name in gradients]
        self.gradients = {
            n: gradients[n] if isinstance(factor, int) and factor == 1 else gradients[n] * factor for n in names
        }
        self.parameters = self._current_weights()
        self._keep_buffers()
        self.void = not self.parts
        self.complete = not self.void

    def kept_parts(self) -> list[RecordedMicroBatch]:
        """Return the parts without random states that no step drew from: graphs are shared by what needs none."""
        return [part if at in self._drew else replace(part, process_rng=None) for at, part in enumerate(self.parts)]

    def take_parts(self, parts: Sequence[RecordedMicroBatch]) -> None:
        """Hold the parts of all processes in place of this one's."""
        self.parts, self._drew = list(parts), {at for at, part in enumerate(parts) if part.process_rng is not None}

    def assemble(self) -> tuple[Batch, SharingProtocol]:
        """Return the images of all micro-batches as one batch, and how they became what was captured."""
        truth, numbered = assemble(self.kept_parts(), tie=self.ties_images)
        return truth, self.protocol(numbered)


def assemble(parts: Sequence[RecordedMicroBatch], *, tie: bool = False) -> tuple[Batch, list[MicroBatch]]:
    """Join the images of all micro-batches to one batch, and number them for each micro-batch.

    Args:
        parts: The micro-batches, at least one.
        tie: Count a repeated image (with the same label) once, as in the second epoch of a local training: the stronger
            adversary, who knows the order of the batches.
    """
    images: list[Tensor] = []
    labels: list[Tensor] = []
    ids: list[str] = []
    known: dict[Any, int] = {}
    numbered = []
    for part in parts:
        indices = []
        names = part.truth.ids or [""] * len(part.truth.inputs)
        for image, label, name in zip(part.truth.inputs, part.truth.labels, names, strict=True):
            key = (_bytes_of(image), _bytes_of(label)) if tie else len(images)
            if key not in known:
                known[key] = len(images)
                images.append(image)
                labels.append(label)
                ids.append(name)
            indices.append(known[key])
        numbered.append(MicroBatch(tuple(indices), part.rank, part.rng_state, part.process_rng, part.truth.other))
    return Batch(torch.stack(images), torch.stack(labels), tuple(ids) if any(ids) else ()), numbered


def _bytes_of(tensor: Tensor) -> bytes:
    return tensor.detach().cpu().float().numpy().tobytes()

"""One class for each view: which hooks to hang, when the gradient is there, and how it came about.

A window opens at a sampled batch and is complete once it holds what an adversary with that view holds. Facts about
the order of Lightning's hooks are in the documentation's support table, each pinned by a test.
"""

from __future__ import annotations

import time
from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lightning_gradaudit.errors import EmptyBatchError, UnsupportedError
from lightning_gradaudit.simulation.batch import Batch, BatchLayout, SampleId
from lightning_gradaudit.simulation.defences import ClipNorm, ClipValue, Defence
from lightning_gradaudit.simulation.sharing import LocalOptimizer, MicroBatch, PrivateSum, Protocol


@dataclass(frozen=True)
class Part:
    """One micro-batch as it was before its forward pass."""

    truth: Batch
    rng_state: Tensor
    rank: int = 0


class Window:
    """One sampled gradient in the making.

    Args:
        trainer, module: Of the run.
        step: The logger's step at its first batch.
        optimizer: Index of the optimizer that is followed.

    Attributes:
        parts: Micro-batches so far; empty ones are left out.
        buffers: Of the module, before the first forward pass.
        layout: Of the batch.
        gradients, parameters: What was captured; complete windows have both.
        noiseless: See `Snapshot`.
        fault: What went wrong inside a hook; nothing is raised into a backward pass or an optimizer.
        complete: Whether the adversary's gradient is there.
        void: Whether it will never come (the optimizer's step was skipped, or all batches were empty).
        sample_id: Where batches hold names of their images (see `BatchLayout`).
    """

    sample_id: SampleId | None = None

    def __init__(self, trainer: Any, module: nn.Module, *, step: int, optimizer: int = 0) -> None:
        self.trainer, self.module, self.step = trainer, module, step
        self.index = optimizer
        self.parts: list[Part] = []
        self.buffers: dict[str, Tensor] = {}
        self.layout: BatchLayout | None = None
        self.gradients: dict[str, Tensor] = {}
        self.parameters: dict[str, Tensor] = {}
        self.noiseless: dict[str, Tensor] | None = None
        self.fault: Exception | None = None
        self.complete = self.void = False
        self.seconds = 0.0  # in hooks that torch calls
        self._handles: list[Any] = []
        self._open()

    # What happens in training, in this order

    def add_batch(self, batch: Any) -> None:
        """Keep a micro-batch before its forward pass: the step may work in place on it, and moves BatchNorm.

        Raises:
            InvalidInputError: When it holds no images or labels that can be audited.
        """
        try:
            layout = BatchLayout.of(batch, self.sample_id)
        except EmptyBatchError:
            return
        truth = layout.split(batch)
        if not self.parts:
            self.layout = layout
            self.buffers = {name: whole(buffer) for name, buffer in self.module.named_buffers()}
        kept = Batch(truth.inputs.detach().clone(), truth.labels.detach().clone(), truth.ids)
        self.parts.append(Part(kept, torch.get_rng_state()))

    def after_backward(self) -> None:
        """A backward pass has ended."""

    def before_optimizer_step(self, optimizer: Any) -> None:
        """Gradients are summed, reduced and unscaled; not yet clipped."""

    def before_zero_grad(self) -> None:
        """Gradients are about to be zeroed, by a line search for one."""

    def end_of_batch(self) -> None:
        """The batch is done with."""

    def end_of_training(self) -> None:
        """There will be no further batch."""
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
        """Tell whether a window of this view can open at this batch of the epoch."""
        return not cls.spans_batches or batch_idx % accumulated(trainer, module) == 0

    def _open(self) -> None:
        """Hang hooks."""

    @abstractmethod
    def protocol(self, numbered: Sequence[MicroBatch]) -> Protocol:
        """Say how the images of `parts` became what was captured; `numbered` says who has which (see `assemble`)."""

    # Shared by the views

    @property
    def _optimizer(self) -> Any:
        return self.trainer.optimizers[self.index]

    def _named(self) -> dict[str, nn.Parameter]:
        """Return the trained parameters, in the module's order; by hand, those of the followed optimizer."""
        named = {name: p for name, p in self.module.named_parameters() if p.requires_grad}
        if automatic(self.module):
            return named
        own = {id(p) for group in self._optimizer.param_groups for p in group["params"]}
        return {name: p for name, p in self.module.named_parameters() if id(p) in own}

    def _watch_gradients(self) -> None:
        """Add up what each backward pass contributes, before any reduction."""
        for name, parameter in self._named().items():
            self._handles.append(parameter.register_hook(lambda g, n=name: self._quietly(self._add, n, g)))

    def _quietly(self, work: Callable[..., None], *args: Any) -> None:
        start = time.perf_counter()
        try:
            work(*args)
        except Exception as error:
            self.fault = error
            self.close()
        self.seconds += time.perf_counter() - start

    def _add(self, name: str, gradient: Tensor) -> None:
        before = self.gradients.get(name)
        kept = gradient.detach()
        self.gradients[name] = kept.clone() if before is None else before + kept

    def _finish(self, gradients: Mapping[str, Tensor], factor: Any = 1) -> None:
        """Keep gradients in the order of the module, and the weights that they were taken at."""
        self.close()
        names = [name for name, _ in self.module.named_parameters() if name in gradients]
        self.gradients = {
            n: gradients[n] if isinstance(factor, int) and factor == 1 else gradients[n] * factor for n in names
        }
        self.parameters = {name: whole(p) for name, p in self.module.named_parameters()}
        self.void = not self.parts
        self.complete = not self.void

    def assemble(self) -> tuple[Batch, Protocol]:
        """Return the images of all parts in a row, and how they became what was captured."""
        truth, numbered = assemble(self.parts, tie=self.ties_images)
        return truth, self.protocol(numbered)


class LocalWindow(Window):
    """One process, one micro-batch, before everything: only a hook on each parameter sees it alone."""

    spans_batches = False

    def _open(self) -> None:
        self._watch_gradients()

    def after_backward(self) -> None:
        # The loss was divided by the number of micro-batches and multiplied by the scale of mixed precision.
        self._finish(self.gradients, undo(self.trainer, accumulated(self.trainer, self.module)))

    def end_of_batch(self) -> None:
        self.void = not self.complete

    def protocol(self, numbered: Sequence[MicroBatch]) -> Protocol:
        return _one_step(numbered)


class StepWindow(Window):
    """One process, the sum over the micro-batches of one optimizer step."""

    def _open(self) -> None:
        self._watch_gradients()

    def before_optimizer_step(self, optimizer: Any) -> None:
        self._finish(self.gradients, undo(self.trainer, 1))

    def protocol(self, numbered: Sequence[MicroBatch]) -> Protocol:
        return _one_step(numbered, 1 / accumulated(self.trainer, self.module))


class ReducedWindow(Window):
    """The mean over all processes, as each of them gets it."""

    def before_optimizer_step(self, optimizer: Any) -> None:
        self._finish(*self._reduced())

    def _reduced(self) -> tuple[dict[str, Tensor], Any]:
        gradients = {name: whole(p.grad) for name, p in self._named().items() if p.grad is not None}
        # Fused optimizers unscale by themselves, later.
        scaled = getattr(self._optimizer, "_step_supports_amp_scaling", False)
        return gradients, undo(self.trainer, 1) if scaled else 1

    def protocol(self, numbered: Sequence[MicroBatch]) -> Protocol:
        return _one_step(numbered, 1 / (accumulated(self.trainer, self.module) * self.trainer.world_size))


class UpdateWindow(ReducedWindow):
    """What the optimizer is given. Clipping comes between two hooks, so both sides of it are looked at."""

    clip: Defence | None = None

    def before_optimizer_step(self, optimizer: Any) -> None:
        if self.parameters:  # a further evaluation of a line search, at other weights
            return
        gradients, factor = self._reduced()
        super()._finish(gradients, factor)
        self.complete = False
        self._scaled = not isinstance(factor, int)
        self._handles.append(self._optimizer.register_step_post_hook(lambda *_: self._quietly(self._clipped)))

    def before_zero_grad(self) -> None:
        if self.parameters and "max_eval" in self._optimizer.defaults:  # only a line search comes back within a step
            self._clipped()

    def _clipped(self) -> None:
        if self.complete:
            return
        self.close()
        if not self._scaled:  # no clipping under fused optimizers: Lightning refuses it
            raw = self.gradients
            self.gradients = {name: whole(p.grad) for name, p in self._named().items() if p.grad is not None}
            self.clip = clip_between(raw, self.gradients)
        self.complete = bool(self.parts)

    def end_of_batch(self) -> None:
        self.void = bool(self.parameters) and not self.complete  # mixed precision skips steps that overflow

    def protocol(self, numbered: Sequence[MicroBatch]) -> Protocol:
        scale = 1 / (accumulated(self.trainer, self.module) * self.trainer.world_size)
        return _one_step(numbered, scale, clip=self.clip)


class PrivateUpdateWindow(Window):
    """What Opacus gives the optimizer that it wraps: per-sample gradients clipped, summed, noised, divided."""

    @classmethod
    def starts_at(cls, trainer: Any, module: nn.Module, batch_idx: int) -> bool:
        return not trainer.optimizers[0]._is_last_step_skipped and super().starts_at(trainer, module, batch_idx)

    def _open(self) -> None:
        inner = self._optimizer.original_optimizer
        self._handles.append(inner.register_step_pre_hook(lambda *_: self._quietly(self._noised)))

    def _noised(self) -> None:
        dp: Any = self._optimizer
        named: dict[str, Any] = dict(self._named())
        missing = [name for name, p in named.items() if getattr(p, "summed_grad", None) is None]
        if missing:
            raise UnsupportedError(
                f"Opacus: the optimizer stepped on gradients that were neither clipped nor noised ({missing[0]}): this "
                "run trains WITHOUT differential privacy. Step the DPOptimizer, not the optimizer inside it."
            )
        mean = dp.loss_reduction == "mean"
        self._divisor = float(dp.expected_batch_size * dp.accumulated_iterations) if mean else 1.0
        self._finish({name: whole(p.grad) for name, p in named.items() if p.grad is not None})
        self.noiseless = {
            name: named[name].summed_grad.detach().view_as(g) / self._divisor for name, g in self.gradients.items()
        }
        self._mechanism = float(dp.max_grad_norm), float(dp.noise_multiplier)

    def protocol(self, numbered: Sequence[MicroBatch]) -> Protocol:
        max_norm, noise = self._mechanism
        private = PrivateSum(max_norm=max_norm, noise_multiplier=noise, divisor=self._divisor)
        return _one_step(numbered, 1 / accumulated(self.trainer, self.module), private=private)


class DeltaWindow(Window):
    """The change of the weights over some optimizer steps, or over all that are left.

    Attributes:
        local_steps: How many; None: until training ends.
    """

    ties_images = True
    local_steps: int | None = None

    def _open(self) -> None:
        self.parameters = {name: whole(p) for name, p in self.module.named_parameters()}
        names = {id(p): name for name, p in self.module.named_parameters()}
        self._start = LocalOptimizer.of(self._optimizer, names)
        self._steps: list[tuple[Part, ...]] = []
        self._settings: list[tuple[dict[str, Any], ...]] = []
        self._taken = 0
        self._handles.append(self._optimizer.register_step_post_hook(lambda *_: self._quietly(self._stepped)))

    def _stepped(self) -> None:
        self._steps.append(tuple(self.parts[self._taken :]))
        self._taken = len(self.parts)
        self._settings.append(LocalOptimizer.settings_of(self._optimizer))

    def add_batch(self, batch: Any) -> None:
        if self.trainer.fit_loop.epoch_loop.batch_idx % accumulated(self.trainer, self.module) == 0:
            self.parts = self.parts[: self._taken]  # micro-batches whose step was skipped were zeroed away
        super().add_batch(batch)

    def end_of_batch(self) -> None:
        if self.local_steps is not None and len(self._steps) >= self.local_steps:
            self._change()

    def end_of_training(self) -> None:
        self._change()

    def _change(self) -> None:
        self.close()
        self.parts = self.parts[: self._taken]
        named = self._named()
        self.gradients = {name: whole(p) - self.parameters[name] for name, p in named.items()}
        self.void, self.complete = not self._steps, bool(self._steps)

    def protocol(self, numbered: Sequence[MicroBatch]) -> Protocol:
        left = iter(numbered)
        steps = tuple(tuple(next(left) for _ in step) for step in self._steps)
        local = LocalOptimizer(
            kind=self._start.kind, groups=self._start.groups, settings=tuple(self._settings), state=self._start.state
        )
        scale = 1 / accumulated(self.trainer, self.module)
        return Protocol(steps=steps, scale=scale, clip=declared_clip(self.trainer), optimizer=local)


class ManualWindow(Window):
    """By hand: one optimizer's gradient in one batch, told apart from the passes that its zeroing threw away."""

    spans_batches = False

    def _open(self) -> None:
        self._parameters_of_name = self._named()
        self._watch_gradients()

    def _add(self, name: str, gradient: Tensor) -> None:
        held = self._parameters_of_name[name].grad
        if held is None or not bool(held.any()):
            self.gradients.pop(name, None)
        super()._add(name, gradient)

    def before_optimizer_step(self, optimizer: Any) -> None:
        # Lightning's hook comes after the closure that a step may have been given; the optimizer's own before it.
        if optimizer is self._optimizer and not self.complete:
            self._stepping()

    def _stepping(self) -> None:
        self._finish(self.gradients, undo(self.trainer, 1))

    def end_of_batch(self) -> None:
        if not self.complete and self.gradients:  # accumulating by hand: no step in this batch
            self._stepping()
        self.void = not self.complete

    def protocol(self, numbered: Sequence[MicroBatch]) -> Protocol:
        return _one_step(numbered)


class ManualUpdateWindow(ManualWindow):
    """By hand, after whatever clipping the training step does."""

    clip: Defence | None = None

    def _stepping(self) -> None:
        raw = {name: g * undo(self.trainer, 1) for name, g in self.gradients.items()}
        self._finish({name: whole(p.grad) for name, p in self._named().items() if p.grad is not None})
        self.clip = clip_between(raw, self.gradients)

    def end_of_batch(self) -> None:
        self.void = not self.complete

    def protocol(self, numbered: Sequence[MicroBatch]) -> Protocol:
        return _one_step(numbered, clip=self.clip)


# Facts about a run


def automatic(module: Any) -> bool:
    """Whether Lightning optimises; else the training step does, by hand."""
    return bool(getattr(module, "automatic_optimization", True))


def accumulated(trainer: Any, module: nn.Module) -> int:
    """Number of micro-batches that Lightning divides the loss by."""
    return int(trainer.accumulate_grad_batches) if automatic(module) else 1


def undo(trainer: Any, divided_by: int) -> Any:
    """Return the factor that undoes Lightning's division and the loss scale of mixed precision."""
    scaler = getattr(trainer.precision_plugin, "scaler", None)
    scale = getattr(scaler, "_scale", None)  # the tensor: get_scale() would synchronise with the device
    return divided_by if scale is None else divided_by / scale.detach().clone()


def declared_clip(trainer: Any) -> Defence | None:
    """Return the clipping that the Trainer was asked for."""
    value = trainer.gradient_clip_val
    if not value:
        return None
    if str(trainer.gradient_clip_algorithm or "norm").rsplit(".", maxsplit=1)[-1].lower() == "value":
        return ClipValue(max_value=float(value))
    return ClipNorm(max_norm=float(value))


def clip_between(raw: Mapping[str, Tensor], clipped: Mapping[str, Tensor]) -> Defence | None:
    """Infer which clipping lies between two gradients; what is neither kind is left to fail the self-test.

    The limit is read off the result, which the adversary holds too, so nothing has to be believed of the settings.
    """
    before = torch.cat([raw[name].flatten().float() for name in clipped if name in raw])
    after = torch.cat([clipped[name].flatten().float() for name in clipped if name in raw])
    if len(before) != sum(g.numel() for g in clipped.values()) or torch.equal(before, after):
        return None
    norm, largest = after.norm(), after.abs().max()
    near = 1e-2 if any(g.dtype in (torch.bfloat16, torch.float16) for g in clipped.values()) else 1e-4
    if norm > 0 and (before * (norm / before.norm()) - after).norm() <= near * norm and norm < before.norm():
        return ClipNorm(max_norm=float(norm))
    if largest > 0 and (before.clamp(-largest, largest) - after).norm() <= near * norm:
        return ClipValue(max_value=float(largest))
    return None


def whole(tensor: Tensor) -> Tensor:
    """Copy a tensor; one that is sharded over processes is gathered, which is a collective."""
    detached = tensor.detach()
    return detached.full_tensor() if hasattr(detached, "full_tensor") else detached.clone()


def _one_step(numbered: Sequence[MicroBatch], scale: float = 1.0, **settings: Any) -> Protocol:
    return Protocol(steps=(tuple(numbered),), scale=scale, **settings)


def assemble(parts: Sequence[Part], *, tie: bool = False) -> tuple[Batch, list[MicroBatch]]:
    """Put the images of all micro-batches in a row, and say which micro-batch has which.

    Args:
        parts: The micro-batches, at least one.
        tie: Count an image that comes again (with the same label) once, as in the second epoch of a local training:
            the stronger adversary, who knows the order of the batches.
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
            key = (_content(image), _content(label)) if tie else len(images)
            if key not in known:
                known[key] = len(images)
                images.append(image)
                labels.append(label)
                ids.append(name)
            indices.append(known[key])
        numbered.append(MicroBatch(tuple(indices), part.rank, part.rng_state))
    return Batch(torch.stack(images), torch.stack(labels), tuple(ids) if any(ids) else ()), numbered


def _content(tensor: Tensor) -> bytes:
    return tensor.detach().cpu().float().numpy().tobytes()

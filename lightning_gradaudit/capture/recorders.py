"""One recorder for each view: which hooks it registers, when the gradient is complete, and how it was made.

A recorder starts at a sampled batch and is complete once it holds what an adversary with that view holds. Facts about
the order of Lightning's hooks are in the documentation's support table, each with a test.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from lightning_gradaudit.capture.recorder import GradientRecorder, RecordedMicroBatch
from lightning_gradaudit.capture.trainer_state import (
    accumulated,
    batch_index_in_epoch,
    clip_between,
    declared_clip,
    undo,
    unscales_itself,
    whole,
)
from lightning_gradaudit.simulation.local_optimizer import LocalOptimizer
from lightning_gradaudit.simulation.sharing import MicroBatch, SharingProtocol


class LocalRecorder(GradientRecorder):
    """One process and one micro-batch, before anything else: only a hook on each parameter sees that gradient alone."""

    spans_batches = False

    def _open(self) -> None:
        self._watch_gradients()

    def after_backward(self) -> None:
        # The loss was divided by the number of micro-batches and multiplied by the scale of mixed precision.
        self._finish(self.gradients, undo(self.trainer, accumulated(self.trainer, self.module)))

    def end_of_batch(self) -> None:
        self.void = not self.complete


class StepRecorder(GradientRecorder):
    """One process, the sum over the micro-batches of one optimizer step."""

    def _open(self) -> None:
        self._watch_gradients()

    def before_optimizer_step(self, optimizer: Any) -> None:
        self._finish(self.gradients, undo(self.trainer, 1))

    def _gradient_share(self) -> float:
        return 1 / accumulated(self.trainer, self.module)


class ReducedRecorder(GradientRecorder):
    """The mean over all processes, as each of them gets it."""

    def before_optimizer_step(self, optimizer: Any) -> None:
        self._finish(*self._reduced())

    def _reduced(self) -> tuple[dict[str, Tensor], Any]:
        return self._current_gradients(), undo(self.trainer, 1) if unscales_itself(self._optimizer) else 1

    def _gradient_share(self) -> float:
        return 1 / (accumulated(self.trainer, self.module) * self.trainer.world_size)


class UpdateRecorder(ReducedRecorder):
    """What the optimizer is given. Clipping comes between two hooks, so the gradient is read before and after it."""

    infers_clip = True

    def before_optimizer_step(self, optimizer: Any) -> None:
        if self.parameters:  # a further evaluation of a line search, at other weights
            return
        gradients, factor = self._reduced()
        super()._finish(gradients, factor)
        self.complete = False
        self._scaled = not isinstance(factor, int)
        self._handles.append(
            self._optimizer.register_step_post_hook(lambda *_: self._catch_errors(self._record_clipped))
        )

    def before_zero_grad(self) -> None:
        if self.parameters and "max_eval" in self._optimizer.defaults:  # only a line search zeroes within a step
            self._record_clipped()

    def _record_clipped(self) -> None:
        if self.complete:
            return
        self.close()
        if not self._scaled:  # no clipping under fused optimizers: Lightning refuses it
            raw = self.gradients
            self.gradients = self._current_gradients()
            self.clip = clip_between(raw, self.gradients) if self.infers_clip else None
        self.complete = bool(self.parts)

    def end_of_batch(self) -> None:
        self.void = bool(self.parameters) and not self.complete  # mixed precision skips steps that overflow


class DeltaRecorder(GradientRecorder):
    """The change of the weights over some optimizer steps, or over all that are left.

    Attributes:
        local_steps: How many; None: until training ends.
    """

    ties_images = True
    local_steps: int | None = None

    def _open(self) -> None:
        self.parameters = self._current_weights()
        names = {id(p): name for name, p in self.module.named_parameters()}
        self._start = LocalOptimizer.of(self._optimizer, names)
        self._steps: list[tuple[RecordedMicroBatch, ...]] = []
        self._settings: list[tuple[dict[str, Any], ...]] = []
        self._used_parts = 0
        self._handles.append(self._optimizer.register_step_post_hook(lambda *_: self._catch_errors(self._record_step)))

    def _record_step(self) -> None:
        self._steps.append(tuple(self.parts[self._used_parts :]))
        self._used_parts = len(self.parts)
        self._settings.append(LocalOptimizer.settings_of(self._optimizer))

    def add_batch(self, batch: Any) -> None:
        if batch_index_in_epoch(self.trainer) % accumulated(self.trainer, self.module) == 0:
            self.parts = self.parts[: self._used_parts]  # the gradients of a skipped step were zeroed
        super().add_batch(batch)

    def end_of_batch(self) -> None:
        if self.local_steps is not None and len(self._steps) >= self.local_steps:
            self._record_change()

    def end_of_training(self) -> None:
        self._record_change()

    def _record_change(self) -> None:
        self.close()
        self.parts = self.parts[: self._used_parts]
        trained = self._trained_parameters()
        self.gradients = {name: whole(p) - self.parameters[name] for name, p in trained.items()}
        self._keep_buffers()
        self.void, self.complete = not self._steps, bool(self._steps)

    def protocol(self, numbered: Sequence[MicroBatch]) -> SharingProtocol:
        left = iter(numbered)
        steps = tuple(tuple(next(left) for _ in step) for step in self._steps)
        local = LocalOptimizer(
            kind=self._start.kind, groups=self._start.groups, settings=tuple(self._settings), state=self._start.state
        )
        scale = 1 / accumulated(self.trainer, self.module)
        return SharingProtocol(steps=steps, scale=scale, clip=declared_clip(self.trainer), optimizer=local)


class ManualRecorder(GradientRecorder):
    """Manual optimization: one optimizer's gradient in one batch, since that optimizer last zeroed it."""

    spans_batches = False

    def _open(self) -> None:
        self._parameters_by_name = self._trained_parameters()
        self._watch_gradients()

    def _accumulate(self, name: str, gradient: Tensor) -> None:
        held = self._parameters_by_name[name].grad
        if held is None or not bool(held.any()):
            self.gradients.pop(name, None)
        super()._accumulate(name, gradient)

    def before_optimizer_step(self, optimizer: Any) -> None:
        # Lightning calls this hook after the closure of a step; the optimizer calls its own before it.
        if optimizer is self._optimizer and not self.complete:
            self._record_step()

    def _record_step(self) -> None:
        self._finish(self.gradients, undo(self.trainer, 1))

    def end_of_batch(self) -> None:
        if not self.complete and self.gradients:  # the module accumulates: no step in this batch
            self._record_step()
        self.void = not self.complete


class ManualUpdateRecorder(ManualRecorder):
    """Manual optimization, after any clipping by the training step."""

    def _record_step(self) -> None:
        raw = {name: g * undo(self.trainer, 1) for name, g in self.gradients.items()}
        self._finish(self._current_gradients())
        self.clip = clip_between(raw, self.gradients)

    def end_of_batch(self) -> None:
        self.void = not self.complete

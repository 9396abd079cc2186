"""What is read of a Trainer's state: progress, accumulation, clipping, loss scaling.

The only file that reads attributes which Lightning, torch or Opacus keep private. Each of these facts is asserted by
`tests/capture/test_trainer_state.py` against an independent observation of a real fit.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lightning_gradaudit.simulation.defences import ClipNorm, ClipValue, Defence


def logged_step(trainer: Any) -> int:
    """Return the step that Lightning stamps logged values with: the number of batches that ended in an optimizer step.

    It differs from `global_step` where a module steps several optimizers for each batch.
    """
    return int(trainer.fit_loop.epoch_loop._batches_that_stepped)


def batch_index(trainer: Any) -> int:
    """Return the index of the present training batch since the start of the run, over all epochs."""
    return int(trainer.fit_loop.epoch_loop.total_batch_idx)


def batch_index_in_epoch(trainer: Any) -> int:
    """Return the index of the present training batch in its epoch."""
    return int(trainer.fit_loop.epoch_loop.batch_idx)


def ends_optimizer_step(trainer: Any) -> bool:
    """Whether the present batch ends with an optimizer step; else its gradient is accumulated further."""
    return not trainer.fit_loop._should_accumulate()


def live_callback_metrics(trainer: Any) -> dict[str, Tensor]:
    """Return the dictionary behind `trainer.callback_metrics`, to write into.

    The property computes every logged value at each access, too slow for every batch.
    """
    metrics: dict[str, Tensor] = trainer._logger_connector._callback_metrics
    return metrics


def loss_scale(trainer: Any) -> Tensor | None:
    """Return the present loss scale of mixed precision as a tensor; None: losses are not scaled.

    `GradScaler.get_scale()` would synchronise with the device.
    """
    scaler = getattr(trainer.precision_plugin, "scaler", None)
    scale = getattr(scaler, "_scale", None)
    return None if scale is None else scale.detach().clone()


def unscales_itself(optimizer: Any) -> bool:
    """Whether an optimizer undoes the loss scale inside its step, as fused optimizers do."""
    return bool(getattr(optimizer, "_step_supports_amp_scaling", False))


def accumulates_virtually(optimizer: Any) -> bool:
    """Whether an optimizer of Opacus left its last step out, to add further physical batches to a logical one."""
    return bool(optimizer._is_last_step_skipped)


def buffer_versions(module: nn.Module) -> dict[str, tuple[int, int]]:
    """Return which tensor each buffer is, and how often it was written to in place."""
    return {name: (id(buffer), buffer._version) for name, buffer in module.named_buffers()}


def automatic(module: Any) -> bool:
    """Whether Lightning steps the optimizers (automatic optimization); else the training step does."""
    return bool(getattr(module, "automatic_optimization", True))


def accumulated(trainer: Any, module: nn.Module) -> int:
    """Number of micro-batches that Lightning divides the loss by."""
    return int(trainer.accumulate_grad_batches) if automatic(module) else 1


def undo(trainer: Any, divided_by: int) -> Any:
    """Return the factor that undoes Lightning's division and the loss scale of mixed precision."""
    scale = loss_scale(trainer)
    return divided_by if scale is None else divided_by / scale


def declared_clip(trainer: Any) -> Defence | None:
    """Return the clipping that the Trainer was asked for."""
    value = trainer.gradient_clip_val
    if not value:
        return None
    if str(trainer.gradient_clip_algorithm or "norm").rsplit(".", maxsplit=1)[-1].lower() == "value":
        return ClipValue(max_value=float(value))
    return ClipNorm(max_norm=float(value))


def clip_between(raw: Mapping[str, Tensor], clipped: Mapping[str, Tensor]) -> Defence | None:
    """Infer which clipping lies between two gradients; None where it is of neither kind (the self-test then fails).

    The limit is read from the result, which the adversary holds too, and not from the Trainer's settings.
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


def weights_version(module: nn.Module) -> tuple[tuple[int, int], ...]:
    """Return what changes with every write to parameters and buffers, but for writes through `.data`."""
    tensors = [*module.parameters(), *module.buffers()]
    return tuple((tensor.data_ptr(), tensor._version) for tensor in tensors)


def seconds_left(trainer: Any, began: tuple[float, int]) -> float:
    """Estimate how long training will go on; infinite where that is not known.

    Args:
        trainer: Of the run.
        began: A moment of it (`time.monotonic`), and the logger's step then.
    """
    began_at, first = began
    step = logged_step(trainer)
    batches = (trainer.max_epochs or -1) * trainer.num_training_batches
    lengths = [length for length in (trainer.max_steps, batches) if 0 <= length < math.inf]
    timers = (getattr(callback, "time_remaining", None) for callback in trainer.callbacks)  # Lightning's `Timer`
    by_time = min((left for timer in timers if timer and (left := timer()) is not None), default=math.inf)
    if not lengths or step <= first:
        return float(by_time)
    return float(min(by_time, max(0.0, min(lengths) - step) * (time.monotonic() - began_at) / (step - first)))

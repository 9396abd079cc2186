"""What is read of a Trainer's state: accumulation, clipping, loss scaling."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lightning_gradaudit.simulation.defences import ClipNorm, ClipValue, Defence


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

"""`ApplyDefences`: train with defended gradients."""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from pytorch_lightning import LightningModule, Trainer
from torch import Tensor

from lightning_gradaudit.callbacks.lightning_compat import resolve_base
from lightning_gradaudit.capture.trainer_state import automatic, logged_step, loss_scale
from lightning_gradaudit.errors import InvalidInputError, UnsupportedError
from lightning_gradaudit.simulation.defences import Defence, apply_defences, check_defences, step_seed

if TYPE_CHECKING:
    from pytorch_lightning import Callback
else:
    Callback = resolve_base("callbacks.Callback")


class ApplyDefences(Callback):
    """Replace the gradient of every optimizer step by a defended one: what leaves, and what training goes on with.

    The defences act on `param.grad` once it is summed over accumulated micro-batches, before the optimizer steps.
    Tensors that a defence does not share get no gradient, so the optimizer leaves their weights alone. A `GradAudit`
    in the same Trainer, before or after it, audits the defended gradient (view "update") and declares the defences.
    Training equals a loop written by hand that calls `apply_defences(defences, gradients, seed=callback.seed_at(step))`
    between backward pass and step, bit for bit. Random numbers are drawn on the CPU.

    Args:
        defences: Applied in this order; none: training is left as it is.
        seed: Of their random numbers, together with the step. It must stay secret: who knows it can subtract the noise.
            None: drawn from the operating system, and drawn anew when a run is resumed.

    Raises:
        InvalidInputError: When what is given is no defence; at the start of a fit, when the Trainer clips gradients.
        UnsupportedError: At the start of a fit, for several processes, manual optimization, Opacus, scaled losses
            (16-mixed) and optimizers that evaluate a step several times.
    """

    def __init__(self, defences: Sequence[Defence], *, seed: int | None = None) -> None:
        self.defences = tuple(defences)
        check_defences(self.defences)
        self._seed = secrets.randbits(62) if seed is None else seed

    @property
    def state_key(self) -> str:
        return type(self).__qualname__

    def seed_at(self, step: int) -> int:
        """Return the seed of the random numbers of one step, the logger's; secret to the adversary."""
        return step_seed(self._seed, step)

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not self.defences:
            return
        _refuse_unsupported(trainer, pl_module)
        # Once on zeros: a defence that does not fit the module fails before training, and not in its middle.
        gradients = {name: torch.zeros_like(p) for name, p in pl_module.named_parameters() if p.requires_grad}
        if not apply_defences(self.defences, gradients, seed=0):
            raise InvalidInputError("defences: nothing would be shared, so there is nothing to train with.")

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Any) -> None:
        if not self.defences:
            return
        named = {name: p for name, p in pl_module.named_parameters() if p.grad is not None}
        gradients: dict[str, Tensor] = {name: p.grad.detach() for name, p in named.items() if p.grad is not None}
        shared = apply_defences(self.defences, gradients, seed=self.seed_at(logged_step(trainer)))
        for name, parameter in named.items():
            if name in shared:
                gradients[name].copy_(shared[name])
            else:
                parameter.grad = None


def _refuse_unsupported(trainer: Any, module: LightningModule) -> None:
    """Raise where the gradient that leaves is not the one that a hook can change."""
    if sum(isinstance(each, ApplyDefences) for each in trainer.callbacks) > 1:
        raise InvalidInputError("callbacks: give all defences to one ApplyDefences, in the order in which they act.")
    if trainer.gradient_clip_val:
        raise InvalidInputError(
            "gradient_clip_val: the Trainer would clip after the defences; put ClipNorm(max_norm=...) among them."
        )
    reason = ""
    if trainer.world_size > 1 or any(hasattr(p, "full_tensor") for p in module.parameters()):
        reason = "several processes average their gradients before a hook can defend each; train with devices=1"
    elif not automatic(module):
        reason = "under manual optimization only the training step knows what it shares; call apply_defences there"
    elif any(hasattr(o, "original_optimizer") for o in trainer.optimizers):
        reason = "Opacus already clips and noises what leaves; use one of the two"
    elif any("max_eval" in o.defaults for o in trainer.optimizers):
        reason = "an optimizer that evaluates a step several times shares several gradients; use SGD or Adam"
    elif loss_scale(trainer) is not None:
        reason = "gradients of scaled losses (16-mixed) may overflow; use precision='bf16-mixed' or '32-true'"
    if reason:
        raise UnsupportedError(f"ApplyDefences: {reason}.")

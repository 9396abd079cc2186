"""Opacus: whether a run really trains with differential privacy, and what it shares."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from pytorch_lightning import LightningModule, Trainer
from torch import nn

from lightning_gradaudit.capture.recorder import GradientRecorder
from lightning_gradaudit.capture.trainer_state import accumulated, accumulates_virtually
from lightning_gradaudit.errors import UnsupportedError
from lightning_gradaudit.simulation.sharing import MicroBatch, PrivateSum, SharingProtocol

FLAT_CLIPPING = "opacus.optimizers.optimizer.DPOptimizer"
POISSON_SAMPLER = "opacus.utils.uniform_sampler.UniformWithReplacementSampler"
MECHANISM_METHODS = ("clip_and_accumulate", "add_noise", "scale_grad", "pre_step", "step", "zero_grad")
"""What of Opacus' optimizer makes up the mechanism."""


def private_training_warnings(trainer: Trainer, module: LightningModule) -> list[str]:
    """Return one line for each fault of a run that should train with differential privacy."""
    optimizers: list[Any] = list(trainer.optimizers)
    wrapped = [o for o in optimizers if hasattr(o, "original_optimizer")]
    prepared = any(hasattr(p, "grad_sample") for p in module.parameters())
    if not wrapped:
        if not prepared:
            return []
        names = ", ".join(type(o).__name__ for o in optimizers)
        return [
            f"Opacus is attached to the module, but the Trainer's optimizer ({names}) is not its DPOptimizer: this run "
            "trains WITHOUT differential privacy. Return make_private's optimizer from configure_optimizers."
        ]
    trained = {id(p) for p in module.parameters() if p.requires_grad}
    covered = {id(p) for o in wrapped for group in o.param_groups for p in group["params"]}
    if trained - covered:
        return [
            f"{len(trained - covered)} trained tensors are not in Opacus' optimizer: they train WITHOUT differential "
            "privacy. Make the optimizer from all parameters before make_private."
        ]
    if any(not o.noise_multiplier > 0 for o in wrapped):
        return ["Opacus' noise_multiplier is 0: this run trains WITHOUT differential privacy."]
    return []


def mechanism_faults(trainer: Trainer, module: LightningModule) -> list[str]:
    """Return one line for each reason why a run is not the mechanism that accountants account for.

    That is: per-sample clipping to one norm, a sum, Gaussian noise, over batches that are Poisson samples, in one
    process with one optimizer. What is not recognised counts as a fault.
    """
    found = private_training_warnings(trainer, module)
    optimizers: list[Any] = list(trainer.optimizers)
    if len(optimizers) != 1 or trainer.world_size != 1:
        found.append(f"{len(optimizers)} optimizers in {trainer.world_size} processes: accounted for is one in one.")
    kinds = [f"{type(o).__module__}.{type(o).__qualname__}" for o in optimizers]
    if any(kind != FLAT_CLIPPING for kind in kinds):
        found.append(f"The optimizer is {', '.join(kinds)}: accounted for is per-sample clipping by {FLAT_CLIPPING}.")
    replaced = sorted(set().union(*(vars(o) for o in optimizers)) & set(MECHANISM_METHODS))
    if replaced:
        found.append(f"Opacus' {', '.join(replaced)} was replaced: what it does is not accounted for.")
    if poisson_rate(trainer) is None:
        found.append(
            "The training batches are not Poisson samples of Opacus' sampler, which accounting by sampling rate takes: "
            "train on make_private(..., poisson_sampling=True)'s data loader."
        )
    return found


def poisson_rate(trainer: Trainer) -> float | None:
    """Return the sample rate of the Poisson sampler that training draws its batches from; None: there is none."""
    sampler: Any = getattr(trainer.train_dataloader, "batch_sampler", None)
    if f"{type(sampler).__module__}.{type(sampler).__qualname__}" != POISSON_SAMPLER:
        return None
    return float(sampler.sample_rate)


class PrivateUpdateRecorder(GradientRecorder):
    """What Opacus gives the optimizer that it wraps: per-sample gradients clipped, summed, noised, divided."""

    @classmethod
    def starts_at(cls, trainer: Any, module: nn.Module, batch_idx: int) -> bool:
        return not accumulates_virtually(trainer.optimizers[0]) and super().starts_at(trainer, module, batch_idx)

    def _open(self) -> None:
        inner = self._optimizer.original_optimizer
        self._handles.append(inner.register_step_pre_hook(lambda *_: self._catch_errors(self._record_noised)))

    def _record_noised(self) -> None:
        dp: Any = self._optimizer
        named: dict[str, Any] = dict(self._trained_parameters())
        missing = [name for name, p in named.items() if getattr(p, "summed_grad", None) is None]
        if missing:
            raise UnsupportedError(
                f"Opacus: the optimizer stepped on gradients that were neither clipped nor noised ({missing[0]}): this "
                "run trains WITHOUT differential privacy. Step the DPOptimizer, not the optimizer inside it."
            )
        mean = dp.loss_reduction == "mean"
        self._divisor = float(dp.expected_batch_size * dp.accumulated_iterations) if mean else 1.0
        self._finish(self._current_gradients())
        self.noiseless = {
            name: named[name].summed_grad.detach().view_as(g) / self._divisor for name, g in self.gradients.items()
        }
        self._mechanism = float(dp.max_grad_norm), float(dp.noise_multiplier)

    def protocol(self, numbered: Sequence[MicroBatch]) -> SharingProtocol:
        max_norm, noise = self._mechanism
        private = PrivateSum(max_norm=max_norm, noise_multiplier=noise, divisor=self._divisor)
        return replace(super().protocol(numbered), private=private)

    def _gradient_share(self) -> float:
        return 1 / accumulated(self.trainer, self.module)

"""Whether a run that is meant to train with differential privacy really does."""

from __future__ import annotations

from typing import Any

from pytorch_lightning import LightningModule, Trainer


def private_training_warnings(trainer: Trainer, module: LightningModule) -> list[str]:
    """Say, in one line each, what is wrong with a run that is meant to train with differential privacy."""
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

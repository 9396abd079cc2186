"""Take, from a live Trainer, exactly the gradient that an adversary would hold, and change nothing.

Only the view "local" so far: the gradient of one rank and one micro-batch before any reduction, accumulation or
clipping. A hook on each parameter sees just that, while `p.grad` would be a running sum.
"""

from __future__ import annotations

import logging
from dataclasses import replace
from typing import Any

import torch
from pytorch_lightning import LightningModule, Trainer
from torch import Tensor

from lightning_gradaudit.batches import Batch, BatchLayout
from lightning_gradaudit.client import Client, Loss, module_modes
from lightning_gradaudit.errors import InvalidInputError, UnsupportedError
from lightning_gradaudit.observation import Normalization, ThreatModel
from lightning_gradaudit.snapshot import Snapshot

log = logging.getLogger(__name__)

VIEWS = ("local",)


class Capture:
    """Hooks for the steps that are sampled, and for those alone.

    Args:
        loss: See `Client`.
        threat_model: Who sees what; its precision is set from the Trainer.
        seed: Seeds the client's defences, together with the step.
    """

    def __init__(self, *, loss: Loss | None, threat_model: ThreatModel, seed: int) -> None:
        if threat_model.view not in VIEWS:
            raise InvalidInputError(f"view: expected one of {VIEWS}, got {threat_model.view!r}.")
        self.loss = loss
        self.threat_model = threat_model
        self.seed = seed
        self._client: Client | None = None
        self._handles: list[Any] = []
        self._gradients: dict[str, Tensor] = {}
        self._pending: dict[str, Any] = {}

    @property
    def armed(self) -> bool:
        """Whether hooks are in place."""
        return bool(self._handles)

    def check(self, trainer: Trainer, module: LightningModule) -> None:
        """Refuse what cannot be captured, before training starts.

        Raises:
            UnsupportedError: For strategies whose gradients this version cannot see whole.
            InvalidInputError: When the module has no trainable parameter.
        """
        strategy = type(trainer.strategy).__name__
        if trainer.world_size > 1 or not strategy.startswith("SingleDevice"):
            raise UnsupportedError(
                f"strategy: {strategy} with {trainer.world_size} processes cannot be audited by this version; "
                "audit a run with Trainer(devices=1), or offline with Snapshot.from_batch."
            )
        if not any(p.requires_grad for p in module.parameters()):
            raise InvalidInputError(
                f"module: {type(module).__name__} has no trainable parameter, so there is no gradient to audit."
            )

    def arm(self, trainer: Trainer, module: LightningModule, batch: Any, *, step: int) -> None:
        """Prepare to capture the backward pass of this batch.

        Raises:
            InvalidInputError: When the batch holds no images or labels that can be audited.
        """
        layout = BatchLayout.of(batch)
        truth = layout.split(batch)
        client = self._client_for(trainer, module, layout, truth)
        self._gradients = {}
        self._pending = {
            "step": step,
            "client": client,
            # The step may work in place on its batch, and moves BatchNorm's buffers: keep what was there before.
            "truth": Batch(truth.inputs.detach().clone(), truth.labels.detach().clone()),
            "buffers": {name: buffer.detach().clone() for name, buffer in module.named_buffers()},
            "rng_state": torch.get_rng_state(),
        }
        for name, parameter in module.named_parameters():
            if parameter.requires_grad:
                self._handles.append(parameter.register_hook(lambda g, n=name: self._keep(n, g)))

    def _keep(self, name: str, gradient: Tensor) -> None:
        # A parameter can be reached twice only by a second backward pass, which is not this sample's.
        if name not in self._gradients:
            self._gradients[name] = gradient.detach().clone()

    def _client_for(self, trainer: Trainer, module: LightningModule, layout: BatchLayout, truth: Batch) -> Client:
        known = self._client
        if known is None or known.modes != module_modes(module) or known.layout.signature != layout.signature:
            self._client = Client(
                module,
                loss=self.loss,
                layout=layout,
                like=truth,
                precision=str(trainer.precision),
            )
        assert self._client is not None
        return self._client

    def take(self, trainer: Trainer, module: LightningModule, normalization: Normalization) -> Snapshot:
        """Finish after the backward pass, before the optimizer moves the weights.

        Raises:
            UnsupportedError: When no gradient passed the hooks.
        """
        self.disarm()
        gradients, pending = self._gradients, self._pending
        self._gradients, self._pending = {}, {}
        if not gradients:
            raise UnsupportedError(
                "No gradient passed the hooks of this step (the loss reaches no trainable parameter, or the "
                "strategy hides them), so there is nothing to audit."
            )
        # Hooks fire in the order of the backward pass; records and defences follow that of the module.
        gradients = {name: gradients[name] for name, _ in module.named_parameters() if name in gradients}
        undone = _undo_scaling(trainer, module, gradients)
        return Snapshot.capture(
            step=pending["step"],
            client=pending["client"],
            gradients=undone,
            parameters={name: p.detach().clone() for name, p in module.named_parameters()},
            buffers=pending["buffers"],
            truth=pending["truth"],
            threat_model=_with_precision(self.threat_model, trainer),
            normalization=normalization,
            seed=self.seed * 1_000_003 + pending["step"],
            rng_state=pending["rng_state"],
        )

    def disarm(self) -> None:
        """Remove every hook; safe at any time."""
        for handle in self._handles:
            handle.remove()
        self._handles = []


def _with_precision(threat_model: ThreatModel, trainer: Trainer) -> ThreatModel:
    return replace(threat_model, precision=str(trainer.precision))


def _undo_scaling(trainer: Trainer, module: LightningModule, gradients: dict[str, Tensor]) -> dict[str, Tensor]:
    """Undo what Lightning multiplies the loss by: 1/N under accumulation, the scale under 16-mixed."""
    factor: Any = trainer.accumulate_grad_batches if module.automatic_optimization else 1
    scaler = getattr(trainer.precision_plugin, "scaler", None)
    scale = getattr(scaler, "_scale", None)  # the tensor: get_scale() would synchronise with the device
    if scale is not None:
        factor = factor / scale.detach().clone()
    if isinstance(factor, int) and factor == 1:
        return gradients
    return {name: g * factor for name, g in gradients.items()}


def normalization_of_data(trainer: Trainer) -> Normalization | None:
    """Read a `Normalize` among the transforms of the training data, where there is one."""
    loader: Any = trainer.train_dataloader
    dataset: Any = getattr(loader, "dataset", None)
    while hasattr(dataset, "dataset"):  # Subset and its like
        dataset = dataset.dataset
    transform = getattr(dataset, "transform", None)
    for step in getattr(transform, "transforms", [transform]):
        if type(step).__name__ == "Normalize" and hasattr(step, "mean") and hasattr(step, "std"):
            return Normalization.of(step.mean, step.std)
    return None


def normalization_of_range(inputs: Tensor) -> Normalization:
    """Infer the pixel range from images: [0, 1] when they lie in it, else their own extremes."""
    low, high = float(inputs.min()), float(inputs.max())
    if low >= 0 and high <= 1:
        return Normalization()
    log.warning(
        "GradAudit: images span [%.2f, %.2f] and no normalisation is known; this range is taken for [0, 1]. "
        "Pass mean= and std=.",
        low,
        high,
    )
    # pixel = (input - low) / (high - low), so input = (pixel - mean) / std with:
    width = max(high - low, 1e-6)
    return Normalization.of(-low / width, 1 / width)

"""Take, from a live Trainer, exactly what an adversary would hold, and change nothing."""

from __future__ import annotations

import copy
import logging
from dataclasses import replace
from typing import Any

import torch
from pytorch_lightning import LightningModule, Trainer
from pytorch_lightning.utilities import rank_zero_info
from torch import Tensor, nn

from lightning_gradaudit.capture.distributed import ProcessGroup
from lightning_gradaudit.capture.opacus import PrivateUpdateRecorder, private_training_warnings
from lightning_gradaudit.capture.recorder import GradientRecorder, RecordedMicroBatch
from lightning_gradaudit.capture.recorders import (
    DeltaRecorder,
    LocalRecorder,
    ManualRecorder,
    ManualUpdateRecorder,
    ReducedRecorder,
    StepRecorder,
    UpdateRecorder,
)
from lightning_gradaudit.capture.trainer_state import automatic
from lightning_gradaudit.errors import InvalidInputError, UnsupportedError
from lightning_gradaudit.simulation.batch import Batch, BatchLayout, SampleId
from lightning_gradaudit.simulation.local_optimizer import LocalOptimizer
from lightning_gradaudit.simulation.normalization import Normalization
from lightning_gradaudit.simulation.replica import replicate
from lightning_gradaudit.simulation.snapshot import Snapshot
from lightning_gradaudit.simulation.threat_model import ThreatModel, View
from lightning_gradaudit.simulation.training_step import Loss, TrainingStep, module_modes

log = logging.getLogger(__name__)

_RECORDERS: dict[str, type[GradientRecorder]] = {
    "local": LocalRecorder,
    "step": StepRecorder,
    "reduced": ReducedRecorder,
    "update": UpdateRecorder,
    "delta": DeltaRecorder,
}
_BY_HAND: dict[str, type[GradientRecorder]] = {"local": ManualRecorder, "update": ManualUpdateRecorder}
_OFFLINE = "or audit single batches offline with Snapshot.from_batch"


class Capture:
    """The windows of a run: opened at sampled batches, and at those alone.

    Args:
        loss: See `TrainingStep`.
        threat_model: Who sees what; its precision is set from the Trainer.
        choose_view: Let the run decide: "update" under Opacus, else "local".
        seed: Seeds the client's defences, together with the step.
        optimizer: Index of the audited optimizer where the module optimises by hand; None: the first whose gradient
            depends on the images.
        local_steps: For "delta": optimizer steps before the client shares; None: the whole fit.
        public_images: What the adversary holds besides (see `Observation`).
        sample_id: Where batches hold names of their images (see `BatchLayout`).
    """

    def __init__(
        self,
        *,
        loss: Loss | None,
        threat_model: ThreatModel,
        choose_view: bool = False,
        seed: int = 0,
        optimizer: int | None = None,
        local_steps: int | None = None,
        public_images: Tensor | None = None,
        sample_id: SampleId | None = None,
    ) -> None:
        if local_steps is not None and local_steps < 1:
            raise InvalidInputError(f"local_steps must be >= 1 or None, got {local_steps!r}.")
        self.loss, self.threat_model, self.choose_view = loss, threat_model, choose_view
        self.seed, self.optimizer, self.local_steps = seed, optimizer, local_steps
        self.public_images, self.sample_id = public_images, sample_id
        self.ranks = ProcessGroup()
        self._client: TrainingStep | None = None
        self._skeleton: nn.Module | None = None
        self._window: GradientRecorder | None = None
        self._due = False
        self.seconds = 0.0  # in hooks that torch called, of windows that are closed

    # Before training

    def check(self, trainer: Trainer, module: LightningModule) -> None:
        """Refuse what cannot be captured, before the module is wrapped.

        Raises:
            UnsupportedError: For strategies whose gradients cannot be seen whole.
            InvalidInputError: When the module has no trainable parameter.
        """
        kinds = {kind.__name__ for kind in type(trainer.strategy).__mro__}
        name, view = type(trainer.strategy).__name__, self.threat_model.view
        if kinds & {"SingleDeviceStrategy", "DDPStrategy"}:
            pass
        elif "ModelParallelStrategy" in kinds:
            if view != "reduced":
                raise UnsupportedError(
                    f"strategy: under {name} each process holds shards, so view={view!r} does not exist as a tensor "
                    f"anywhere; use view='reduced', {_OFFLINE}."
                )
            # Sharding changes the module's class in place; what is to be replayed is copied before.
            self._skeleton = replicate(module, None)
        else:
            raise UnsupportedError(
                f"strategy: {name} is unsupported, it keeps gradients in shards or buffers of its own; use "
                f"strategy='ddp', or ModelParallelStrategy with view='reduced', {_OFFLINE}."
            )
        if not any(p.requires_grad for p in module.parameters()):
            hint = "" if self._skeleton is None else " Build layers in __init__, and only shard in configure_model."
            raise InvalidInputError(
                f"module: {type(module).__name__} has no trainable parameter, so there is no gradient to audit.{hint}"
            )
        if trainer.world_size > 1 and view == "delta":
            raise UnsupportedError(
                "view='delta' is what one client shares after training alone, this run has "
                f"{trainer.world_size} processes; use view='reduced' or 'update'."
            )
        self.ranks = ProcessGroup(trainer.world_size, trainer.global_rank)

    def start(self, trainer: Trainer, module: LightningModule) -> list[str]:
        """Settle the view now that the optimizers are there; return warnings about the run.

        Raises:
            UnsupportedError: When the view does not exist in this run.
        """
        self.ranks.open()
        optimizer: Any = trainer.optimizers[self.optimizer or 0] if trainer.optimizers else None
        private = hasattr(optimizer, "original_optimizer")
        if self.choose_view:
            view: View = "update" if private else "local"
            self.threat_model = replace(self.threat_model, view=view)
            why = "Opacus: what leaves is clipped and noised" if private else "one process, one micro-batch"
            rank_zero_info(f"GradAudit: view={view!r} ({why}).")
        elif private and self.threat_model.view != "update":
            log.warning("GradAudit: view=%r is not what leaves under Opacus; view='update' is.", self.threat_model.view)
        self.threat_model = replace(self.threat_model, precision=str(trainer.precision))
        self.window_kind = self._kind(module, private=private)
        if self.threat_model.view == "delta":
            LocalOptimizer.check(optimizer)
        return private_training_warnings(trainer, module)

    def _kind(self, module: LightningModule, *, private: bool) -> type[GradientRecorder]:
        view = self.threat_model.view
        if not automatic(module):
            if view not in _BY_HAND or (not self.ranks.is_single and view != "local"):
                raise UnsupportedError(
                    f"view={view!r} is not defined for manual optimization"
                    f"{'' if self.ranks.is_single else ' in several processes'}, where only the training step "
                    f"knows what "
                    "it sums and when; use view='local'."
                )
            return _BY_HAND[view]
        if private and view == "update":
            if not self.ranks.is_single:
                raise UnsupportedError("Opacus in several processes is unsupported; audit a run with devices=1.")
            return PrivateUpdateRecorder
        return _RECORDERS[view]

    # During training

    @property
    def armed(self) -> bool:
        """Whether a window is open."""
        return self._window is not None

    @property
    def waiting(self) -> bool:
        """Whether the next batch matters: a window is open, or due at the next batch where one can start."""
        return self._due or self._window is not None

    @property
    def collective(self) -> bool:
        """Whether a window is completed by all processes together."""
        return not self.ranks.is_single and self.threat_model.view in ("reduced", "update")

    def batch_start(
        self, trainer: Trainer, module: LightningModule, batch: Any, batch_idx: int, *, due: bool, room: bool, step: int
    ) -> bool:
        """Open a window where one is due, and hand the batch to the open one; return False when it was dropped.

        Args:
            due: Whether the schedule samples this batch. A view that spans several batches waits for its start.
            room: Whether a snapshot would find a place in the queue. Collective views cannot ask: they are dropped
                when complete.
            step: The logger's step.

        Raises:
            InvalidInputError: When the batch holds no images or labels that can be audited.
        """
        self._due |= due and self._window is None
        starts = self._due and self._window is None and self.window_kind.starts_at(trainer, module, batch_idx)
        if starts:
            self._due = False
            if not room and not self.collective:
                return False
            self._window = self._opened(trainer, module, batch, step)
        if self._window is not None:
            try:
                self._window.add_batch(batch)
            except Exception as error:
                if not self.collective:
                    raise
                self._window.fault = error  # the others are waiting for this process
        return True

    def _opened(self, trainer: Trainer, module: LightningModule, batch: Any, step: int) -> GradientRecorder:
        index = 0
        if not automatic(module):
            if self.optimizer is None:
                self.optimizer = self._first_that_sees_images(trainer, module, batch)
            index = self.optimizer
        window = self.window_kind(trainer, module, step=step, optimizer=index)
        window.sample_id = self.sample_id
        if isinstance(window, DeltaRecorder):
            window.local_steps = self.local_steps
        return window

    def tell(self, event: str, *args: Any) -> None:
        """Pass one of `GradientRecorder`'s events on to the open window."""
        if self._window is not None:
            getattr(self._window, event)(*args)

    def ready(self, *, stepped: bool) -> bool:
        """Whether the open window is complete, or will never be.

        Args:
            stepped: Whether the batch that an optimizer step belongs to has ended. Collective windows are taken then
                and only then, whatever became of them in this process.
        """
        window = self._window
        if window is None or self.collective:
            return window is not None and stepped
        return window.complete or window.void or window.fault is not None

    def take(self, trainer: Trainer, module: LightningModule, normalization: Normalization) -> Snapshot | None:
        """Close the window; None when there is nothing to audit in it, or another process has it.

        Raises:
            UnsupportedError: When no gradient passed the hooks, or another process failed.
        """
        window, self._window = self._window, None
        assert window is not None
        self._close(window)
        if self.collective:
            window = self._joined(window)
        if window.fault is not None:
            raise window.fault
        if not window.complete or (self.collective and not self.ranks.is_global_zero):
            return None
        if not window.gradients:
            raise UnsupportedError(
                "No gradient passed the hooks of this step (the loss reaches no trainable parameter, or the "
                "strategy hides them), so there is nothing to audit."
            )
        truth, protocol = window.assemble()
        assert window.layout is not None
        return Snapshot.capture(
            step=window.step,
            client=self._client_for(trainer, module, window.layout, truth, window.index),
            gradients=window.gradients,
            parameters=window.parameters,
            buffers=window.buffers,
            truth=truth,
            threat_model=self.threat_model,
            normalization=normalization,
            protocol=protocol,
            seed=self.seed * 1_000_003 + window.step,
            noiseless=window.noiseless,
            public_images=self.public_images,
        )

    def _joined(self, window: GradientRecorder) -> GradientRecorder:
        """Bring the images of all processes together; a collective."""
        own = [RecordedMicroBatch(p.truth.to("cpu"), p.rng_state, self.ranks.rank) for p in window.parts]
        given = self.ranks.gather((own, window.fault and str(window.fault)))
        faults = [fault for _, fault in given if fault]
        if faults:
            window.fault = UnsupportedError(f"One of the processes could not keep its batch: {faults[0]}")
        device = next(iter(window.gradients.values())).device if window.gradients else torch.device("cpu")
        window.parts = [
            RecordedMicroBatch(p.truth.to(device), p.rng_state, p.rank) for parts, _ in given for p in parts
        ]
        return window

    def disarm(self) -> None:
        """Remove every hook; safe at any time."""
        if self._window is not None:
            self._close(self._window)
        self._window = None

    def _close(self, window: GradientRecorder) -> None:
        window.close()
        self.seconds += window.seconds

    # Replicas

    def _client_for(
        self, trainer: Trainer, module: LightningModule, layout: BatchLayout, truth: Batch, optimizer: int
    ) -> TrainingStep:
        known = self._client
        if known is None or known.modes != module_modes(module) or known.layout.signature != layout.signature:
            source: nn.Module = module
            if self._skeleton is not None:
                source = copy.deepcopy(self._skeleton)
                for name, submodule in module.named_modules():
                    source.get_submodule(name).training = submodule.training
            self._client = self._new_client(trainer, source, layout, truth, optimizer)
        assert self._client is not None
        return self._client

    def _new_client(
        self, trainer: Trainer, module: nn.Module, layout: BatchLayout, truth: Batch, optimizer: int
    ) -> TrainingStep:
        return TrainingStep(
            module,
            loss=self.loss,
            layout=layout,
            like=truth,
            precision=str(trainer.precision),
            optimizers=len(trainer.optimizers),
            optimizer=optimizer,
        )

    def _first_that_sees_images(self, trainer: Trainer, module: LightningModule, batch: Any) -> int:
        """Find the optimizer to audit, once: a generator's gradient holds no real image."""
        layout = BatchLayout.of(batch, self.sample_id)
        truth = layout.split(batch)
        buffers = {name: b.detach().clone() for name, b in module.named_buffers()}
        found = []
        for index, optimizer in enumerate(trainer.optimizers):
            own = {id(p) for group in optimizer.param_groups for p in group["params"]}
            weights = {n: p.detach().clone().requires_grad_(id(p) in own) for n, p in module.named_parameters()}
            client = self._new_client(trainer, module, layout, truth, index)
            if _depends_on_images(client, weights, {n: b.clone() for n, b in buffers.items()}, truth):
                found.append(index)
        if not found:
            raise UnsupportedError(
                "optimizer: no optimizer's gradient depends on the images; there is nothing to audit."
            )
        if len(found) > 1:
            log.warning(
                "GradAudit: the gradients of optimizers %s depend on the images; auditing %d. Add a "
                "GradAudit(optimizer=...) with a name of its own for each of the others.",
                found,
                found[0],
            )
        return found[0]


def _depends_on_images(
    client: TrainingStep, weights: dict[str, Tensor], buffers: dict[str, Tensor], truth: Batch
) -> bool:
    inputs = truth.inputs.detach().clone().requires_grad_(True)
    generator = torch.Generator(device=inputs.device).manual_seed(0)
    with torch.enable_grad():
        loss = client.forward(weights, buffers, inputs, truth.labels, generator)
        wanted = [w for w in weights.values() if w.requires_grad]
        gradients = torch.autograd.grad(loss, wanted, create_graph=True, allow_unused=True, materialize_grads=True)
        total = torch.stack([(g**2).sum() for g in gradients]).sum()
        if not total.requires_grad:
            return False
        sensitivity = torch.autograd.grad(total, inputs, allow_unused=True)[0]
    return sensitivity is not None and bool(sensitivity.any())

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

from lightning_gradaudit.capture.defended import ActingDefences, DefendedUpdateRecorder, find_acting_defences
from lightning_gradaudit.capture.distributed import ProcessGroup
from lightning_gradaudit.capture.opacus import PrivateUpdateRecorder, private_training_warnings
from lightning_gradaudit.capture.recorder import GradientRecorder
from lightning_gradaudit.capture.recorders import (
    DeltaRecorder,
    LocalRecorder,
    ManualRecorder,
    ManualUpdateRecorder,
    ReducedRecorder,
    StepRecorder,
    UpdateRecorder,
)
from lightning_gradaudit.capture.starting_weights import StartingWeights
from lightning_gradaudit.capture.trainer_state import automatic
from lightning_gradaudit.errors import InvalidInputError, UnsupportedError
from lightning_gradaudit.simulation.batch import Batch, BatchLayout, ImageUse, SampleId
from lightning_gradaudit.simulation.defences import step_seed
from lightning_gradaudit.simulation.local_optimizer import LocalOptimizer
from lightning_gradaudit.simulation.normalization import Normalization
from lightning_gradaudit.simulation.replica import replicate
from lightning_gradaudit.simulation.snapshot import Snapshot
from lightning_gradaudit.simulation.threat_model import ThreatModel, View
from lightning_gradaudit.simulation.training_step import Loss, TrainingStep, module_modes
from lightning_gradaudit.simulation.trials import find_image_use, find_optimizer

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
    """Record the gradients of a run's sampled batches; other batches carry no hook.

    Args:
        loss: See `TrainingStep`.
        threat_model: Who sees what; its precision is set from the Trainer.
        choose_view: Choose the view by the run: "update" under Opacus, else "local".
        seed: Seeds the client's defences, together with the step.
        sample_id: Where batches hold names of their images (see `BatchLayout`).

    Attributes:
        recorder: Of the gradient that is being recorded; None between samples.
        ranks: The processes of the run.
        seconds: Time spent in hooks that torch called, of recorders that are closed.
    """

    def __init__(
        self,
        *,
        loss: Loss | None,
        threat_model: ThreatModel,
        choose_view: bool = False,
        seed: int = 0,
        sample_id: SampleId | None = None,
    ) -> None:
        self.loss, self.threat_model, self.choose_view = loss, threat_model, choose_view
        self.seed, self.sample_id = seed, sample_id
        self._optimizer = threat_model.optimizer
        self._acting: ActingDefences | None = None
        self.ranks = ProcessGroup()
        self._client: TrainingStep | None = None
        self._skeleton: nn.Module | None = None
        self.recorder: GradientRecorder | None = None
        self._uses: dict[Any, ImageUse] = {}
        self._starting_weights = StartingWeights()
        self.seconds = 0.0
        self._due = False

    # Before training

    def check(self, trainer: Trainer, module: LightningModule) -> None:
        """Refuse what cannot be captured, before the module is wrapped.

        Raises:
            UnsupportedError: For strategies whose gradients cannot be seen whole.
            InvalidInputError: When the module has no trainable parameter.
        """
        view = self.threat_model.view
        if _is_sharded(trainer.strategy, view):
            # Sharding changes the module's class in place; what is to be replayed is copied before.
            self._skeleton = replicate(module, None)
        if not any(p.requires_grad for p in module.parameters()):
            hint = "" if self._skeleton is None else " Build layers in __init__, and only shard in configure_model."
            raise InvalidInputError(
                f"module: {type(module).__name__} has no trainable parameter, so there is no gradient to audit.{hint}"
            )
        if trainer.world_size > 1 and view == "delta":
            raise UnsupportedError(
                "view='delta' is what one client shares after training alone; this run has "
                f"{trainer.world_size} processes; use view='reduced' or 'update'."
            )
        self.ranks = ProcessGroup(trainer.world_size, trainer.global_rank)

    def start(self, trainer: Trainer, module: LightningModule) -> list[str]:
        """Choose the view now that the optimizers exist; return warnings about the run.

        Raises:
            UnsupportedError: When the view does not exist in this run.
        """
        self.ranks.open()
        optimizer: Any = trainer.optimizers[self._optimizer or 0] if trainer.optimizers else None
        private = hasattr(optimizer, "original_optimizer")
        self._acting = find_acting_defences(trainer, self.threat_model, choose_view=self.choose_view)
        if self.choose_view:
            view: View = "update" if private or self._acting else "local"
            self.threat_model = replace(self.threat_model, view=view)
            why = "Opacus: what leaves is clipped and noised" if private else "one process, one micro-batch"
            why = "ApplyDefences: what leaves is defended" if self._acting else why
            rank_zero_info(f"GradAudit: view={view!r} ({why}).")
        elif private and self.threat_model.view != "update":
            log.warning("GradAudit: view=%r is not what leaves under Opacus; view='update' is.", self.threat_model.view)
        if self._acting is not None:
            self.threat_model = replace(self.threat_model, defences=self._acting.defences, defences_act=True)
        self.threat_model = replace(self.threat_model, precision=str(trainer.precision))
        self._recorder_class = self._choose_class(module, private=private)
        if self.threat_model.view == "delta":
            LocalOptimizer.check(optimizer)
        return private_training_warnings(trainer, module)

    def _choose_class(self, module: LightningModule, *, private: bool) -> type[GradientRecorder]:
        view = self.threat_model.view
        if not automatic(module):
            if view not in _BY_HAND or (not self.ranks.is_single and view != "local"):
                where = "" if self.ranks.is_single else " in several processes"
                raise UnsupportedError(
                    f"view={view!r} is not defined for manual optimization{where}, where only the training step knows "
                    "what it sums and when; use view='local'."
                )
            return _BY_HAND[view]
        if private and view == "update":
            if not self.ranks.is_single:
                raise UnsupportedError("Opacus in several processes is unsupported; audit a run with devices=1.")
            return PrivateUpdateRecorder
        return _RECORDERS[view] if self._acting is None else DefendedUpdateRecorder

    # During training

    @property
    def waiting(self) -> bool:
        """Whether the next batch matters: a recorder is open, or one is due at the next batch where it can start."""
        return self._due or self.recorder is not None

    @property
    def collective(self) -> bool:
        """Whether all processes complete a recorder together."""
        return not self.ranks.is_single and self.threat_model.view in ("reduced", "update")

    def batch_start(
        self, trainer: Trainer, module: LightningModule, batch: Any, batch_idx: int, *, due: bool, room: bool, step: int
    ) -> bool:
        """Open a recorder where one is due, and hand the batch to the open one; return False when it was dropped.

        Args:
            due: Whether the schedule samples this batch. A view that spans several batches waits for its start.
            room: Whether the queue has room for a snapshot. Collective views do not ask: theirs is dropped when
                complete.
            step: The logger's step.

        Raises:
            InvalidInputError: When the batch holds no images or labels that can be audited.
        """
        self._due |= due and self.recorder is None
        starts = self._due and self.recorder is None and self._recorder_class.starts_at(trainer, module, batch_idx)
        if starts:
            self._due = False
            if not room and not self.collective:
                return False
            self.recorder = self._open(trainer, module, batch, step)
        if self.recorder is not None:
            try:
                self.recorder.add_batch(batch)
            except Exception as error:
                if not self.collective:
                    raise
                self.recorder.fault = error  # the other processes wait for this one
        return True

    def _open(self, trainer: Trainer, module: LightningModule, batch: Any, step: int) -> GradientRecorder:
        index = 0
        if not automatic(module):
            if self._optimizer is None:
                self._optimizer = self._find_optimizer(trainer, module, batch)
            index = self._optimizer
        recorder = self._recorder_class(trainer, module, step=step, optimizer=index)
        recorder.keeps_trained = self._skeleton is None and self._starting_weights.are_kept
        recorder.sample_id, recorder.use = self.sample_id, self._image_use(trainer, module, batch, index)
        recorder.shares_buffers = self.threat_model.shares_buffers
        if isinstance(recorder, DeltaRecorder):
            recorder.local_steps = self.threat_model.local_steps
        return recorder

    def ready(self, *, stepped: bool) -> bool:
        """Whether the open recorder is complete, or can no longer become so.

        Args:
            stepped: Whether a batch that ended with an optimizer step is over. Collective recorders are taken then and
                only then, whatever they hold in this process.
        """
        recorder = self.recorder
        if recorder is None or self.collective:
            return recorder is not None and stepped
        return recorder.complete or recorder.void or recorder.fault is not None

    def take(self, trainer: Trainer, module: LightningModule, normalization: Normalization) -> Snapshot | None:
        """Close the recorder and return its snapshot; None when there is none, or another process has it.

        Raises:
            UnsupportedError: When no gradient passed the hooks, or another process failed.
        """
        recorder, self.recorder = self.recorder, None
        assert recorder is not None
        self._close(recorder)
        if self.collective:
            recorder = self._gather_parts(recorder)
        if recorder.fault is not None:
            raise recorder.fault
        if not recorder.complete or (self.collective and not self.ranks.is_global_zero):
            return None
        if not recorder.gradients:
            raise UnsupportedError(
                "No gradient passed the hooks of this step (the loss reaches no trainable parameter, or the "
                "strategy hides them), so there is nothing to audit."
            )
        truth, protocol = recorder.assemble()
        assert recorder.layout is not None
        client = self._client_for(trainer, module, recorder.layout, truth, recorder.index, normalization.unit)

        acting = self._acting
        seed = step_seed(self.seed, recorder.step) if acting is None else acting.seed_at(recorder.step)

        def make(parameters: dict[str, Tensor]) -> Snapshot:
            return Snapshot.capture(
                step=recorder.step,
                client=client,
                gradients=recorder.gradients,
                parameters=parameters,
                buffers=recorder.buffers,
                buffers_after=recorder.buffers_after,
                truth=truth,
                threat_model=self.threat_model,
                normalization=normalization,
                protocol=protocol,
                seed=seed,
                noiseless=recorder.noiseless,
            )

        return self._starting_weights.snapshot(make, recorder.parameters, recorder.trained, repeats=automatic(module))

    def _gather_parts(self, recorder: GradientRecorder) -> GradientRecorder:
        """Bring the images of all processes together; a collective."""
        own = [replace(p, truth=p.truth.to("cpu"), rank=self.ranks.rank) for p in recorder.kept_parts()]
        given = self.ranks.gather((own, recorder.fault and str(recorder.fault)))
        faults = [fault for _, fault in given if fault]
        if faults:
            recorder.fault = UnsupportedError(f"One of the processes could not keep its batch: {faults[0]}")
        device = next(iter(recorder.gradients.values())).device if recorder.gradients else torch.device("cpu")
        recorder.take_parts([replace(p, truth=p.truth.to(device)) for parts, _ in given for p in parts])
        return recorder

    def disarm(self) -> None:
        """Remove every hook; safe at any time."""
        if self.recorder is not None:
            self._close(self.recorder)
        self.recorder = None

    def _close(self, recorder: GradientRecorder) -> None:
        recorder.close()
        self.seconds += recorder.seconds

    # Replicas

    def _client_for(
        self, trainer: Trainer, module: LightningModule, layout: BatchLayout, truth: Batch, optimizer: int, unit: float
    ) -> TrainingStep:
        wanted = module_modes(module), layout.signature, unit
        known = self._client
        if known is None or (known.modes, known.layout.signature, known.unit) != wanted:
            source: nn.Module = module
            if self._skeleton is not None:
                source = copy.deepcopy(self._skeleton)
                for name, submodule in module.named_modules():
                    source.get_submodule(name).training = submodule.training
            self._client = self._new_client(trainer, source, layout, truth, optimizer, unit)
        assert self._client is not None
        return self._client

    def _new_client(
        self,
        trainer: Trainer,
        module: nn.Module,
        layout: BatchLayout,
        truth: Batch,
        optimizer: int,
        unit: float = 1.0,
    ) -> TrainingStep:
        return TrainingStep(
            module,
            loss=self.loss,
            layout=layout,
            like=truth,
            unit=unit,
            precision=str(trainer.precision),
            optimizers=len(trainer.optimizers),
            optimizer=optimizer,
        )

    def _image_use(self, trainer: Trainer, module: LightningModule, batch: Any, optimizer: int) -> ImageUse:
        """Return what the step does with the images; tried once for each layout where it matters."""
        try:
            layout = BatchLayout.of(batch, self.sample_id)
        except InvalidInputError:  # the recorder refuses the batch, in step with the other processes
            return ImageUse()
        if layout.signature not in self._uses:
            weights, buffers = dict(module.named_parameters()), dict(module.named_buffers())
            self._uses[layout.signature] = find_image_use(
                batch,
                self.sample_id,
                lambda layout, truth: self._new_client(trainer, module, layout, truth, optimizer),
                weights,
                buffers,
            )
        return self._uses[layout.signature]

    def _find_optimizer(self, trainer: Trainer, module: LightningModule, batch: Any) -> int:
        layout = BatchLayout.of(batch, self.sample_id)
        truth = layout.split(batch)
        steps = [self._new_client(trainer, module, layout, truth, at) for at in range(len(trainer.optimizers))]
        return find_optimizer(module, trainer.optimizers, steps, truth)


def _is_sharded(strategy: Any, view: View) -> bool:
    """Whether each process holds shards of the parameters.

    Raises:
        UnsupportedError: For strategies whose gradients cannot be seen whole.
    """
    classes, name = {each.__name__ for each in type(strategy).__mro__}, type(strategy).__name__
    if classes & {"SingleDeviceStrategy", "DDPStrategy"}:
        return False
    if "ModelParallelStrategy" not in classes:
        raise UnsupportedError(
            f"strategy: {name} is unsupported, it keeps gradients in shards or buffers of its own; use "
            f"strategy='ddp', or ModelParallelStrategy with view='reduced', {_OFFLINE}."
        )
    if view != "reduced":
        raise UnsupportedError(
            f"strategy: under {name} each process holds shards, so view={view!r} does not exist as a tensor "
            f"anywhere; use view='reduced', {_OFFLINE}."
        )
    return True

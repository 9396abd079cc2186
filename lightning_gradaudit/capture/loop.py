"""Record a step of any training loop: plain PyTorch, Fabric, or whatever calls `backward`."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lightning_gradaudit.errors import UnsupportedError, described
from lightning_gradaudit.simulation.batch import Batch, BatchLayout, SampleId
from lightning_gradaudit.simulation.batch_entries import copy_batch
from lightning_gradaudit.simulation.defences import step_seed
from lightning_gradaudit.simulation.normalization import Normalization
from lightning_gradaudit.simulation.replay import ProcessRandomness
from lightning_gradaudit.simulation.sharing import SharingProtocol
from lightning_gradaudit.simulation.snapshot import Snapshot, check_range
from lightning_gradaudit.simulation.threat_model import ThreatModel
from lightning_gradaudit.simulation.training_step import Loss, StepFunction, TrainingStep
from lightning_gradaudit.simulation.trials import find_image_use

log = logging.getLogger(__name__)


@dataclass
class RecordedStep:
    """A step of a training loop; filled in when its context ends.

    Attributes:
        snapshot: The step, to be given to `Auditor.submit` or `audit_snapshot`; None where it could not be recorded.
        reason: Why it could not.
    """

    snapshot: Snapshot | None = None
    reason: str = ""


@contextmanager
def record_step(
    module: nn.Module,
    batch: Any,
    *,
    loss: Loss | None = None,
    step_function: StepFunction | None = None,
    step: int = 0,
    threat_model: ThreatModel | None = None,
    mean: Any = None,
    std: Any = None,
    sample_id: SampleId | None = None,
    seed: int = 0,
) -> Iterator[RecordedStep]:
    """Record the gradient that the backward passes inside the context give, and what an adversary holds beside it.

    Neither weights, gradients nor random states are changed. What cannot be recorded is logged and said in `reason`;
    nothing is raised but what the training step itself raises.

    Args:
        module: What is trained; of a module that Fabric has set up, the original is recorded.
        batch: As the training step gets it, on the device of the module.
        loss: `loss(module(images), labels)` is the training loss.
        step_function: `step_function(module, batch)` returns the training loss, for all other steps. Neither: the
            `training_step` of the module.
        step: Number to file the audit under.
        threat_model: Who sees what; view="local" alone. Its precision must be that of the loop ("bf16-mixed").
        mean, std: Normalisation that was applied to pixels in [0, 1]; None: none. Images must lie in [0, 1] without it;
            bytes are known to lie in [0, 255].
        sample_id: Where the batch holds names of its images.
        seed: Of the client's defences, together with the step.

    Yields:
        The recorded step.

    Example:
        >>> net = nn.Sequential(nn.Flatten(), nn.Linear(64, 2))
        >>> images, labels = torch.rand(2, 1, 8, 8), torch.tensor([0, 1])
        >>> with record_step(net, (images, labels), loss=nn.functional.cross_entropy) as recorded:
        ...     nn.functional.cross_entropy(net(images), labels).backward()
        >>> recorded.snapshot.self_test().error < 1e-6
        True
    """
    recorded = RecordedStep()
    recorder = None
    model = ThreatModel() if threat_model is None else threat_model
    with _said_in(recorded):
        recorder = _Recorder(_original(module), batch, sample_id, shares_buffers=model.shares_buffers)
    try:
        yield recorded
    finally:
        if recorder is not None:
            recorder.close()
    if recorder is not None:
        with _said_in(recorded):
            recorded.snapshot = recorder.snapshot(loss, step_function, model, (mean, std), step, step_seed(seed, step))


@contextmanager
def _said_in(recorded: RecordedStep) -> Iterator[None]:
    """Keep an error of the recording from the loop, and note it as the reason."""
    try:
        yield
    except Exception as error:
        recorded.reason = described(error)
        log.warning("GradAudit: a step could not be recorded: %s", recorded.reason)


def _original(module: nn.Module) -> nn.Module:
    """Return the module that Fabric has wrapped; its parameters are the same ones."""
    return getattr(module, "module", module) if type(module).__name__ == "_FabricModule" else module


class _Recorder:
    """What a step starts from, and what its backward passes contribute."""

    def __init__(self, module: nn.Module, batch: Any, sample_id: SampleId | None, *, shares_buffers: bool) -> None:
        self.shares_buffers = shares_buffers
        self.buffers_after: dict[str, Tensor] | None = None
        self.module, self.sample_id = module, sample_id
        BatchLayout.of(batch, sample_id)
        self.batch = copy_batch(batch)  # the step may change it in place
        self.buffers = {name: b.detach().clone() for name, b in module.named_buffers()}
        self.parameters = {name: p.detach().clone() for name, p in module.named_parameters()}
        self.rng_state, self.process_rng = torch.get_rng_state(), ProcessRandomness.now()
        self.gradients: dict[str, Tensor] = {}
        named = [(name, p) for name, p in module.named_parameters() if p.requires_grad]
        self._handles = [p.register_hook(lambda g, n=name: self._add(n, g)) for name, p in named]

    def _add(self, name: str, gradient: Tensor) -> None:
        kept, before = gradient.detach(), self.gradients.get(name)
        self.gradients[name] = kept.clone() if before is None else before + kept

    def close(self) -> None:
        """Remove every hook."""
        for handle in self._handles:
            handle.remove()
        if self.shares_buffers:
            self.buffers_after = {name: b.detach().clone() for name, b in self.module.named_buffers()}

    def snapshot(
        self,
        loss: Loss | None,
        step_function: StepFunction | None,
        threat_model: ThreatModel,
        normalized: tuple[Any, Any],
        step: int,
        seed: int,
    ) -> Snapshot:
        """Return the step as it was recorded."""
        if not self.gradients:
            raise UnsupportedError("no backward pass reached the module inside the context, so there is no gradient.")
        if threat_model.view != "local":
            raise UnsupportedError(f"view={threat_model.view!r} needs a Trainer; a recorded step is view='local'.")

        def make_step(layout: BatchLayout, truth: Batch) -> TrainingStep:
            return TrainingStep(
                self.module,
                loss=loss,
                step_function=step_function,
                layout=layout,
                like=truth,
                precision=threat_model.precision,
            )

        weights = {name: p.clone().requires_grad_(name in self.gradients) for name, p in self.parameters.items()}
        use = find_image_use(self.batch, self.sample_id, make_step, weights, self.buffers)
        layout = BatchLayout.of(self.batch, self.sample_id, use=use)
        truth = layout.split(self.batch)
        normalization = Normalization.of_batch(*normalized, layout.images[0].dtype)
        check_range(normalization, truth.inputs)
        client = make_step(layout, truth)
        client.unit = normalization.unit
        process_rng = None if self.process_rng.is_now() else self.process_rng
        return Snapshot.capture(
            step=step,
            client=client,
            gradients={name: self.gradients[name] for name in self.parameters if name in self.gradients},
            parameters=self.parameters,
            buffers=self.buffers,
            buffers_after=self.buffers_after,
            truth=truth,
            threat_model=threat_model,
            normalization=normalization,
            protocol=SharingProtocol.one_batch(len(truth.inputs), self.rng_state, truth.other, process_rng),
            seed=seed,
        )

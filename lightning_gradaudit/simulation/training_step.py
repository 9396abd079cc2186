"""The training step an adversary can re-run: architecture, mode and loss, without any weight or image.

`Observation.simulate` calls `TrainingStep`. It owns a replica of the user's module whose parameters and buffers are
shapes only (on the meta device); the values are passed to every call. So one replica serves every snapshot of a run,
needs no memory, is cheap to send to another process, and cannot change the user's module.
"""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from lightning_gradaudit.errors import InvalidInputError, ReplayError, UnsupportedError
from lightning_gradaudit.simulation.batch import Batch, BatchLayout
from lightning_gradaudit.simulation.batch_entries import OtherEntries, describe
from lightning_gradaudit.simulation.manual_optimization import ManualOptimization
from lightning_gradaudit.simulation.replay import (
    DifferentiableAttention,
    ProcessRandomness,
    ReplayedRandomness,
    preserve_module_state,
    without_checkpointing,
)
from lightning_gradaudit.simulation.replica import replicate
from lightning_gradaudit.utils.tensors import Tensors

Loss = Callable[[Any, Any], Tensor]
StepFunction = Callable[[Any, Any], Tensor]


class TrainingStep:
    """A replica of the user's training step as a pure function of weights, buffers, images and labels.

    Args:
        module: The user's module; it is copied, never changed.
        loss: `loss(module(inputs), labels)` is the training loss. None: the module's own `training_step` is
            replayed, with `log` and `log_dict` silenced.
        step_function: `step_function(module, batch)` is the training loss; takes the place of both.
        layout: Where images and labels lie in the batch that `training_step` gets.
        like: A batch; tensors of the shape of its images or labels that the module holds are not copied.
        unit: What simulated images are multiplied by; see `Normalization.unit`.
        precision: Lightning's precision name; "-mixed" ones replay under autocast.
        optimizers: Number of optimizers, for modules with manual optimization.
        optimizer: Index of the one whose gradient is simulated.

    Raises:
        InvalidInputError: When the module has no trainable parameter, or no loss is known.
        ReplayError: When the module cannot be copied.
        UnsupportedError: When a part of it is TorchScript.
    """

    def __init__(
        self,
        module: nn.Module,
        *,
        loss: Loss | None,
        step_function: StepFunction | None = None,
        layout: BatchLayout,
        like: Batch | None = None,
        unit: float = 1.0,
        precision: str = "32-true",
        optimizers: int = 0,
        optimizer: int = 0,
    ) -> None:
        if not any(p.requires_grad for p in module.parameters()):
            raise InvalidInputError(
                f"module: {type(module).__name__} has no trainable parameter, so there is no gradient to audit. "
                "Set requires_grad=True on what is trained."
            )
        if loss is not None and step_function is not None:
            raise InvalidInputError("step_function: expected loss= or step_function=, got both.")
        self.replays_training_step = loss is None and step_function is None
        if self.replays_training_step and not callable(getattr(module, "training_step", None)):
            raise InvalidInputError(
                f"loss: {type(module).__name__} has no training_step to replay; "
                "pass loss=, e.g. loss=torch.nn.functional.cross_entropy."
            )
        self.loss, self.step_function = loss, step_function
        self.layout, self.unit = layout, unit
        self.precision = precision
        self.modes = module_modes(module)
        self.module = replicate(module, like)
        self.changes_weights: bool | None = None  # whether the step does so in place; None: not known yet
        self.manual = None
        if self.replays_training_step and optimizers and not getattr(module, "automatic_optimization", True):
            self.manual = ManualOptimization(self.module, optimizers=optimizers, audited=optimizer)
        # One replica runs one forward pass at a time. Reentrant: the thread that records its layers holds it already.
        self.lock = threading.RLock()

    def __getstate__(self) -> dict[str, Any]:
        return {k: v for k, v in self.__dict__.items() if k != "lock"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self.lock = threading.RLock()

    def in_eval_mode(self) -> TrainingStep:
        """Return the same step with every submodule in eval mode."""
        if self.manual is not None:  # it is bound to this replica
            raise UnsupportedError("A step with manual optimization is replayed in its own mode only.")
        other = copy.copy(self)
        other.module = copy.deepcopy(self.module).eval()
        other.modes = module_modes(other.module)
        return other

    def forward(
        self,
        parameters: Tensors,
        buffers: Tensors,
        inputs: Tensor,
        labels: Tensor,
        generator: torch.Generator,
        *,
        other: OtherEntries | None = None,
        process_rng: ProcessRandomness | None = None,
    ) -> Tensor:
        """Return the training loss, a scalar with a graph to whatever requires a gradient.

        `buffers` are updated in place, as train-mode BatchNorm does: pass copies.

        Args:
            parameters, buffers: By name.
            inputs, labels: Images (B, C, H, W), which the step gets times `unit`, and their labels.
            generator: Draws torch's random numbers.
            other: What else the batch holds; None: nothing.
            process_rng: Where Python's and numpy's random numbers start; None: wherever they stand.

        Raises:
            ReplayError: When the training step needs the Trainer, optimises manually or returns no loss.
            InvalidInputError: When the loss is not a scalar or a label exceeds the head.
        """
        if self.unit != 1:
            inputs = inputs * self.unit
        weights = {**parameters, **buffers}
        named = {f"module.{name}": tensor for name, tensor in weights.items()}
        before = self._note_weights(parameters)
        with (
            self.lock,
            preserve_module_state(self.module, process_rng),
            self._precision(inputs.device),
            ReplayedRandomness(generator),
            DifferentiableAttention(),
            without_checkpointing(),
        ):
            try:
                loss = functional_call(_Step(self), named, (inputs, labels, other))
            except Exception as error:
                explained = _explain(error, self, labels)
                if explained is error:
                    raise
                raise explained from error
        if self.changes_weights is None:
            self.changes_weights = weights_differ(before, parameters)
        return _scalar(loss)

    def _note_weights(self, parameters: Tensors) -> dict[str, Tensor]:
        """Return copies of the weights to compare with; none once it is known whether the step changes any."""
        return {} if self.changes_weights is not None else {n: w.detach().clone() for n, w in parameters.items()}

    def _precision(self, device: torch.device) -> Any:
        dtype = {"bf16-mixed": torch.bfloat16, "16-mixed": torch.float16}.get(self.precision)
        return torch.autocast(device.type, dtype=dtype or torch.bfloat16, enabled=dtype is not None)


class _Step(nn.Module):
    """Wrap the training step in a forward pass, for `functional_call`."""

    def __init__(self, client: TrainingStep) -> None:
        super().__init__()
        self.client = client
        self.module = client.module

    def forward(self, inputs: Tensor, labels: Tensor, other: OtherEntries | None) -> Any:
        client = self.client
        if client.loss is not None:
            return client.loss(self.module(client.layout.model_input(inputs)), labels)
        batch = client.layout.join(inputs, labels, other)
        if client.step_function is not None:
            return client.step_function(self.module, batch)
        # Through the class: a copied compiled module keeps `training_step` bound to the original.
        step: Any = type(self.module).training_step  # type: ignore[attr-defined]
        wants_index = step.__code__.co_argcount > 2 if hasattr(step, "__code__") else True
        arguments = (self.module, batch, 0) if wants_index else (self.module, batch)
        if client.manual is None:
            return step(*arguments)
        with client.manual.record_losses():
            step(*arguments)
        return client.manual.loss


def weights_differ(before: Tensors, after: Tensors) -> bool:
    """Tell whether any weight has changed, by whatever means: writing to `.data` leaves no other trace."""
    same = [torch.equal(weight, after[name]) for name, weight in before.items()]
    return not all(same)


def module_modes(module: nn.Module) -> tuple[bool, ...]:
    """Return the train/eval flag of every submodule, in the order of `modules()`."""
    return tuple(submodule.training for submodule in module.modules())


def _scalar(output: Any) -> Tensor:
    loss = output.get("loss") if isinstance(output, Mapping) else output
    if loss is None:
        raise ReplayError(
            "training_step returned no loss (manual optimization does that), so its gradient cannot be simulated. "
            "Pass loss=, a callable of (module(inputs), labels)."
        )
    if not isinstance(loss, Tensor) or loss.numel() != 1:
        raise InvalidInputError(f"loss: expected a scalar tensor, got {describe(loss)}. Reduce it, e.g. with .mean().")
    return loss.reshape(())


def _explain(error: Exception, client: TrainingStep, labels: Tensor) -> Exception:
    text = str(error)
    name = type(client.module).__name__
    if "not attached to a `Trainer`" in text:
        return ReplayError(
            f"{name}.training_step reads self.trainer, which does not exist where an audit replays the step. "
            "Pass loss=, a callable of (module(inputs), labels), or read the value before training."
        )
    if isinstance(error, IndexError) and "out of bounds" in text:
        return InvalidInputError(
            f"labels: got class index {int(labels.min())} to {int(labels.max())}, and the head of {name} has others "
            f"({text}). Check the number of classes. A step that shifts its labels cannot be replayed: recovered ones "
            "are indices of the head. Number the classes from 0 in the data set."
        )
    if client.replays_training_step and not isinstance(error, (InvalidInputError, ReplayError)):
        return ReplayError(
            f"{name}.training_step could not be replayed on a candidate batch: {type(error).__name__}: {text}. "
            "Pass loss=, a callable of (module(inputs), labels)."
        )
    return error

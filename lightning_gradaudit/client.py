"""The training step an adversary can re-run: architecture, mode and loss, without any weight or image.

`Client` is the secret behind `Observation.simulate`. It owns a replica of the user's module whose parameters and
buffers are shapes only (on the meta device); real ones are passed to every call. So one replica serves every
snapshot of a run, costs no memory, travels cheaply to another process, and can never change the user's module.
"""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils._python_dispatch import TorchDispatchMode
from torchmetrics import Metric

from lightning_gradaudit.defences import Tensors
from lightning_gradaudit.errors import InvalidInputError, ReplayError

Loss = Callable[[Any, Any], Tensor]
_LABEL_KEYS = ("label", "labels", "target", "targets", "y", "class")


@dataclass(frozen=True)
class Batch:
    """Images and labels of one step.

    Attributes:
        inputs: (B, C, H, W), floating point, in the model's input space (normalised as the model gets them).
        labels: (B,) class indices, or any tensor whose first dimension is B.
    """

    inputs: Tensor
    labels: Tensor

    def to(self, device: torch.device | str) -> Batch:
        """Return the batch on another device."""
        return Batch(self.inputs.to(device), self.labels.to(device))


@dataclass(frozen=True, eq=False)
class BatchLayout:
    """Where images and labels lie in the user's batch, so that candidates can be put in their place.

    Whatever else the batch holds never reaches the adversary: other tensors are replaced by zeros.

    Attributes:
        kind: "sequence" or "mapping".
        inputs_key: Index or key of the images.
        labels_key: Index or key of the labels.
        rest: The remaining entries, tensors zeroed.
    """

    kind: str
    container: type
    inputs_key: Any
    labels_key: Any
    rest: tuple[tuple[Any, Any], ...] = ()

    @classmethod
    def of(cls, batch: Any) -> BatchLayout:
        """Find images and labels in a batch.

        Raises:
            InvalidInputError: When the batch is no sequence or mapping, or images or labels are not found.
        """
        if isinstance(batch, Mapping):
            items: list[tuple[Any, Any]] = list(batch.items())
            kind: str = "mapping"
        elif isinstance(batch, Sequence) and not isinstance(batch, str):
            items, kind = list(enumerate(batch)), "sequence"
        else:
            raise InvalidInputError(
                f"batch: expected (images, labels) or a mapping that holds both, got {_describe(batch)}. "
                "Let the dataloader yield such a batch."
            )
        inputs_key = _find_inputs(items)
        labels_key = _find_labels(items, inputs_key)
        rest = tuple((k, _without_content(v)) for k, v in items if k not in (inputs_key, labels_key))
        return cls(kind, type(batch), inputs_key, labels_key, rest)

    @property
    def signature(self) -> tuple[Any, ...]:
        """What must be equal for one replica to serve two batches."""
        rest = tuple((k, (v.shape, v.dtype) if isinstance(v, Tensor) else None) for k, v in self.rest)
        return self.kind, self.container, self.inputs_key, self.labels_key, rest

    def split(self, batch: Any) -> Batch:
        """Take images and labels out of a batch of this layout.

        Raises:
            InvalidInputError: When the batch has another layout.
        """
        try:
            return Batch(batch[self.inputs_key], batch[self.labels_key])
        except (KeyError, IndexError, TypeError) as error:
            raise InvalidInputError(
                f"batch: its layout changed during the run: expected entries {self.inputs_key!r} and "
                f"{self.labels_key!r}, got {_describe(batch)}."
            ) from error

    def join(self, inputs: Tensor, labels: Tensor) -> Any:
        """Make a batch of this layout that holds the given images and labels."""
        entries = dict(self.rest) | {self.inputs_key: inputs, self.labels_key: labels}
        if self.kind == "mapping":
            return entries
        values = [entries[k] for k in sorted(entries)]
        return values if self.container is list else tuple(values)


def _describe(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"a tensor of shape {tuple(value.shape)} and {value.dtype}"
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{k!r}: {_describe(v)}" for k, v in value.items()) + "}"
    if isinstance(value, Sequence) and not isinstance(value, str):
        return "[" + ", ".join(_describe(v) for v in value) + "]"
    return type(value).__name__


def _without_content(value: Any) -> Any:
    return torch.zeros_like(value) if isinstance(value, Tensor) else None


def _find_inputs(items: list[tuple[Any, Any]]) -> Any:
    tensors = [(k, v) for k, v in items if isinstance(v, Tensor)]
    images = [k for k, v in tensors if v.ndim == 4 and v.is_floating_point()]
    if len(images) == 1:
        return images[0]
    came = _describe(dict(items))
    if len(images) > 1:
        raise InvalidInputError(
            f"batch: expected one image tensor (B, C, H, W), got {len(images)} (entries {images}) in {came}. "
            "Pass the one to audit alone, with loss= for the rest."
        )
    integers = [k for k, v in tensors if v.ndim == 4]
    if integers:
        raise InvalidInputError(
            f"batch: images must be floating point (a gradient with respect to them is needed), entry "
            f"{integers[0]!r} is {dict(items)[integers[0]].dtype}. Convert them with x.float() / 255."
        )
    raise InvalidInputError(
        f"batch: expected images as a floating-point tensor (B, C, H, W), got {came}. "
        "Grayscale images need their channel dimension: x.unsqueeze(1)."
    )


def _find_labels(items: list[tuple[Any, Any]], inputs_key: Any) -> Any:
    size = dict(items)[inputs_key].shape[0]
    tensors = [(k, v) for k, v in items if k != inputs_key and isinstance(v, Tensor) and v.ndim >= 1]
    fitting = [(k, v) for k, v in tensors if v.shape[0] == size]
    named = [k for k, _ in fitting if isinstance(k, str) and k.lower() in _LABEL_KEYS]
    integer = [k for k, v in fitting if v.ndim == 1 and not v.is_floating_point()]
    for candidates in (named, integer, [k for k, _ in fitting]):
        if len(candidates) == 1:
            return candidates[0]
    raise InvalidInputError(
        f"batch: expected one label tensor whose first dimension is {size}, got {_describe(dict(items))}. "
        "Name it 'label' in a dict batch, or yield (images, labels)."
    )


class ReplayedRandomness(TorchDispatchMode):
    """Draw every random number of a forward pass from one explicit generator.

    Dropout in a worker thread would otherwise consume, and a replay rewind, the random state of training. Given
    the generator state from before the observed forward pass, the CPU kernels draw the same masks again.
    """

    def __init__(self, generator: torch.Generator) -> None:
        super().__init__()
        self.generator = generator
        self.draws = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if torch.Tag.nondeterministic_seeded not in func.tags:
            return func(*args, **kwargs)
        self.draws += 1
        if any(argument.name == "generator" for argument in func._schema.arguments):
            return func(*args, **kwargs | {"generator": self.generator})
        if "generator" in func.overloadpacket.overloads():
            return func.overloadpacket.generator(*args, **kwargs, generator=self.generator)
        return self._emulate(func, args, kwargs)

    def _emulate(self, func: Any, args: Any, kwargs: Any) -> Any:
        aten = torch.ops.aten
        if func.overloadpacket is aten.rand_like:
            return torch.empty_like(args[0], **kwargs).uniform_(generator=self.generator)
        if func.overloadpacket is aten.randn_like:
            return torch.empty_like(args[0], **kwargs).normal_(generator=self.generator)
        if func.overloadpacket is aten.native_dropout:
            x, p, _ = args
            mask = torch.empty_like(x).bernoulli_(1 - p, generator=self.generator)
            return x * mask / (1 - p), mask.bool()
        raise ReplayError(
            f"The model draws random numbers with {func}, which cannot be replayed from a generator. "
            "Audit it in eval mode, or replace the operation by one that takes a generator."
        )


def _ignore(*args: Any, **kwargs: Any) -> None:
    """Stand in for `LightningModule.log` in a replica: nothing of an audit may reach the user's logs."""


def _to_meta(module: nn.Module) -> nn.Module:
    """Replace parameters and buffers by shapes, keeping ties between parameters."""
    replaced: dict[int, nn.Parameter] = {}
    for submodule in module.modules():
        for name, parameter in submodule._parameters.items():
            if parameter is not None:
                shape = replaced.setdefault(
                    id(parameter), nn.Parameter(parameter.detach().to("meta"), parameter.requires_grad)
                )
                submodule._parameters[name] = shape
        for name, buffer in submodule._buffers.items():
            if buffer is not None:
                submodule._buffers[name] = buffer.to("meta")
    return module


class Client:
    """A replica of the user's training step as a pure function of weights, buffers, images and labels.

    Args:
        module: The user's module; it is copied, never changed.
        loss: `loss(module(inputs), labels)` is the training loss. None: the module's own `training_step` is
            replayed, with `log` and `log_dict` silenced.
        layout: Where images and labels lie in the batch that `training_step` gets.
        precision: Lightning's precision name; "-mixed" ones replay under autocast.

    Raises:
        InvalidInputError: When the module has no trainable parameter, or no loss is known.
        ReplayError: When the module cannot be copied.
    """

    def __init__(
        self, module: nn.Module, *, loss: Loss | None, layout: BatchLayout, precision: str = "32-true"
    ) -> None:
        if not any(p.requires_grad for p in module.parameters()):
            raise InvalidInputError(
                f"module: {type(module).__name__} has no trainable parameter, so there is no gradient to audit. "
                "Set requires_grad=True on what is trained."
            )
        self.replays_training_step = loss is None
        if self.replays_training_step and not callable(getattr(module, "training_step", None)):
            raise InvalidInputError(
                f"loss: {type(module).__name__} has no training_step to replay; "
                "pass loss=, e.g. loss=torch.nn.functional.cross_entropy."
            )
        self.loss = loss
        self.layout = layout
        self.precision = precision
        self.modes = module_modes(module)
        self.module = self._replicate(module)
        self.stochastic: bool | None = None  # unknown until the first forward pass
        self._lock = threading.Lock()

    def _replicate(self, module: nn.Module) -> nn.Module:
        try:
            replica = copy.deepcopy(module)
        except Exception as error:  # whatever a user's __deepcopy__ raises
            raise ReplayError(
                f"{type(module).__name__} cannot be copied ({error}), so its gradient cannot be simulated. "
                "Keep open files, locks and other live objects out of the module."
            ) from error
        for name in ("log", "log_dict", "print"):
            if hasattr(replica, name):
                object.__setattr__(replica, name, _ignore)
        return _to_meta(replica)

    def __getstate__(self) -> dict[str, Any]:
        return {k: v for k, v in self.__dict__.items() if k != "_lock"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._lock = threading.Lock()

    def forward(
        self,
        parameters: Tensors,
        buffers: Tensors,
        inputs: Tensor,
        labels: Tensor,
        generator: torch.Generator,
    ) -> Tensor:
        """Return the training loss, a scalar with a graph to whatever requires a gradient.

        Raises:
            ReplayError: When the training step needs the Trainer, optimises manually or returns no loss.
            InvalidInputError: When the loss is not a scalar or a label exceeds the head.
        """
        # Train-mode BatchNorm writes into its buffers: every call gets fresh copies.
        weights = dict(parameters) | {name: buffer.clone() for name, buffer in buffers.items()}
        with self._lock, self._precision(inputs.device), self._randomness(generator):
            try:
                loss = functional_call(_Step(self), {f"module.{k}": v for k, v in weights.items()}, (inputs, labels))
            except Exception as error:
                explained = _explain(error, self, labels)
                if explained is error:
                    raise
                raise explained from error
            finally:
                self._reset_metrics()
        return _scalar(loss)

    def _precision(self, device: torch.device) -> Any:
        dtype = {"bf16-mixed": torch.bfloat16, "16-mixed": torch.float16}.get(self.precision)
        return torch.autocast(device.type, dtype=dtype or torch.bfloat16, enabled=dtype is not None)

    @contextmanager
    def _randomness(self, generator: torch.Generator) -> Iterator[None]:
        # The mode costs a few microseconds an operation: only models that drew something keep it.
        mode = ReplayedRandomness(generator) if self.stochastic is not False else nullcontext()
        with mode:
            yield
        if isinstance(mode, ReplayedRandomness):
            self.stochastic = mode.draws > 0

    def _reset_metrics(self) -> None:
        # Metrics inside the module would pile up every candidate of an attack.
        for submodule in self.module.modules():
            if isinstance(submodule, Metric):
                submodule.reset()


class _Step(nn.Module):
    """Put the training step inside a forward, where `functional_call` can reach it."""

    def __init__(self, client: Client) -> None:
        super().__init__()
        self.client = client
        self.module = client.module

    def forward(self, inputs: Tensor, labels: Tensor) -> Any:
        client = self.client
        if client.loss is not None:
            return client.loss(self.module(inputs), labels)
        batch = client.layout.join(inputs, labels)
        # Through the class: a copied compiled module keeps `training_step` bound to the original.
        step: Any = type(self.module).training_step  # type: ignore[attr-defined]
        wants_index = step.__code__.co_argcount > 2 if hasattr(step, "__code__") else True
        return step(self.module, batch, 0) if wants_index else step(self.module, batch)


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
        raise InvalidInputError(f"loss: expected a scalar tensor, got {_describe(loss)}. Reduce it, e.g. with .mean().")
    return loss.reshape(())


def _explain(error: Exception, client: Client, labels: Tensor) -> Exception:
    text = str(error)
    name = type(client.module).__name__
    if "not attached to a `Trainer`" in text:
        return ReplayError(
            f"{name}.training_step reads self.trainer, which does not exist where an audit replays the step. "
            "Pass loss=, a callable of (module(inputs), labels), or read the value before training."
        )
    if isinstance(error, IndexError) and "out of bounds" in text:
        return InvalidInputError(
            f"labels: got class index {int(labels.max())}, more than the head of {name} has outputs ({text}). "
            "Check the number of classes."
        )
    if client.replays_training_step and not isinstance(error, (InvalidInputError, ReplayError)):
        return ReplayError(
            f"{name}.training_step could not be replayed on a candidate batch: {type(error).__name__}: {text}. "
            "Pass loss=, a callable of (module(inputs), labels)."
        )
    return error

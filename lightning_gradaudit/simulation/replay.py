"""Contexts that keep a replayed training step free of side effects: random state, attributes, metrics, kernels."""

from __future__ import annotations

import math
import random
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812
from torch.overrides import TorchFunctionMode
from torch.utils import checkpoint as torch_checkpoint
from torch.utils._python_dispatch import TorchDispatchMode
from torchmetrics import Metric

from lightning_gradaudit.errors import ReplayError


class ReplayedRandomness(TorchDispatchMode):
    """Draw every random number of a forward pass from one explicit generator.

    Without it, dropout in a worker thread would advance, and a replay would rewind, the random state of training. Given
    the generator state from before the observed forward pass, the CPU kernels draw the same masks again.
    """

    def __init__(self, generator: torch.Generator) -> None:
        super().__init__()
        self.generator = generator

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if torch.Tag.nondeterministic_seeded not in func.tags or _has_no_dropout(func, args, kwargs):
            return func(*args, **kwargs)
        if any(argument.name == "generator" for argument in func._schema.arguments):
            return func(*args, **kwargs | {"generator": self.generator})
        # randint.low takes a generator as randint.low_generator, rand.default as rand.generator.
        overload = func._schema.overload_name
        with_generator = f"{overload}_generator" if overload else "generator"
        if with_generator in func.overloadpacket.overloads():
            return getattr(func.overloadpacket, with_generator)(*args, **kwargs, generator=self.generator)
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


def _has_no_dropout(func: Any, args: Any, kwargs: Any) -> bool:
    """Tell whether a function takes a dropout probability and it is 0: fused attention is tagged random in any case."""
    names = [argument.name for argument in func._schema.arguments]
    if "dropout_p" not in names:
        return False
    position = names.index("dropout_p")
    return not (args[position] if position < len(args) else kwargs.get("dropout_p", 0.0))


class DifferentiableAttention(TorchFunctionMode):
    """Compute attention from its definition: the fused kernels have no second derivative.

    `torch.nn.attention.sdpa_kernel` would do so too, but it acts on the whole process, training included.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func is F.scaled_dot_product_attention:
            return _attention(*args, **kwargs)
        if func is F.multi_head_attention_forward and not kwargs.get("need_weights", True):
            # With its weights wanted, the function computes attention from its definition.
            output, _ = func(*args, **kwargs | {"need_weights": True})
            return output, None
        return func(*args, **kwargs)


def _attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """softmax(Q Kᵀ · scale + mask) V, with the arguments of torch's function."""
    if enable_gqa:
        groups = query.shape[-3] // key.shape[-3]
        key, value = key.repeat_interleave(groups, -3), value.repeat_interleave(groups, -3)
    scores = query @ key.transpose(-2, -1) * (1 / math.sqrt(query.shape[-1]) if scale is None else scale)
    if is_causal:
        attn_mask = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).tril()
    if attn_mask is not None:
        scores = scores.masked_fill(~attn_mask, -math.inf) if attn_mask.dtype == torch.bool else scores + attn_mask
    return F.dropout(scores.softmax(-1), dropout_p) @ value


@dataclass(frozen=True)
class ProcessRandomness:
    """State of the random generators of Python and numpy, which belong to the process."""

    python: Any
    numpy: Any

    @classmethod
    def now(cls) -> ProcessRandomness:
        """Return the present state."""
        return cls(random.getstate(), np.random.get_state())  # noqa: NPY002

    def restore(self) -> None:
        """Set both generators to this state."""
        random.setstate(self.python)
        np.random.set_state(self.numpy)  # noqa: NPY002

    def is_now(self) -> bool:
        """Whether nothing has been drawn since."""
        now = np.random.get_state()  # noqa: NPY002
        same = all(np.array_equal(a, b) for a, b in zip(self.numpy, now, strict=True))
        return same and self.python == random.getstate()


@contextmanager
def preserve_module_state(module: nn.Module, randomness: ProcessRandomness | None = None) -> Iterator[None]:
    """Undo what a training step changes: attributes of the module, metric states, numpy's and Python's random state.

    Steps append outputs, keep the last batch and count calls. An attack would accumulate that, and the auditor's own
    replay of the truth would leave the truth where the next attack can find it.
    """
    kept = [(each, _copy_attributes(each.__dict__)) for each in module.modules() if not _is_stock(each)]
    try:
        with _process_randomness(randomness):
            yield
    finally:
        for each, attributes in kept:
            each.__dict__.clear()
            each.__dict__.update(attributes)
            if isinstance(each, Metric):
                each.reset()


@contextmanager
def _process_randomness(start: ProcessRandomness | None) -> Iterator[None]:
    """Draw Python's and numpy's random numbers from this state, and put the present one back afterwards.

    The generators belong to the process, so that this is done on the main thread alone, where nothing else draws
    meanwhile; in other threads user code draws from the state as it is.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    present = ProcessRandomness.now()
    if start is not None:
        start.restore()
    try:
        yield
    finally:
        present.restore()


def _is_stock(module: nn.Module) -> bool:
    return type(module).__module__.startswith("torch.nn.")


def _copy_attributes(attributes: dict[str, Any]) -> dict[str, Any]:
    """Copy attributes, and one level of the containers among them; nn.Module's own registries stay themselves."""
    own = ("_parameters", "_buffers", "_modules")
    return {
        name: value.copy() if isinstance(value, (list, dict, set)) and name not in own else value
        for name, value in attributes.items()
    }


def unregistered_tensors(module: nn.Module) -> list[Tensor]:
    """Return tensors that a module holds outside its parameters and buffers, in attributes and containers."""
    found: list[Tensor] = []

    def visit(value: Any, depth: int) -> None:
        if isinstance(value, Tensor) and not isinstance(value, nn.Parameter):
            found.append(value)
        elif isinstance(value, dict) and depth:
            for each in list(value.values()):
                visit(each, depth - 1)
        elif isinstance(value, (list, tuple, set)) and depth:
            for each in value:
                visit(each, depth - 1)

    for submodule in module.modules():
        if not _is_stock(submodule):
            for name, value in submodule.__dict__.items():
                if name not in ("_parameters", "_buffers", "_modules"):
                    visit(value, 3)
    return found


_replaying = threading.local()
_checkpointing_lock = threading.RLock()
_checkpointing_users = 0
_checkpointing_originals: dict[str, Any] = {}


@contextmanager
def without_checkpointing() -> Iterator[None]:
    """Run activation checkpointing as plain calls, in this thread alone.

    A checkpointed block is run again in the backward pass, after the observed weights and random numbers have been
    replaced, and it would rewind the random state of the whole process. Torch has no switch for it, so its entry points
    are wrapped while a replay runs; other threads pass through the wrappers.
    """
    global _checkpointing_users  # noqa: PLW0603 - one patch for all concurrent replays
    with _checkpointing_lock:
        if _checkpointing_users == 0:
            _wrap_checkpointing()
        _checkpointing_users += 1
    before, _replaying.active = getattr(_replaying, "active", False), True
    try:
        yield
    finally:
        _replaying.active = before
        with _checkpointing_lock:
            _checkpointing_users -= 1
            if _checkpointing_users == 0:
                for name, original in _checkpointing_originals.items():
                    setattr(torch_checkpoint, name, original)
                _checkpointing_originals.clear()


def _wrap_checkpointing() -> None:
    module = torch_checkpoint

    def wrapped(original: Any) -> Any:
        def generator(*args: Any, **kwargs: Any) -> Iterator[None]:
            if getattr(_replaying, "active", False):
                yield
            else:
                yield from original(*args, **kwargs)

        return generator

    # The second name replaced the first in torch 2.14; in a release with neither the self-test fails.
    for name in ("_checkpoint_without_reentrant_generator", "_checkpoint_without_reentrant_generator_impl"):
        if hasattr(module, name):
            _checkpointing_originals[name] = getattr(module, name)
            setattr(module, name, wrapped(_checkpointing_originals[name]))
    reentrant = module.CheckpointFunction
    _checkpointing_originals["CheckpointFunction"] = reentrant

    class Reentrant:
        @staticmethod
        def apply(function: Any, preserve: bool, *args: Any) -> Any:
            if getattr(_replaying, "active", False):
                return function(*args)
            return reentrant.apply(function, preserve, *args)

    module.CheckpointFunction = Reentrant  # type: ignore[assignment,misc]

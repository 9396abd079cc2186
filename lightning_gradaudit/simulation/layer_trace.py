"""What went into and came out of each layer of a forward pass."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class LayerCall:
    """One call of a layer during a simulated forward pass.

    Attributes:
        name: The module's name; its parameters are `name.weight` and `name.bias`.
        inputs, outputs: What went in and came out, detached.
        outputs_gradient: Gradient of the loss with respect to `outputs`, when asked for.
    """

    name: str
    module: nn.Module
    inputs: Tensor
    outputs: Tensor
    outputs_gradient: Tensor | None = None

    @property
    def weight(self) -> str:
        """Name of the weight parameter."""
        return f"{self.name}.weight" if self.name else "weight"

    @property
    def bias(self) -> str:
        """Name of the bias parameter, whether or not the layer has one."""
        return f"{self.name}.bias" if self.name else "bias"


@contextmanager
def record_calls(
    module: nn.Module, kinds: tuple[type[nn.Module], ...] | None
) -> Iterator[tuple[list[LayerCall], list[Tensor]]]:
    """Record the layers that run inside the context.

    Args:
        module: Its submodules get hooks, which are removed at the end.
        kinds: Classes of the layers; None: every module without children. Calls that do not map one tensor to another
            are left out.

    Yields:
        The calls in the order of execution, and their outputs with the graph; both lists fill up during the context.
    """
    calls: list[LayerCall] = []
    outputs: list[Tensor] = []
    entered: dict[str, Tensor | None] = {}

    # Copies: an activation that works in place overwrites its input, which is the output of the layer before it.
    def enter(name: str, args: tuple[Tensor, ...]) -> None:
        entered[name] = args[0].detach().clone() if args and isinstance(args[0], Tensor) else None

    def leave(name: str, layer: nn.Module, output: Tensor) -> None:
        inputs = entered.pop(name, None)
        if inputs is not None and isinstance(output, Tensor):
            calls.append(LayerCall(name, layer, inputs, output.detach().clone()))
            outputs.append(output)

    named = [(n, m) for n, m in module.named_modules() if (isinstance(m, kinds) if kinds else not any(m.children()))]
    handles = [m.register_forward_pre_hook(lambda _, a, n=n: enter(n, a)) for n, m in named]
    handles += [m.register_forward_hook(lambda m, _, o, n=n: leave(n, m, o)) for n, m in named]
    try:
        yield calls, outputs
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def record_inputs(
    module: nn.Module, names: Iterable[str], *, in_train_mode: bool = False
) -> Iterator[dict[str, list[Tensor]]]:
    """Collect what goes into named submodules during forward passes, one tensor for each call, with its graph.

    Args:
        module: Its submodules get hooks, which are removed at the end.
        names: Of the submodules.
        in_train_mode: Leave out calls of submodules that are then in eval mode.
    """
    seen: dict[str, list[Tensor]] = {}
    wanted = set(names)

    def record(name: str, layer: nn.Module, args: tuple[Tensor, ...]) -> None:
        if layer.training or not in_train_mode:
            seen.setdefault(name, []).append(args[0])

    named = [(n, m) for n, m in module.named_modules() if n in wanted]
    handles = [m.register_forward_pre_hook(lambda m, a, n=n: record(n, m, a)) for n, m in named]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


def join_calls(calls: list[LayerCall], parts: int) -> list[LayerCall]:
    """Concatenate the calls of several micro-batches, so that a layer called once reports the whole batch."""
    if parts == 1 or len(calls) % parts:
        return calls
    each = len(calls) // parts
    joined = []
    for position in range(each):
        same = calls[position::each]
        at_outputs = [call.outputs_gradient for call in same if call.outputs_gradient is not None]
        joined.append(
            replace(
                same[0],
                inputs=torch.cat([call.inputs for call in same]),
                outputs=torch.cat([call.outputs for call in same]),
                outputs_gradient=torch.cat(at_outputs) if at_outputs else None,
            )
        )
    return joined

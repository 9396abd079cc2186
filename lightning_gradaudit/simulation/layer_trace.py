"""What went into and came out of each layer of a forward pass."""

from __future__ import annotations

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


def join_calls(calls: list[LayerCall], parts: int) -> list[LayerCall]:
    """Put the calls of several micro-batches together, so that a layer called once reports the whole batch."""
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

"""Find the classification head: the layer whose outputs the cross-entropy is computed from."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor, nn

from lightning_gradaudit.simulation.layer_trace import LayerCall
from lightning_gradaudit.simulation.observation import Observation

ROW_IMBALANCE = 5e-2
"""Sum of a row of softmax minus target, relative to its absolute sum, up to which it counts as 0 (bf16 rounding)."""
SATURATED = 1e-3
"""Size of a row relative to the largest, up to which the softmax is saturated and rounding decides its entries."""


def placeholder_labels(observation: Observation) -> Tensor:
    """Return labels of the right shape and type for a forward pass whose loss does not matter."""
    shape = (observation.batch_size, *observation.label_shape)
    return torch.zeros(shape, dtype=observation.label_dtype, device=observation.device)


def find_head(observation: Observation, images: Tensor, *, convolutions: bool = False) -> LayerCall | None:
    """Return the call of the classification head on a batch of images, (B, C, H, W); None: no layer is one.

    The gradient of a cross-entropy at its logits is softmax minus target: each row adds up to 0, and its smallest
    entry is that of the label. The last linear layer for which that holds is the head. Where it holds for none, which
    other losses cause, the last linear layer of the network is taken if it maps a batch to several outputs.

    Args:
        observation: Its training step is replayed, with labels chosen here.
        images: In the model's input space.
        convolutions: Whether a 1x1 convolution may be the head; inputs and outputs are then means over positions.
    """
    linear = _candidates(observation, images, nn.Linear)
    if not observation.label_dtype.is_floating_point and not observation.label_shape:
        for kind in (nn.Linear, nn.Conv2d) if convolutions else (nn.Linear,):
            candidates = linear if kind is nn.Linear else _candidates(observation, images, kind)
            for call, _ in reversed(candidates):
                if _is_head(observation, images, call):
                    return call
    return linear[-1][0] if linear and linear[-1][1] else None


def _candidates(observation: Observation, images: Tensor, kind: type[nn.Module]) -> list[tuple[LayerCall, bool]]:
    """Return the layers of a kind that may be the head, and whether each is the last of its kind that ran."""
    with torch.no_grad():
        calls = observation.trace(images, placeholder_labels(observation), kinds=(kind,))
    names = [call.name for call in calls]
    once = [_pooled(call) for call in calls if names.count(call.name) == 1]
    return [(call, call.name == names[-1]) for call in once if _may_be_head(call, len(images))]


def call_of(head: LayerCall, observation: Observation, images: Tensor, labels: Tensor, **options: bool) -> LayerCall:
    """Return the call of a known head on another batch."""
    calls = observation.trace(images, labels, kinds=(type(head.module),), **options)
    return _pooled(next(call for call in calls if call.name == head.name))


def _pooled(call: LayerCall) -> LayerCall:
    """Return means over positions: a 1x1 convolution before global pooling is a linear layer after it."""
    if call.outputs.ndim != 4 or call.inputs.ndim != 4:
        return call
    gradient = call.outputs_gradient
    return replace(
        call,
        inputs=call.inputs.mean((2, 3)),
        outputs=call.outputs.mean((2, 3)),
        outputs_gradient=None if gradient is None else gradient.sum((2, 3)),
    )


def _may_be_head(call: LayerCall, size: int) -> bool:
    pointwise = getattr(call.module, "kernel_size", (1, 1)) == (1, 1)
    return call.outputs.ndim == 2 and len(call.outputs) == size and call.outputs.shape[1] > 1 and pointwise


def _is_head(observation: Observation, images: Tensor, call: LayerCall) -> bool:
    # Two labels, because the gradient must follow the label; the first two, because every classifier has these, and a
    # label beyond the head is an error that a CUDA device does not recover from.
    labels = torch.arange(2, device=images.device).repeat_interleave(len(images))
    gradients = []
    for given in labels.to(observation.label_dtype).split(len(images)):
        gradient = call_of(call, observation, images, given, gradients=True).outputs_gradient
        if gradient is None:
            return False
        gradients.append(gradient)
    rows = torch.cat(gradients).float()
    sizes = rows.abs().sum(1)
    seen = sizes > SATURATED * sizes.max()
    balanced, follows = rows.sum(1).abs() <= ROW_IMBALANCE * sizes, rows.argmin(1) == labels
    return bool(seen.any()) and bool((balanced & follows)[seen].all())

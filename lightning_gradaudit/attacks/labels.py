"""Label recovery from the gradient of a classification head.

For the mean cross-entropy of a linear head with a bias, dL/db[c] = mean_i p_i[c] - n_c / B, hence
n_c = B (p̄_c - dL/db[c]): how often each class occurs follows from the head's gradient and the mean softmax
output, which the attacker estimates by running the network on noise. Without a bias the row sums of the weight
gradient play that part, divided by the mean feature sum. For one sample the sign alone decides (iDLG,
Zhao et al., arXiv:2001.02610).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_gradaudit.defences import ClipNorm
from lightning_gradaudit.observation import LayerCall, Observation

_PROBES = 8
_CROSS_ENTROPY_TOLERANCE = 1e-2  # relative
_ROUNDING = 1e-6  # absolute: what fp32 leaves of a saturated softmax


@dataclass(frozen=True)
class LabelEstimate:
    """Recovered labels.

    Attributes:
        labels: (B,) class indices, sorted; None when recovery does not apply.
        classes: Number of outputs of the head; 0 when no head was found.
        reason: Why recovery does not apply.
    """

    labels: Tensor | None
    classes: int = 0
    reason: str = ""


def noise_images(observation: Observation, generator: torch.Generator) -> Tensor:
    """Return images of uncorrelated noise around mid-grey, (B, C, H, W) in the model's input space."""
    pixels = (0.5 + 0.25 * torch.randn(observation.shape, generator=generator)).clamp(0, 1)
    return observation.normalization.from_pixels(pixels.to(observation.device))


def placeholder_labels(observation: Observation) -> Tensor:
    """Return labels of the right shape and type for a forward pass whose loss does not matter."""
    shape = (observation.batch_size, *observation.label_shape)
    return torch.zeros(shape, dtype=observation.label_dtype, device=observation.device)


def find_head(calls: list[LayerCall]) -> LayerCall | None:
    """Return the last linear layer that ran, when it maps a batch to class scores."""
    heads = [call for call in calls if call.outputs.ndim == 2 and call.outputs.shape[1] > 1]
    if not heads or heads[-1] is not calls[-1]:
        return None
    names = [call.name for call in calls]
    return heads[-1] if names.count(heads[-1].name) == 1 else None


def recover_labels(observation: Observation, *, generator: torch.Generator) -> LabelEstimate:
    """Recover the class counts of the batch from the gradient of the head.

    Args:
        observation: Only its gradient, weights and shapes are used.
        generator: Draws the noise images.
    """
    if observation.label_dtype.is_floating_point or len(observation.label_shape) > 0:
        return LabelEstimate(None, reason="the targets are not class indices")
    with torch.no_grad():
        probes = [
            observation.trace(noise_images(observation, generator), placeholder_labels(observation))
            for _ in range(_PROBES)
        ]
    heads = [find_head(calls) for calls in probes]
    head = heads[0]
    if head is None:
        return LabelEstimate(None, reason="the last linear layer is not a classification head")
    classes = head.outputs.shape[1]
    outputs = torch.cat([h.outputs for h in heads if h is not None]).float()
    local = observation.protocol.optimizer
    if local is not None and local.kind is not torch.optim.SGD:
        return LabelEstimate(None, classes, reason=f"{local.kind.__name__} hides the size of the head's gradient")
    residual = _mean_residual(observation, head, torch.cat([h.inputs for h in heads if h is not None]).float())
    if residual is None:
        return LabelEstimate(None, classes, reason=f"the gradient of the head {head.name!r} was not shared")
    # Softmax and target both add up to 1, so the residual adds up to 0 (noise of a defence would hide that).
    imbalance = residual.sum().abs() > _CROSS_ENTROPY_TOLERANCE * residual.abs().sum() + _ROUNDING
    if imbalance and not observation.threat_model.defences and not observation.noise_std:
        return LabelEstimate(None, classes, reason="the loss is not a mean cross-entropy over a softmax")
    probabilities = outputs.softmax(1).mean(0)
    if observation.protocol.optimizer is not None:
        residual = -residual  # weights move against the gradient
    if not _in_scale(observation):
        residual = residual / _scale(residual, probabilities)
    expected = observation.batch_size * (probabilities - residual)
    counts = largest_remainder(expected, observation.batch_size, certain=residual < 0)
    if observation.batch_size == 1:
        counts = torch.nn.functional.one_hot(residual.argmin(), classes)
    return LabelEstimate(torch.repeat_interleave(torch.arange(classes, device=counts.device), counts), classes)


def _mean_residual(observation: Observation, head: LayerCall, features: Tensor) -> Tensor | None:
    """Return an estimate of mean_i (p_i - onehot_i), (classes,)."""
    if head.bias in observation.gradients:
        return observation.gradients[head.bias].float()
    if head.weight in observation.gradients:
        scale = features.sum(1).mean()
        scale = scale if scale.abs() > 1e-12 else torch.ones_like(scale)
        return observation.gradients[head.weight].float().sum(1) / scale
    return None


def _in_scale(observation: Observation) -> bool:
    protocol = observation.protocol
    clipped = any(isinstance(defence, ClipNorm) for defence in observation.threat_model.defences)
    return protocol.clip is None and protocol.private is None and protocol.optimizer is None and not clipped


def _scale(residual: Tensor, probabilities: Tensor) -> Tensor:
    """Estimate the unknown positive factor of a residual s(p̄ - n/B): it is r/p̄ for a class that does not occur.

    For all others r/p̄ is smaller, so the largest one is it, unless every class occurs.
    """
    return (residual / probabilities.clamp_min(1e-12)).max().clamp_min(1e-30)


def largest_remainder(expected: Tensor, total: int, *, certain: Tensor | None = None) -> Tensor:
    """Round non-negative shares to integers that add up to `total`.

    Args:
        expected: (classes,) expected counts, not necessarily adding up.
        total: What the counts must add up to.
        certain: (classes,) classes that occur at least once (their residual is negative).

    Example:
        >>> largest_remainder(torch.tensor([1.6, 0.1, 2.3]), 4).tolist()
        [2, 0, 2]
    """
    floor = torch.zeros_like(expected) if certain is None else certain.to(expected.dtype)
    if floor.sum() > total:  # noise made more classes negative than there are samples: keep the likeliest
        keep = expected.masked_fill(floor == 0, -torch.inf).topk(total).indices
        floor = torch.zeros_like(expected).index_fill_(0, keep, 1)
    counts = expected.floor().clamp_min(0).maximum(floor)
    while counts.sum() > total:
        surplus = (counts - expected).masked_fill(counts <= floor, -torch.inf)
        counts[surplus.argmax()] -= 1
    while counts.sum() < total:
        counts[(expected - counts).argmax()] += 1
    return counts.long()

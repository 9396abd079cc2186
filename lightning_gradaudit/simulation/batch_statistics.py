"""Batch statistics by algebra, from BatchNorm's running statistics before and after a step.

With momentum m a forward pass updates r₁ = (1 - m) r₀ + m μ, so that μ = (r₁ - (1 - m) r₀) / m; likewise the variance,
whose update uses the unbiased one, n/(n - 1) of the one that normalises, over n = B·H·W values. After K passes only
the weighted mean Σ w_k μ_k is known, w_k ∝ (1 - m)^(K - k). With `momentum=None` all weights are equal. Under
SyncBatchNorm B counts the images of all processes.

Layers in eval mode do not move their buffers, LayerNorm has none, and neither has InstanceNorm as torch sets it up
(with `track_running_stats=True` it has some, which are not used here).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lightning_gradaudit.utils.tensors import Tensors

_ROUNDINGS_PER_PASS = 3  # of an update: two products and a sum
_LEAST_RATIO = 1e-12  # of variances, where the root still has a finite derivative
_ROUNDING_DEVIATIONS = 4.0  # standard deviations within which rounding lies


@dataclass(frozen=True, eq=False)
class LayerStatistics:
    """What the buffers of one layer give away about the forward passes between two looks at them.

    Attributes:
        mean: (C,) weighted mean over the passes of the channels' means.
        variance: (C,) the same of the unbiased variances.
        mean_error, variance_error: (C,) what rounding of the buffers does to them, > 0.
        weights: Of each pass, in order; their sum is 1.
    """

    mean: Tensor
    variance: Tensor
    mean_error: Tensor
    variance_error: Tensor
    weights: tuple[float, ...]

    def of_passes(self, passes: int) -> tuple[float, ...] | None:
        """Return the weights for a step with fewer passes, each of which ran several times; None: it does not fit.

        Activation checkpointing runs a layer twice on the same values, and each time updates its buffers.
        """
        times, rest = divmod(len(self.weights), max(passes, 1))
        if rest or not passes:
            return None
        return tuple(sum(self.weights[at : at + times]) for at in range(0, len(self.weights), times))

    def distance(self, activations: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """Return how far the statistics of a layer's inputs in all passes lie from these, as (C,) each.

        Means in standard deviations, standard deviations relative to the true ones; both shrink where rounding has
        spoilt the buffers. Differentiable.

        Args:
            activations: Inputs (B, C, ...) of the layer, one for each pass.
        """
        weights = self.of_passes(len(activations))
        if weights is None:
            missing = torch.full_like(self.mean, math.inf)
            return missing, missing
        mean, variance = torch.zeros_like(self.mean), torch.zeros_like(self.variance)
        for weight, activation in zip(weights, activations, strict=True):
            values = channels(activation)
            mean = mean + weight * values.mean(1)
            variance = variance + weight * values.var(1)
        known = self._scale
        # What rounding adds to the scale is added to both, so that the distance is 0 where the statistics are equal.
        shifted = (variance + (known - self.variance)).clamp_min(_LEAST_RATIO * known)
        relative = (shifted / known).sqrt() - 1
        return (mean - self.mean) / (known + self.mean_error**2).sqrt(), relative

    def error(self, activations: Sequence[Tensor]) -> float:
        """Return the largest of these distances beyond what rounding of the buffers explains, >= 0; NaN is kept."""
        distances = torch.cat(self.distance(activations))
        known = self._scale
        rounding = torch.cat([self.mean_error / known.sqrt(), self.variance_error / known])
        return float((distances.detach().abs() - _ROUNDING_DEVIATIONS * rounding).clamp_min(0).max())

    @property
    def _scale(self) -> Tensor:
        """The variance in whose units distances count: no smaller than what rounding hides."""
        return self.variance.clamp_min(0) + _ROUNDING_DEVIATIONS * self.variance_error


def keeps_statistics(layer: nn.Module) -> bool:
    """Tell whether a layer moves running statistics whenever it is in train mode."""
    return (
        isinstance(layer, nn.modules.batchnorm._BatchNorm)
        and layer.track_running_stats
        and layer.running_mean is not None
        and layer.momentum != 0
    )


def channels(activation: Tensor) -> Tensor:
    """Return a layer's input (B, C, ...) as (C, n) float values of each channel."""
    values = activation.transpose(0, 1).flatten(1)
    return values if values.dtype == torch.float64 else values.float()


def solve_statistics(module: nn.Module, before: Tensors, after: Tensors, *, passes: int) -> dict[str, LayerStatistics]:
    """Return the batch statistics that buffers give away, by name of the layer.

    Args:
        module: Its BatchNorm layers say by which momentum they average.
        before, after: Buffers by name. Layers whose buffers did not move, or are missing in one, have no entry.
        passes: Forward passes between the two, for layers that do not count them (`num_batches_tracked`).

    Example:
        >>> layer, images = nn.BatchNorm2d(3), torch.rand(4, 3, 8, 8)
        >>> before = {name: b.clone() for name, b in layer.named_buffers()}
        >>> _ = layer(images)
        >>> found = solve_statistics(layer, before, dict(layer.named_buffers()), passes=1)[""]
        >>> torch.allclose(found.mean, images.mean((0, 2, 3)), atol=1e-5)
        True
    """
    found = {}
    for name, layer in module.named_modules():
        if keeps_statistics(layer):
            solved = _solve_layer(layer.momentum, f"{name}." if name else "", before, after, passes)  # type: ignore[arg-type]
            if solved is not None:
                found[name] = solved
    return found


def _solve_layer(
    momentum: float | None, prefix: str, before: Tensors, after: Tensors, passes: int
) -> LayerStatistics | None:
    names = f"{prefix}running_mean", f"{prefix}running_var"
    if any(name not in tensors for name in names for tensors in (before, after)):
        return None
    counter, start = f"{prefix}num_batches_tracked", 0
    if counter in before and counter in after:
        start = int(before[counter])
        passes = int(after[counter]) - start
    elif all(torch.equal(before[name], after[name]) for name in names):
        return None
    if passes < 1 or (momentum is None and counter not in before):
        return None
    kept, weights = _weights(momentum, start, passes)
    moved = 1 - kept
    (mean, mean_error), (variance, variance_error) = (
        _solve(before[name], after[name], kept, moved, passes) for name in names
    )
    return LayerStatistics(mean, variance, mean_error, variance_error, tuple(w / moved for w in weights))


def _weights(momentum: float | None, start: int, passes: int) -> tuple[float, list[float]]:
    """Return what is left of the old value, and the weight of each pass in the new one."""
    kept = 1.0
    weights: list[float] = []
    for number in range(start + 1, start + passes + 1):
        factor = 1 / number if momentum is None else momentum
        kept *= 1 - factor
        weights = [(1 - factor) * weight for weight in weights] + [factor]
    return kept, weights


def _solve(before: Tensor, after: Tensor, kept: float, moved: float, passes: int) -> tuple[Tensor, Tensor]:
    """Return the mean over passes and its rounding, in the precision of the buffers or better than half."""
    old, new = before.double(), after.double()
    precision = torch.finfo(after.dtype).eps if after.is_floating_point() else torch.finfo(torch.float32).eps
    error = precision * torch.maximum(old.abs(), new.abs()) * math.sqrt(_ROUNDINGS_PER_PASS * passes) / moved
    dtype = torch.float64 if after.dtype == torch.float64 else torch.float32
    tiny = torch.finfo(torch.float32).tiny
    return ((new - kept * old) / moved).to(dtype), error.clamp_min(tiny).to(dtype)

"""Penalties: what the adversary knows about images in general, and about their activations."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Union

import torch
from torch import Tensor, nn

from lightning_gradaudit.attacks.labels.head import find_head
from lightning_gradaudit.attacks.labels.recovery import noise_images
from lightning_gradaudit.simulation.layer_trace import LayerCall
from lightning_gradaudit.simulation.observation import Observation


class Regularizer(ABC):
    """A differentiable penalty on candidate images."""

    @abstractmethod
    def __call__(self, inputs: Tensor) -> Tensor:
        """Return a scalar >= 0 for candidates (B, C, H, W) in the model's input space."""


class ActivationRegularizer(ABC):
    """A differentiable penalty on the inputs of modules inside the network: `weight` times a sum of distances."""

    weight: float

    @abstractmethod
    def targets(self, observation: Observation) -> dict[str, tuple[Tensor, ...]]:
        """Return, by module name, what `distance` compares the module's input with; empty where nothing is known."""

    @abstractmethod
    def distance(self, activation: Tensor, *target: Tensor) -> Tensor:
        """Return a scalar >= 0 for the input of one module."""

    def __call__(self, activations: Mapping[str, Sequence[Tensor]], targets: Mapping[str, tuple[Any, ...]]) -> Tensor:
        """Return a scalar >= 0 for the inputs of modules, call by call; those without a target do not count."""
        found = [self.of_calls(activations[name], *known) for name, known in targets.items() if name in activations]
        return self.weight * torch.stack(found).sum() if found else torch.zeros(())

    def of_calls(self, activations: Sequence[Tensor], *target: Any) -> Tensor:
        """Return a scalar >= 0 for the inputs of all calls of one module; by default the last one counts."""
        return self.distance(activations[-1], *target)


Penalty = Union[Regularizer, ActivationRegularizer]  # noqa: UP007 - evaluated at run time by jsonargparse on 3.10


@dataclass(frozen=True, kw_only=True)
class TotalVariation(Regularizer):
    """Mean absolute difference of neighbouring pixels, for any number of channels (anisotropic TV).

    Args:
        weight: Published settings range from 1e-6 to 1e-1 with the cosine objective.
        colours: Also penalise the variation of the differences between channels, so that their edges coincide.
        rounding: r in √(d² + r²) - r, which replaces |d| for methods that need a second derivative. In input units.
    """

    weight: float = 1e-2
    colours: bool = False
    rounding: float = 0.0

    def __call__(self, inputs: Tensor) -> Tensor:
        variation = self._of(inputs)
        if self.colours and inputs.shape[1] > 1:
            variation = variation + self._of(inputs - inputs.roll(1, dims=1))
        return self.weight * variation

    def _of(self, images: Tensor) -> Tensor:
        return self._size(images.diff(dim=-2)).mean() + self._size(images.diff(dim=-1)).mean()

    def _size(self, differences: Tensor) -> Tensor:
        if not self.rounding:
            return differences.abs()
        return (differences.square() + self.rounding**2).sqrt() - self.rounding


@dataclass(frozen=True, kw_only=True)
class SquaredNorm(Regularizer):
    """Half the squared norm of the images, per image (GradInversion, arXiv:2104.07586: weight 1e-6)."""

    weight: float = 1e-6

    def __call__(self, inputs: Tensor) -> Tensor:
        return self.weight * 0.5 * (inputs * inputs).sum() / len(inputs)


@dataclass(frozen=True, kw_only=True)
class BatchNormStatistics(ActivationRegularizer):
    """Distance of the candidates' channel statistics to the running ones of every BatchNorm layer.

    Σ_l ‖μ_l(x) - running mean‖ + ‖σ²_l(x) - running variance‖ (Yin et al., arXiv:2104.07586). The variance
    is the biased one over N·H·W values, so that a single image has one too.

    Args:
        weight: 0.1 as published.
        first: Factor on the first layer, which is closest to the image; 10 as published.
    """

    weight: float = 0.1
    first: float = 10.0

    def targets(self, observation: Observation) -> dict[str, tuple[Tensor, ...]]:
        buffers = observation.buffers
        found: dict[str, tuple[Tensor, ...]] = {}
        for name, module in observation.client.module.named_modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm) and f"{name}.running_mean" in buffers:
                mean, variance = buffers[f"{name}.running_mean"], buffers[f"{name}.running_var"]
                found[name] = mean, variance, mean.new_tensor(1.0 if found else self.first)
        return found

    def distance(self, activation: Tensor, *target: Tensor) -> Tensor:
        mean, variance, factor = target
        values = activation.transpose(0, 1).flatten(1).float()
        return ((values.mean(1) - mean).norm() + (values.var(1, correction=0) - variance).norm()) * factor


@dataclass(frozen=True, kw_only=True, eq=False)
class KnownFeatures(ActivationRegularizer):
    """Mean squared distance of modules' inputs to known values, relative to the variance of these values.

    Args:
        features: (B, ...) by module name.
        weight: Factor on the sum over modules; with 1 a constant input costs about 1 for each.
    """

    features: Mapping[str, Tensor] = field(repr=False)
    weight: float = 1.0

    def targets(self, observation: Observation) -> dict[str, tuple[Tensor, ...]]:
        varying = {name: f - f.mean(tuple(range(2, f.ndim)) or 1, keepdim=True) for name, f in self.features.items()}
        return {name: (f, (varying[name] ** 2).mean().clamp_min(1e-30)) for name, f in self.features.items()}

    def distance(self, activation: Tensor, *target: Tensor) -> Tensor:
        known, scale = target
        return ((activation.reshape(known.shape) - known) ** 2).mean() / scale


def _head_of(observation: Observation) -> LayerCall | None:
    """Return the classification head in a simulated forward pass.

    None without one, without class labels, or where the images do not pass it together (accumulated batches, a
    gradient for each image).
    """
    labels, protocol = observation.labels, observation.protocol
    together = len(protocol.micro_batches) == 1 and protocol.private is None
    if labels is None or labels.ndim != 1 or labels.is_floating_point() or not together:
        return None
    images = noise_images(observation, torch.Generator().manual_seed(0))
    return find_head(observation, images)


@dataclass(frozen=True, kw_only=True)
class HeadFeatures(ActivationRegularizer):
    """Mean squared distance of the head's input to the features that the head's gradient reveals.

    For a linear head with a bias, row c of the weight's gradient over that of the bias is a mean of the features
    in which the images of class c dominate: exact for one image, an approximation in a batch.

    Args:
        weight: 0.1 in the "modern" preset.
    """

    weight: float = 0.1

    def targets(self, observation: Observation) -> dict[str, tuple[Tensor, ...]]:
        labels, head = observation.labels, _head_of(observation)
        if (
            labels is None
            or head is None
            or head.weight not in observation.gradients
            or head.bias not in observation.gradients
        ):
            return {}
        weight, bias = observation.gradients[head.weight][labels], observation.gradients[head.bias][labels]
        usable = bias.abs() > 1e-6 * observation.gradients[head.bias].abs().max().clamp_min(1e-30)
        features = weight / torch.where(usable, bias, torch.ones_like(bias))[:, None]
        return {head.name: (features.detach(), usable)}

    def distance(self, activation: Tensor, *target: Tensor) -> Tensor:
        features, usable = target
        return (usable * ((activation - features) ** 2).mean(1)).mean()


@dataclass(frozen=True, kw_only=True)
class LabelAgreement(ActivationRegularizer):
    """Mean squared distance of the candidates' softmax outputs to their labels (Wei et al., arXiv:2004.10397).

    It keeps a candidate in the class of its label. The true images have a penalty too where the network is not certain,
    so a large weight leads away from the truth.

    Args:
        weight: In units of the objective.
    """

    weight: float = 1e-4

    def targets(self, observation: Observation) -> dict[str, tuple[Tensor, ...]]:
        labels, head = observation.labels, _head_of(observation)
        if labels is None or head is None:
            return {}
        weight = observation.parameters[head.weight]
        bias = observation.parameters.get(head.bias, weight.new_zeros(len(weight)))
        return {head.name: (weight, bias, nn.functional.one_hot(labels, len(weight)).to(weight))}

    def distance(self, activation: Tensor, *target: Tensor) -> Tensor:
        weight, bias, labels = target
        return ((nn.functional.linear(activation, weight, bias).softmax(1) - labels) ** 2).sum(1).mean()


@dataclass(frozen=True, kw_only=True)
class GroupConsistency:
    """Half the squared distance to the mean of all starts (GradInversion, arXiv:2104.07586), per image.

    The published method registers the images by keypoints (RANSAC-flow) before it averages them. Here each image is
    shifted by the whole number of pixels that fits the first start's image best, found by phase correlation: matching
    objectives determine an image up to little more than a shift.

    Args:
        weight: 0.01 as published.
        rounds: How often the mean is computed; each round is a cycle of the schedule.
        register: Whether images are shifted before they are averaged.
    """

    weight: float = 0.01
    rounds: int = 4
    register: bool = True

    def mean(self, starts: Sequence[Tensor]) -> Tensor:
        """Return the mean (B, C, H, W) of all starts' candidates, registered to the first's."""
        first, *others = starts
        moved = [registered(each, first) for each in others] if self.register else others
        return torch.stack([first, *moved]).mean(0)

    def __call__(self, inputs: Tensor, mean: Tensor) -> Tensor:
        """Return a scalar >= 0 for candidates (B, C, H, W) and the mean of all starts."""
        return self.weight * 0.5 * ((inputs - mean) ** 2).sum() / len(inputs)


def registered(images: Tensor, reference: Tensor) -> Tensor:
    """Shift each image (B, C, H, W) cyclically by the whole pixels that fit its reference best (phase correlation)."""
    height, width = images.shape[-2:]
    spectrum = torch.fft.fft2(reference - reference.mean((-2, -1), keepdim=True))
    cross = (spectrum * torch.fft.fft2(images - images.mean((-2, -1), keepdim=True)).conj()).sum(1)
    best = torch.fft.ifft2(cross / cross.abs().clamp_min(1e-12)).real.flatten(1).argmax(1)
    rows, columns = best // width, best % width
    y = (torch.arange(height, device=images.device) - rows[:, None]) % height
    x = (torch.arange(width, device=images.device) - columns[:, None]) % width
    at = torch.arange(len(images), device=images.device)[:, None, None]
    return images.transpose(0, 1)[:, at, y[:, :, None], x[:, None, :]].transpose(0, 1)

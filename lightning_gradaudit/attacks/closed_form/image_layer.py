"""Layers whose inputs are single pixels of the image, found by probing."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lightning_gradaudit.attacks.budget import Meter
from lightning_gradaudit.attacks.labels.head import placeholder_labels
from lightning_gradaudit.simulation.layer_trace import LayerCall
from lightning_gradaudit.simulation.observation import Observation

PROBE_IMAGES = 8
_PIXELS_PER_CHUNK = 1024  # compared with all other pixels at once


@dataclass(frozen=True)
class ImageLayer:
    """A linear layer whose inputs are the pixels themselves, in any order and up to an affine map of each.

    Attributes:
        name: The module's name.
        weight: Name of its weight.
        bias: Name of its bias; None when there is none, or its gradient was not shared.
        pixel: (d,) which element of the flattened image feeds each input of the layer; a permutation.
        scale, shift: (d,) input j of the layer is scale[j] * image.flatten()[pixel[j]] + shift[j].
    """

    name: str
    weight: str
    bias: str | None
    pixel: Tensor
    scale: Tensor
    shift: Tensor

    def inputs(self, image: Tensor) -> Tensor:
        """Return the layer's inputs (d,) for an image of the model's input space."""
        return self.scale * image.flatten()[self.pixel] + self.shift

    def image(self, layer_input: Tensor, observation: Observation) -> Tensor:
        """Map layer inputs (N, d) back to images (N, C, H, W) in the model's input space."""
        flat = torch.empty_like(layer_input)
        flat[:, self.pixel] = (layer_input - self.shift) / self.scale
        return flat.reshape(-1, *observation.input_shape)


def image_layers(observation: Observation, generator: torch.Generator) -> list[ImageLayer]:
    """Find the linear layers that see every pixel unmixed, those with a bias first.

    A layer counts when each of its inputs is an affine function of one pixel (a flattening in any order, a
    normalisation, a BatchNorm in eval mode), it ran once, and the gradient of its weight was shared.
    """
    pixels = observation.input_shape.numel()
    found = fit_pixel_maps(observation, generator, lambda call: call.inputs.shape[1:] == (pixels,))
    return sorted(found, key=lambda layer: layer.bias is None)


def fit_pixel_maps(
    observation: Observation,
    generator: torch.Generator,
    wanted: Callable[[LayerCall], bool],
    kinds: tuple[type[nn.Module], ...] = (nn.Linear,),
) -> list[ImageLayer]:
    """Probe with random images, and fit the inputs of layers as affine functions of one pixel each.

    Args:
        wanted: Which calls of the forward pass are tried; where there is none, one forward pass is made.
        kinds: Classes of the layers.

    Returns:
        The layers for which the fit holds, which ran once and share the gradient of their weight.
    """
    labels = placeholder_labels(observation)
    images: list[Tensor] = []
    probes = []
    with torch.no_grad():
        for _ in range(PROBE_IMAGES):
            images.append(random_images(observation, generator))
            probes.append(observation.trace(images[-1], labels, kinds=kinds))
            if not any(map(wanted, probes[0])):
                return []
    names = [call.name for call in probes[0]]
    xs = torch.stack([each[0].flatten() for each in images]).double()
    found = []
    for calls in zip(*probes, strict=True):
        call = calls[0]
        if wanted(call) and names.count(call.name) == 1 and call.weight in observation.gradients:
            zs = torch.stack([each.inputs.flatten()[: xs.shape[1]] for each in calls]).double()
            if (fit := affine_of_pixels(xs, zs)) is not None:
                bias = call.bias if call.bias in observation.gradients else None
                found.append(ImageLayer(call.name, call.weight, bias, *fit))
    return found


def random_images(observation: Observation, generator: torch.Generator) -> Tensor:
    """Return images of uniform noise, (B, C, H, W) in the model's input space."""
    pixels = torch.rand(observation.shape, generator=generator)  # never clipped, so no two probes share a pixel
    return observation.normalization.from_pixels(pixels.to(observation.device))


def affine_of_pixels(xs: Tensor, zs: Tensor) -> tuple[Tensor, Tensor, Tensor] | None:
    """Fit z[:, j] = scale[j] * x[:, pixel[j]] + shift[j] over probes (P, d); None unless it holds everywhere.

    Differences between probes, scaled to unit length, do not change under an affine map of a pixel but for their sign,
    so they identify the pixel, whatever order the layer reads the pixels in.
    """
    dx, dz = xs[1:] - xs[0], zs[1:] - zs[0]
    lengths = dz.norm(dim=0)
    if not bool((lengths > 1e-9).all()):
        return None
    units_x, units_z = dx / dx.norm(dim=0), dz / lengths
    pixel = torch.arange(xs.shape[1], device=xs.device)
    if not bool(((units_x * units_z).sum(0).abs() > 1 - 1e-6).all()):
        chunks = [(chunk.T @ units_x).abs().argmax(1) for chunk in units_z.split(_PIXELS_PER_CHUNK, dim=1)]
        pixel = torch.cat(chunks)
    if not bool((pixel.bincount(minlength=xs.shape[1]) == 1).all()):
        return None
    scale = (dx[:, pixel] * dz).sum(0) / (dx[:, pixel] ** 2).sum(0)
    shift = (zs - scale * xs[:, pixel]).mean(0)
    misfit = (scale * xs[:, pixel] + shift - zs).abs().max()
    if not bool(misfit < 1e-3 * zs.abs().max()) or not bool((scale.abs() > 1e-6).all()):
        return None
    return pixel, scale.float(), shift.float()


def output_gradients(
    observation: Observation, layer: ImageLayer, images: Tensor, label: Tensor, meter: Meter
) -> Tensor:
    """Simulate dL/dz at a layer's output (N, units) for images (N, C, H, W) that all have one label (...).

    Costs an evaluation for each batch of them.
    """
    size = observation.batch_size
    predicted = []
    for chunk in images.split(size):  # padded: a step may expect as many images as the batch had
        meter.spend()
        padded = torch.cat([chunk, chunk[-1:].expand(size - len(chunk), *chunk.shape[1:])])
        calls = observation.trace(padded, label.expand(size, *label.shape), gradients=True)
        call = next(call for call in calls if call.name == layer.name)
        assert call.outputs_gradient is not None
        predicted.append(call.outputs_gradient.float()[: len(chunk)])
    return torch.cat(predicted)

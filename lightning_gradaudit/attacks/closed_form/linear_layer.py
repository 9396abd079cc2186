"""Exact inversion of a linear layer that is fed by the image.

For z = W x + b the gradients of one sample are dL/dW = δ xᵀ and dL/db = δ, so any row gives x = dL/dW[i] / dL/db[i]
(Phong et al., 2018; Geiping et al., arXiv:2003.14053, Prop. 3.1). In a batch the rows add up over samples, and a
row that only one sample activates still gives that sample exactly.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_gradaudit.attacks.base import Attack
from lightning_gradaudit.attacks.budget import Budget, Meter
from lightning_gradaudit.attacks.labels.recovery import placeholder_labels, recover_labels
from lightning_gradaudit.attacks.reconstruction import Outcome, Reconstruction
from lightning_gradaudit.metrics.functional.gradients import relative_squared_error
from lightning_gradaudit.simulation.observation import Observation

PROBES = 8
_POWER_STEPS = 10
_GRID, _GOLDEN = 32, 0.618034
_GROUPS_PER_IMAGE = 4  # candidates examined for every image of the batch
_PIXELS_AT_ONCE = 1024
_ROWS = 2048  # rows compared pairwise, those with the largest bias gradient
_SAME = 1e-3  # two rows give the same image when their pixels differ by less than this on average
EXACT = 1e-6  # relative squared error of the gradient below which a solution is verified
_RANK_ONE = 1e-3  # relative misfit of dL/dW = dL/db xᵀ up to which one image is proven
_CONSISTENT = 1e-2  # relative error of a row's predicted bias gradient below which its image is verified


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
    """Find the linear layers that see every pixel unmixed, by probing with random images.

    A layer counts when each of its inputs is an affine function of one pixel (a flattening in any order, a
    normalisation, a BatchNorm in eval mode), it ran once, and the gradient of its weight was shared.
    """
    labels = placeholder_labels(observation)
    pixels = observation.input_shape.numel()
    images: list[Tensor] = []
    probes = []
    with torch.no_grad():
        for _ in range(PROBES):
            images.append(random_image(observation, generator))
            probes.append(observation.trace(images[-1], labels))
            if not any(call.inputs.shape[1:] == (pixels,) for call in probes[0]):
                return []  # the first look settles it for most networks
    names = [call.name for call in probes[0]]
    xs = torch.stack([image[0].flatten() for image in images]).double()
    found = []
    for calls in zip(*probes, strict=True):
        shared = calls[0].weight in observation.gradients
        bias = calls[0].bias if calls[0].bias in observation.gradients else None
        alike = calls[0].inputs.ndim == 2 and calls[0].inputs.shape[1] == xs.shape[1]
        if shared and alike and names.count(calls[0].name) == 1:
            zs = torch.stack([call.inputs[0] for call in calls]).double()
            if (fit := affine_of_pixels(xs, zs)) is not None:
                found.append(ImageLayer(calls[0].name, calls[0].weight, bias, *fit))
    return found


def random_image(observation: Observation, generator: torch.Generator) -> Tensor:
    """Return images of uniform noise, (B, C, H, W) in the model's input space."""
    pixels = torch.rand(observation.shape, generator=generator)  # never clipped, so no two probes share a pixel
    return observation.normalization.from_pixels(pixels.to(observation.device))


def affine_of_pixels(xs: Tensor, zs: Tensor) -> tuple[Tensor, Tensor, Tensor] | None:
    """Fit z[:, j] = scale[j] * x[:, pixel[j]] + shift[j] over probes (P, d); None unless it holds everywhere.

    Differences between probes, scaled to unit length, do not change under an affine map of a pixel but for their
    sign: they are its fingerprint, whatever order the layer reads the pixels in.
    """
    dx, dz = xs[1:] - xs[0], zs[1:] - zs[0]
    lengths = dz.norm(dim=0)
    if not bool((lengths > 1e-9).all()):
        return None
    prints_x, prints_z = dx / dx.norm(dim=0), dz / lengths
    pixel = torch.arange(xs.shape[1], device=xs.device)
    if not bool(((prints_x * prints_z).sum(0).abs() > 1 - 1e-6).all()):
        chunks = [(chunk.T @ prints_x).abs().argmax(1) for chunk in prints_z.split(_PIXELS_AT_ONCE, dim=1)]
        pixel = torch.cat(chunks)
    if not bool((pixel.bincount(minlength=xs.shape[1]) == 1).all()):
        return None
    scale = (dx[:, pixel] * dz).sum(0) / (dx[:, pixel] ** 2).sum(0)
    shift = (zs - scale * xs[:, pixel]).mean(0)
    misfit = (scale * xs[:, pixel] + shift - zs).abs().max()
    if not bool(misfit < 1e-3 * zs.abs().max()) or not bool((scale.abs() > 1e-6).all()):
        return None
    return pixel, scale.float(), shift.float()


@dataclass(frozen=True, kw_only=True)
class LinearLayerInversion(Attack):
    """Divide the gradient of a linear layer's weight by that of its bias.

    Exact for one image at any stage of training; without a bias up to a factor, which a search over the gradient
    settles. In a batch, images that are the only ones to activate some rows
    come back exactly and are marked `certified`; the others stay grey. Needs no simulated gradient but those that
    verify the result.
    """

    def run(self, observation: Observation, *, budget: Budget, generator: torch.Generator) -> Reconstruction:
        layers = image_layers(observation, generator)
        if not layers:
            return Reconstruction.not_applicable(
                observation, "no linear layer that shares its gradient is fed by the image"
            )
        layer = next((layer for layer in layers if layer.bias is not None), layers[0])
        labels, reason = observation.labels, ""
        if labels is None:
            estimate = recover_labels(observation, generator=generator)
            labels, reason = estimate.labels, estimate.reason
        meter = Meter(budget)
        if observation.batch_size == 1:
            solved = _single(observation, layer, labels, meter)
            if solved is None:
                return Reconstruction.not_applicable(
                    observation,
                    "without a bias, the image is known only up to a factor",
                    evaluations=meter.evaluations,
                )
            images, certified = solved, _is_rank_one(observation, layer, solved)[None]
        elif layer.bias is None:
            return Reconstruction.not_applicable(observation, "a batch needs the gradient of the layer's bias")
        elif labels is None or labels.ndim > 1 or labels.is_floating_point():
            return Reconstruction.not_applicable(observation, f"a batch needs class labels: {reason}")
        elif meter.remaining < _GROUPS_PER_IMAGE * len(labels.unique()) + 1:
            return Reconstruction.not_applicable(observation, "the budget is too small to verify a batch")
        else:
            images, labels, certified = _sole_rows(observation, layer, labels, meter)
            if not bool(certified.any()):
                return Reconstruction.not_applicable(
                    observation, "no row of the layer belongs to one image alone", evaluations=meter.evaluations
                )
        return _verified(observation, images, labels, certified, meter)


def _verified(
    observation: Observation, images: Tensor, labels: Tensor | None, certified: Tensor, meter: Meter
) -> Reconstruction:
    """Simulate the gradient of the solution: when it is the observed one, the solution is exact."""
    loss = torch.inf
    if labels is not None:
        meter.spend()
        loss = float(relative_squared_error(observation.simulate(images, labels), observation.gradients))
    exact = loss < EXACT or bool(certified.all())
    return Reconstruction(
        inputs=images,
        labels=labels,
        matching_loss=loss,
        evaluations=meter.evaluations,
        outcome=Outcome.EXACT if exact else Outcome.CONVERGED,
        certified=torch.ones_like(certified) if exact else certified,
        reason="verified" if exact else f"{int(certified.sum())} image(s) certified",
    )


def _single(observation: Observation, layer: ImageLayer, labels: Tensor | None, meter: Meter) -> Tensor | None:
    """Solve for one image, by least squares over all rows: exact without noise, best linear estimate under noise."""
    weight = observation.gradients[layer.weight].float()
    low, high = observation.box
    if layer.bias is not None:
        bias = observation.gradients[layer.bias].float()
        return layer.image((bias @ weight / (bias @ bias).clamp_min(1e-30))[None], observation).clamp(low, high)
    if labels is None:
        return None
    # Without a bias dL/dW = δ xᵀ gives x up to a factor; the pixel range bounds it and the gradient tells it.
    direction = weight[weight.norm(dim=1).argmax()]
    for _ in range(_POWER_STEPS):
        direction = weight.T @ (weight @ direction)
        direction = direction / direction.norm().clamp_min(1e-30)

    def image(factor: float) -> Tensor:
        return layer.image(factor * direction[None], observation)

    pixels = [observation.normalization.to_pixels(image(factor)).flatten().double() for factor in (0.0, 1.0)]
    interval = _feasible(pixels[1] - pixels[0], pixels[0])
    if interval is None:
        return None

    def loss(factor: float) -> float:
        meter.spend()
        simulated = observation.simulate(image(factor).clamp(low, high), labels)
        return float(relative_squared_error(simulated, observation.gradients))

    return image(_search(loss, *interval, meter)).clamp(low, high)


def _is_rank_one(observation: Observation, layer: ImageLayer, image: Tensor) -> Tensor:
    """Tell whether dL/dW = dL/db xᵀ holds to rounding, which proves the image of a batch of one.

    Simulating the gradient could not: late in training the softmax saturates, and rounding rules what is left.
    """
    if layer.bias is None:
        return torch.tensor(False, device=image.device)
    weight, bias = observation.gradients[layer.weight].float(), observation.gradients[layer.bias].float()
    misfit = (weight - torch.outer(bias, layer.inputs(image))).norm()
    return (bias.norm() > 0) & (misfit < _RANK_ONE * weight.norm())


def _feasible(slope: Tensor, start: Tensor) -> tuple[float, float] | None:
    """Return the factors f for which every pixel start + f * slope lies in [0, 1], with a little room."""
    moving = slope.abs() > 1e-9
    if not bool(moving.any()):
        return None
    ends = torch.stack([(-0.02 - start[moving]) / slope[moving], (1.02 - start[moving]) / slope[moving]])
    low, high = float(ends.min(0).values.max()), float(ends.max(0).values.min())
    return (low, high) if low < high else None


def _search(loss: Callable[[float], float], low: float, high: float, meter: Meter) -> float:
    """Minimise over an interval: a grid, then golden sections around its best point."""
    points = [low + (high - low) * i / _GRID for i in range(_GRID + 1)]
    tried = []
    for point in points:
        if meter.remaining < 2:  # one evaluation is kept to verify the solution
            break
        tried.append((loss(point), point))
    best = min(tried, default=(0.0, (low + high) / 2))[1]
    width = (high - low) / _GRID
    left, right = best - width, best + width
    while right - left > 1e-7 * (high - low) and meter.remaining > 2:
        a, b = right - _GOLDEN * (right - left), left + _GOLDEN * (right - left)
        if loss(a) < loss(b):
            right = b
        else:
            left = a
    return (left + right) / 2


def _sole_rows(
    observation: Observation, layer: ImageLayer, labels: Tensor, meter: Meter
) -> tuple[Tensor, Tensor, Tensor]:
    """Find rows that agree on one image, and keep the images that explain their rows' gradients alone."""
    candidates, members = _agreeing_rows(observation, layer)
    images = observation.normalization.from_pixels(torch.full(observation.shape, 0.5, device=labels.device))
    certified = torch.zeros(observation.batch_size, dtype=torch.bool, device=labels.device)
    if not len(candidates):
        return images, labels, certified
    error, label = _row_consistency(observation, layer, candidates, members, labels, meter)
    ordered, left = labels.clone(), labels.tolist()
    slot = 0
    for index in error.argsort().tolist():
        if error[index] < _CONSISTENT and int(label[index]) in left:
            images[slot], ordered[slot], certified[slot] = candidates[index], label[index], True
            left.remove(int(label[index]))
            slot += 1
    ordered[slot:] = torch.tensor(left, dtype=labels.dtype, device=labels.device)
    return images, ordered, certified


def _agreeing_rows(observation: Observation, layer: ImageLayer) -> tuple[Tensor, list[Tensor]]:
    """Group rows whose ratio dL/dW[i] / dL/db[i] is the same plausible image; return images and rows per group."""
    assert layer.bias is not None
    weight = observation.gradients[layer.weight].float()
    bias = observation.gradients[layer.bias].float()
    rows = bias.abs().topk(min(_ROWS, len(bias))).indices
    rows = rows[bias[rows].abs() > 1e-6 * bias.abs().max()]
    images = layer.image(weight[rows] / bias[rows, None], observation)
    pixels = observation.normalization.to_pixels(images).flatten(1)
    plausible = ((pixels > -0.05) & (pixels < 1.05)).all(1)
    rows, images, pixels = rows[plausible], images[plausible], pixels[plausible]
    groups: list[Tensor] = []
    found = []
    if len(pixels):
        same = torch.cdist(pixels, pixels, p=1) / pixels.shape[1] < _SAME
        left = torch.ones(len(pixels), dtype=torch.bool, device=pixels.device)
        while len(groups) < _GROUPS_PER_IMAGE * observation.batch_size:
            sizes = (same & left).sum(1) * left
            leader = int(sizes.argmax())
            if int(sizes[leader]) < 2:  # a lone row has nothing to agree with
                break
            group = same[leader] & left
            weights = bias[rows].abs() * group
            found.append((weights[:, None] * images.flatten(1)).sum(0) / weights.sum())
            groups.append(rows[group])
            left &= ~group
    stacked = torch.stack(found) if found else images.flatten(1)[:0]
    return stacked.reshape(-1, *observation.input_shape), groups


def _row_consistency(
    observation: Observation,
    layer: ImageLayer,
    candidates: Tensor,
    members: list[Tensor],
    labels: Tensor,
    meter: Meter,
) -> tuple[Tensor, Tensor]:
    """Predict dL/db on each group's rows from its image alone, for every label in question.

    Agreement of rows is not enough: with two classes all rows that share the same *set* of active images agree on
    their mixture. A mixture does not predict its rows' gradients; the true image with its true label does. Mean
    reduction over independent samples is assumed; where it fails, nothing is certified.
    """
    assert layer.bias is not None
    bias = observation.gradients[layer.bias].float()
    errors = []
    distinct = labels.unique()
    for label in distinct:
        predicted = output_gradients(observation, layer, candidates, label, meter)
        rows = zip(predicted, members, strict=True)
        errors.append(torch.stack([(p[m] - bias[m]).norm() / bias[m].norm() for p, m in rows]))
    error, index = torch.stack(errors).min(0)
    return error, distinct[index]


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

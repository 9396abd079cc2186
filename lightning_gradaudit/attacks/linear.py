"""Exact inversion of a linear layer that is fed by the image.

For z = W x + b the gradients of one sample are dL/dW = δ xᵀ and dL/db = δ, so any row gives x = dL/dW[i] / dL/db[i]
(Phong et al., 2018; Geiping et al., arXiv:2003.14053, Prop. 3.1). In a batch the rows add up over samples, and a
row that only one sample activates still gives that sample exactly.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_gradaudit.attacks.base import Attack
from lightning_gradaudit.attacks.labels import placeholder_labels, recover_labels
from lightning_gradaudit.attacks.objectives import relative_squared_error
from lightning_gradaudit.budget import Budget, Meter
from lightning_gradaudit.observation import LayerCall, Observation
from lightning_gradaudit.reconstruction import Outcome, Reconstruction

_ROWS = 2048  # rows compared pairwise, those with the largest bias gradient
_SAME = 1e-3  # two rows give the same image when their pixels differ by less than this on average
_EXACT = 1e-6  # relative squared error of the gradient below which a solution is verified
_CONSISTENT = 1e-2  # relative error of a row's predicted bias gradient below which its image is verified


@dataclass(frozen=True)
class ImageLayer:
    """A linear layer whose input is the image itself, up to an elementwise affine map.

    Attributes:
        weight, bias: Parameter names.
        scale, shift: (d,) the layer's input is scale * image.flatten() + shift.
    """

    weight: str
    bias: str
    scale: Tensor
    shift: Tensor

    def image(self, layer_input: Tensor, observation: Observation) -> Tensor:
        """Map layer inputs (N, d) back to images (N, C, H, W) in the model's input space."""
        return ((layer_input - self.shift) / self.scale).reshape(-1, *observation.input_shape)


def image_layers(observation: Observation, generator: torch.Generator) -> list[ImageLayer]:
    """Find the linear layers that see the image unmixed, by probing with random images.

    A layer counts when its input is an elementwise affine function of the flattened image (a flattening, a
    normalisation, a BatchNorm in eval mode), it ran once, and the gradients of its weight and bias were shared.
    """
    labels = placeholder_labels(observation)
    images = [_probe(observation, generator) for _ in range(3)]
    with torch.no_grad():
        probes = [observation.trace(image, labels) for image in images]
    names = [call.name for call in probes[0]]
    found = []
    for calls in zip(*probes, strict=True):
        shared = calls[0].weight in observation.gradients and calls[0].bias in observation.gradients
        if shared and names.count(calls[0].name) == 1 and (layer := _affine(calls, images)) is not None:
            found.append(layer)
    return found


def _probe(observation: Observation, generator: torch.Generator) -> Tensor:
    pixels = torch.rand(observation.shape, generator=generator)  # never clipped, so no two probes share a pixel
    return observation.normalization.from_pixels(pixels.to(observation.device))


def _affine(calls: tuple[LayerCall, ...], images: list[Tensor]) -> ImageLayer | None:
    xs = [image.flatten(1).double() for image in images]
    zs = [call.inputs.double() for call in calls]
    if any(z.shape != x.shape for z, x in zip(zs, xs, strict=True)):
        return None
    # The widest of three differences per pixel: two probes may come close to each other there.
    pairs = [(xs[j] - xs[i], zs[j] - zs[i]) for i, j in ((0, 1), (0, 2), (1, 2))]
    dx, dz = (torch.stack(part) for part in zip(*pairs, strict=True))
    widest = dx.abs().argmax(0, keepdim=True)
    scale = (dz.gather(0, widest) / dx.gather(0, widest))[0].median(0).values
    shift = (zs[0] - scale * xs[0]).median(0).values
    misfit = max(float((scale * x + shift - z).abs().max()) for x, z in zip(xs, zs, strict=True))
    holds = misfit < 1e-3 * float(zs[2].abs().max())
    if not holds or not bool((scale.abs() > 1e-6).all()):
        return None
    return ImageLayer(calls[0].weight, calls[0].bias, scale.float(), shift.float())


@dataclass(frozen=True, kw_only=True)
class LinearLayerInversion(Attack):
    """Divide the gradient of a linear layer's weight by that of its bias.

    Exact for one image at any stage of training. In a batch, images that are the only ones to activate some rows
    come back exactly and are marked `certified`; the others stay grey. Needs no simulated gradient but those that
    verify the result.
    """

    def run(self, observation: Observation, *, budget: Budget, generator: torch.Generator) -> Reconstruction:
        layers = image_layers(observation, generator)
        if not layers:
            return Reconstruction.not_applicable(
                observation, "no linear layer with a bias is fed by the image and shares both gradients"
            )
        labels, reason = observation.labels, ""
        if labels is None:
            estimate = recover_labels(observation, generator=generator)
            labels, reason = estimate.labels, estimate.reason
        meter = Meter(budget)
        if observation.batch_size == 1:
            images, certified = _single(observation, layers[0])
        elif labels is None or labels.ndim > 1 or labels.is_floating_point():
            return Reconstruction.not_applicable(observation, f"a batch needs class labels: {reason}")
        elif meter.remaining < len(labels.unique()) + 1:
            return Reconstruction.not_applicable(observation, "the budget is too small to verify a batch")
        else:
            images, labels, certified = _sole_rows(observation, layers[0], labels, meter)
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
    exact = loss < _EXACT
    return Reconstruction(
        inputs=images,
        labels=labels,
        matching_loss=loss,
        evaluations=meter.evaluations,
        outcome=Outcome.EXACT if exact else Outcome.CONVERGED,
        certified=torch.ones_like(certified) if exact else certified,
        reason="verified by simulation" if exact else f"{int(certified.sum())} image(s) certified",
    )


def _single(observation: Observation, layer: ImageLayer) -> tuple[Tensor, Tensor]:
    """Least squares over all rows: exact without noise, and the best linear estimate under independent noise."""
    weight = observation.gradients[layer.weight].float()
    bias = observation.gradients[layer.bias].float()
    images = layer.image((bias @ weight / (bias @ bias).clamp_min(1e-30))[None], observation)
    low, high = observation.box
    return images.clamp(low, high), torch.zeros(1, dtype=torch.bool, device=images.device)


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
        while len(groups) < 4 * observation.batch_size:
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
    bias = observation.gradients[layer.bias].float()
    name = layer.bias.removesuffix("bias").removesuffix(".")
    errors = []
    distinct = labels.unique()
    for label in distinct:
        meter.spend()
        calls = observation.trace(candidates, label.expand(len(candidates)), gradients=True)
        call = next(call for call in calls if call.name == name)
        assert call.outputs_gradient is not None
        predicted = call.outputs_gradient.float() * len(candidates) / observation.batch_size
        errors.append(
            torch.stack([(p[m] - bias[m]).norm() / bias[m].norm() for p, m in zip(predicted, members, strict=True)])
        )
    error, index = torch.stack(errors).min(0)
    return error, distinct[index]

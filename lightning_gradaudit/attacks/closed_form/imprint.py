"""Exact inversion of an imprint: a linear layer whose rows measure the image alike, with thresholds in between.

Rows that differ by their thresholds alone are activated by nested sets of images. Where the loss has the same gradient
at all units that an image activates, the gradients of neighbouring rows differ by the images between their thresholds:
x = (G_W[i] - G_W[i+1]) / (G_b[i] - G_b[i+1]) where there is one such image (Fowl et al., arXiv:2110.13057).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_gradaudit.attacks.base import Attack
from lightning_gradaudit.attacks.budget import Budget, Meter
from lightning_gradaudit.attacks.closed_form.image_layer import ImageLayer, image_layers, output_gradients
from lightning_gradaudit.attacks.closed_form.verification import VERIFIED_SQUARED_ERROR, simulated_error, solution
from lightning_gradaudit.attacks.labels.recovery import known_labels
from lightning_gradaudit.attacks.reconstruction import Reconstruction
from lightning_gradaudit.simulation.observation import Observation


@dataclass(frozen=True)
class ImprintSettings:
    """Settings of `ImprintInversion`."""

    least_cosine: float = 0.999  # between rows that measure alike
    fewest_rows: int = 4  # that make an imprint
    tried_rows: int = 256  # that others are compared with
    least_relative_bias: float = 1e-5  # of a bin's bias gradient, relative to the largest
    pixel_tolerance: float = 0.02  # by which pixels of a bin's image may lie outside [0, 1]
    most_bin_error: float = 1e-2  # relative error of the predicted bias gradient that verifies an image


SETTINGS = ImprintSettings()


@dataclass(frozen=True, kw_only=True)
class ImprintInversion(Attack):
    """Divide the differences of neighbouring rows of an imprint (`RobbingTheFed`), as the server that made it does.

    Images that are alone in their bin are recovered exactly and marked `certified`; the others stay grey.
    """

    def run(self, observation: Observation, *, budget: Budget, generator: torch.Generator) -> Reconstruction:
        meter = Meter(budget)

        def refuse(reason: str) -> Reconstruction:
            return Reconstruction.not_applicable(observation, reason, evaluations=meter.evaluations)

        layers = [layer for layer in image_layers(observation, generator) if layer.bias is not None]
        found = [(layer, rows) for layer in layers if len(rows := _imprint_rows(observation, layer))]
        if not found:
            return refuse("no linear layer at the image has parallel rows with thresholds")
        labels = known_labels(observation, generator=generator).labels
        if labels is None or labels.ndim > 1 or labels.is_floating_point():
            return refuse("needs class labels")
        if meter.remaining < 4 * len(labels.unique()) + 1:
            return refuse("the budget is too small to verify a batch")
        layer, rows = found[0]
        candidates, rows, shares = _bin_images(observation, layer, rows)
        images = observation.normalization.from_pixels(torch.full(observation.shape, 0.5, device=labels.device))
        certified = torch.zeros(observation.batch_size, dtype=torch.bool, device=labels.device)
        if len(candidates):
            best = shares.abs().argsort(descending=True)[: 4 * observation.batch_size]
            chosen = candidates[best], rows[best], shares[best]
            images, labels, certified = _verified(observation, layer, chosen, images, labels, certified, meter)
        error = simulated_error(observation, images, labels, meter)
        if error < VERIFIED_SQUARED_ERROR:
            certified = torch.ones_like(certified)
        return solution(images, labels, error, certified, meter, f"{int(certified.sum())} image(s) certified")


def _imprint_rows(observation: Observation, layer: ImageLayer) -> Tensor:
    """Return the rows that measure the image alike, by rising thresholds; none where there are too few."""
    weight = observation.parameters[layer.weight].float()
    assert layer.bias is not None
    bias = observation.parameters[layer.bias].float()
    units = torch.nn.functional.normalize(weight, dim=1)
    rows = torch.arange(0)
    for start in range(0, len(units), max(1, len(units) // SETTINGS.tried_rows)):
        members = (units @ units[start] > SETTINGS.least_cosine).nonzero().flatten()
        if len(members) > len(rows):
            rows = members
    thresholds = -bias[rows.to(bias.device)] / weight[rows.to(bias.device)].norm(dim=1).clamp_min(1e-30)
    rows = rows.to(bias.device)[thresholds.argsort()]
    return rows if len(rows) >= SETTINGS.fewest_rows and float(thresholds.max() - thresholds.min()) > 0 else rows[:0]


def _bin_images(observation: Observation, layer: ImageLayer, rows: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return the plausible images of the bins (N, C, H, W), the lower row of each (N,) and its bias gradient (N,)."""
    assert layer.bias is not None
    weight = observation.gradients[layer.weight][rows].double()
    bias = observation.gradients[layer.bias][rows].double()
    weight = weight - torch.cat([weight[1:], torch.zeros_like(weight[:1])])
    share = bias - torch.cat([bias[1:], torch.zeros_like(bias[:1])])
    filled = share.abs() > SETTINGS.least_relative_bias * bias.abs().max()
    inputs = (weight[filled] / share[filled, None]).float()
    images = layer.image(inputs, observation)
    pixels = observation.normalization.to_pixels(images).flatten(1)
    room = SETTINGS.pixel_tolerance
    plausible = ((pixels > -room) & (pixels < 1 + room)).all(1)
    return images[plausible], rows[filled][plausible], share[filled][plausible].float()


def _verified(
    observation: Observation,
    layer: ImageLayer,
    candidates: tuple[Tensor, Tensor, Tensor],
    images: Tensor,
    labels: Tensor,
    certified: Tensor,
    meter: Meter,
) -> tuple[Tensor, Tensor, Tensor]:
    """Fill in the images that predict the gradient of their bin alone: a mixture of two images does not.

    Mean reduction over independent samples is assumed. Where it fails, as with BatchNorm in train mode, nothing is
    certified, and the bins' images are given as they are.
    """
    found, rows, shares = candidates
    ordered, left = labels.clone(), labels.tolist()
    errors, distinct = [], labels.unique()
    at = torch.arange(len(found), device=rows.device)
    for label in distinct:
        predicted = output_gradients(observation, layer, found, label, meter)[at, rows]
        errors.append((predicted - shares).abs() / shares.abs())
    error, index = torch.stack(errors).min(0)
    slot = 0
    for candidate in error.argsort().tolist():
        label = int(distinct[index[candidate]])
        if slot == len(images):
            break
        images[slot] = found[candidate].clamp(*observation.box)
        if error[candidate] < SETTINGS.most_bin_error and label in left:
            ordered[slot], certified[slot] = label, True
            left.remove(label)
        else:
            ordered[slot] = left.pop(0)
        slot += 1
    ordered[slot:] = torch.tensor(left, dtype=labels.dtype, device=labels.device)
    return images, ordered, certified

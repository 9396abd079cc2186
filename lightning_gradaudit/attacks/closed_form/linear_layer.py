"""Exact inversion of a linear layer that is fed by the image.

For z = W x + b the gradients of one sample are dL/dW = δ xᵀ and dL/db = δ, so any row gives x = dL/dW[i] / dL/db[i]
(Phong et al., 2018; Geiping et al., arXiv:2003.14053, Prop. 3.1). In a batch the rows add up over samples, and a
row that only one sample activates still gives that sample exactly.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from scipy.optimize import minimize_scalar
from torch import Tensor

from lightning_gradaudit.attacks.base import Attack
from lightning_gradaudit.attacks.budget import Budget, Meter
from lightning_gradaudit.attacks.closed_form.image_layer import ImageLayer, image_layers, output_gradients
from lightning_gradaudit.attacks.closed_form.row_space import RANK_ONE_MISFIT, divide_by_bias
from lightning_gradaudit.attacks.closed_form.verification import VERIFIED_SQUARED_ERROR, simulated_error, solution
from lightning_gradaudit.attacks.grouping import agreeing_groups
from lightning_gradaudit.attacks.labels.recovery import known_labels
from lightning_gradaudit.attacks.reconstruction import Reconstruction
from lightning_gradaudit.metrics.functional.gradients import relative_squared_error
from lightning_gradaudit.simulation.observation import Observation


@dataclass(frozen=True)
class LinearLayerSettings:
    """Settings of `LinearLayerInversion`."""

    power_iterations: int = 10  # for the direction of one image without a bias
    factor_grid_points: int = 32  # for its length, before the search is refined
    factor_tolerance: float = 1e-7  # of the refined search, relative to the interval of possible factors
    candidates_per_image: int = 4  # examined for every image of the batch
    compared_rows: int = 2048  # those with the largest bias gradient
    least_relative_bias: float = 1e-6  # of a row's bias gradient, relative to the largest
    same_image_difference: float = 1e-3  # mean difference of pixels below which two rows give the same image
    pixel_tolerance: float = 0.05  # by which pixels of a row's image may lie outside [0, 1]
    consistent_row_error: float = 1e-2  # relative error of the predicted bias gradients that verifies an image


SETTINGS = LinearLayerSettings()


@dataclass(frozen=True, kw_only=True)
class LinearLayerInversion(Attack):
    """Divide the gradient of a linear layer's weight by that of its bias.

    Exact for one image at any stage of training; without a bias up to a factor, which a search over the gradient
    finds. In a batch, images that are the only ones to activate some rows are recovered exactly and marked `certified`;
    the others stay grey. Simulates gradients only to verify the result.
    """

    def run(self, observation: Observation, *, budget: Budget, generator: torch.Generator) -> Reconstruction:
        meter = Meter(budget)

        def refuse(reason: str) -> Reconstruction:
            return Reconstruction.not_applicable(observation, reason, evaluations=meter.evaluations)

        layers = image_layers(observation, generator)
        if not layers:
            return refuse("no linear layer that shares its gradient is fed by the image")
        layer, estimate = layers[0], known_labels(observation, generator=generator)
        labels = estimate.labels
        if observation.batch_size == 1:
            solved = _solve_one_image(observation, layer, labels, meter)
            if solved is None:
                return refuse("without a bias, the image is known only up to a factor")
            images, certified = solved, _is_rank_one(observation, layer, solved)[None]
        elif layer.bias is None:
            return refuse("a batch needs the gradient of the layer's bias")
        elif labels is None or labels.ndim > 1 or labels.is_floating_point():
            return refuse(f"a batch needs class labels: {estimate.reason}")
        elif meter.remaining < SETTINGS.candidates_per_image * len(labels.unique()) + 1:
            return refuse("the budget is too small to verify a batch")
        else:
            images, labels, certified = _solve_sole_rows(observation, layer, labels, meter)
            if not bool(certified.any()):
                return refuse("no row of the layer belongs to one image alone")
        error = simulated_error(observation, images, labels, meter)
        reason = f"{int(certified.sum())} image(s) certified"
        if error < VERIFIED_SQUARED_ERROR or bool(certified.all()):
            certified, reason = torch.ones_like(certified), "verified"
        return solution(images, labels, error, certified, meter, reason)


def _solve_one_image(observation: Observation, layer: ImageLayer, labels: Tensor | None, meter: Meter) -> Tensor | None:
    """Solve for one image, by least squares over all rows: exact without noise, best linear estimate under noise."""
    weight = observation.gradients[layer.weight].float()
    low, high = observation.box
    if layer.bias is not None:
        inputs = divide_by_bias(weight, observation.gradients[layer.bias].float())
        return layer.image(inputs[None], observation).clamp(low, high)
    if labels is None:
        return None
    # Without a bias dL/dW = δ xᵀ gives x up to a factor; the pixel range bounds it and the gradient determines it.
    direction = weight[weight.norm(dim=1).argmax()]
    for _ in range(SETTINGS.power_iterations):
        direction = weight.T @ (weight @ direction)
        direction = direction / direction.norm().clamp_min(1e-30)

    def image(factor: float) -> Tensor:
        return layer.image(factor * direction[None], observation)

    pixels = [observation.normalization.to_pixels(image(factor)).flatten().double() for factor in (0.0, 1.0)]
    interval = _possible_factors(pixels[1] - pixels[0], pixels[0])
    if interval is None:
        return None

    def loss(factor: float) -> float:
        meter.spend()
        simulated = observation.simulate(image(factor).clamp(low, high), labels)
        return float(relative_squared_error(simulated, observation.gradients))

    return image(_minimise(loss, *interval, meter)).clamp(low, high)


def _is_rank_one(observation: Observation, layer: ImageLayer, image: Tensor) -> Tensor:
    """Tell whether dL/dW = dL/db xᵀ holds to rounding, which proves the image of a batch of one.

    A simulated gradient could not prove it: late in training the softmax saturates, and rounding dominates what is
    left.
    """
    if layer.bias is None:
        return torch.tensor(False, device=image.device)
    weight, bias = observation.gradients[layer.weight].float(), observation.gradients[layer.bias].float()
    misfit = (weight - torch.outer(bias, layer.inputs(image))).norm()
    return (bias.norm() > 0) & (misfit < RANK_ONE_MISFIT * weight.norm())


def _possible_factors(slope: Tensor, start: Tensor) -> tuple[float, float] | None:
    """Return the factors f for which every pixel start + f * slope lies in [0, 1], with a little room."""
    moving = slope.abs() > 1e-9
    if not bool(moving.any()):
        return None
    ends = torch.stack([(-0.02 - start[moving]) / slope[moving], (1.02 - start[moving]) / slope[moving]])
    low, high = float(ends.min(0).values.max()), float(ends.max(0).values.min())
    return (low, high) if low < high else None


def _minimise(loss: Callable[[float], float], low: float, high: float, meter: Meter) -> float:
    """Minimise over an interval by a grid, then around its best point; one evaluation is kept to verify the result."""
    width = (high - low) / SETTINGS.factor_grid_points
    tried = []
    for number in range(SETTINGS.factor_grid_points + 1):
        if meter.remaining < 2:
            break
        point = low + number * width
        tried.append((loss(point), point))
    best = min(tried, default=(0.0, (low + high) / 2))[1]
    if meter.remaining < 2:
        return best
    options = {
        "xatol": SETTINGS.factor_tolerance * (high - low),
        "maxiter": int(min(meter.remaining - 1, 10 * SETTINGS.factor_grid_points)),
    }
    bounds = best - width, best + width
    return float(minimize_scalar(loss, bounds=bounds, method="bounded", options=options).x)


def _solve_sole_rows(
    observation: Observation, layer: ImageLayer, labels: Tensor, meter: Meter
) -> tuple[Tensor, Tensor, Tensor]:
    """Find rows that agree on one image, and keep the images that explain their rows' gradients alone.

    Returns:
        Images (B, C, H, W), grey where nothing was found; labels (B,) in their order; which are certified, (B,).
    """
    candidates, rows = _agreeing_rows(observation, layer)
    images = observation.normalization.from_pixels(torch.full(observation.shape, 0.5, device=labels.device))
    certified = torch.zeros(observation.batch_size, dtype=torch.bool, device=labels.device)
    if not len(candidates):
        return images, labels, certified
    error, label = _row_consistency(observation, layer, candidates, rows, labels, meter)
    ordered, left = labels.clone(), labels.tolist()
    slot = 0
    for index in error.argsort().tolist():
        if error[index] < SETTINGS.consistent_row_error and int(label[index]) in left:
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
    rows = bias.abs().topk(min(SETTINGS.compared_rows, len(bias))).indices
    rows = rows[bias[rows].abs() > SETTINGS.least_relative_bias * bias.abs().max()]
    images = layer.image(weight[rows] / bias[rows, None], observation)
    pixels = observation.normalization.to_pixels(images).flatten(1)
    room = SETTINGS.pixel_tolerance
    plausible = ((pixels > -room) & (pixels < 1 + room)).all(1)
    rows, images, pixels = rows[plausible], images[plausible].flatten(1), pixels[plausible]
    agree = torch.cdist(pixels, pixels, p=1) / pixels.shape[1] < SETTINGS.same_image_difference
    found, groups = [], []
    most = SETTINGS.candidates_per_image * observation.batch_size
    for _, (_, members) in zip(range(most), agreeing_groups(agree), strict=False):
        weights = bias[rows].abs() * members
        found.append((weights[:, None] * images).sum(0) / weights.sum())
        groups.append(rows[members])
    stacked = torch.stack(found) if found else images[:0]
    return stacked.reshape(-1, *observation.input_shape), groups


def _row_consistency(
    observation: Observation,
    layer: ImageLayer,
    candidates: Tensor,
    groups: list[Tensor],
    labels: Tensor,
    meter: Meter,
) -> tuple[Tensor, Tensor]:
    """Predict dL/db on each group's rows from its image alone, for every label in question.

    Agreement of rows is not enough: with two classes all rows that share the same *set* of active images agree on
    their mixture. A mixture does not predict its rows' gradients; the true image with its true label does. Mean
    reduction over independent samples is assumed; where it fails, nothing is certified.

    Returns:
        The relative error of each candidate (N,), and the label that gives it (N,).
    """
    assert layer.bias is not None
    bias = observation.gradients[layer.bias].float()
    errors = []
    distinct = labels.unique()
    for label in distinct:
        predicted = output_gradients(observation, layer, candidates, label, meter)
        pairs = zip(predicted, groups, strict=True)
        errors.append(torch.stack([(p[rows] - bias[rows]).norm() / bias[rows].norm() for p, rows in pairs]))
    error, index = torch.stack(errors).min(0)
    return error, distinct[index]

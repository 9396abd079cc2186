"""How gradient similarity relates to data similarity: measured along rays, over pairs of images, and along an attack.

A correlation of the two is a description of a network, not a risk: a sigmoid network keeps the order of distances
almost perfectly while squeezing them, an MLP scrambles the order and still gives its images away. What counts is how
far data can move while the gradient hardly does, which the local constants m and M in m‖Δx‖ <= ‖Δg‖ <= M‖Δx‖ and the
spectrum (`analysis.bounds`) say. Both are shown side by side.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from scipy.stats import rankdata
from torch import Tensor

from lightning_gradaudit.defences import Tensors
from lightning_gradaudit.errors import InvalidInputError
from lightning_gradaudit.metrics.functional.similarity import mean_squared_error, similarity, usable_similarity
from lightning_gradaudit.observation import Observation
from lightning_gradaudit.reconstruction import Reconstruction
from lightning_gradaudit.snapshot import Snapshot

GradientDistance = Literal["l2", "cosine"]
DataDistance = Literal["mse", "ssim"]
RADII = (0.01, 0.02, 0.05, 0.1, 0.2, 0.5)
_RESAMPLES = 500
_CONFIDENCE = 0.95


@dataclass(frozen=True, eq=False)
class Distances:
    """Distances between data and between their gradients, one entry (N,) for each comparison.

    Attributes:
        units: (N, 2) what was compared: the same ray twice, or two images. Comparisons that share a unit are not
            independent, and intervals resample units.
        euclidean: ‖Δx‖ in pixel space.
        data: By measure: "mse", or "ssim" (1 - SSIM; NaN below 8 pixels a side).
        gradient: By kind ("l2": ‖Δg‖; "cosine": 1 - cos) and tensor name; "" stands for all tensors together.
    """

    units: Tensor
    euclidean: Tensor
    data: dict[str, Tensor]
    gradient: dict[tuple[str, str], Tensor]


@dataclass(frozen=True, kw_only=True)
class Relation:
    """Gradient distance against data distance; intervals are 95% bootstrap intervals over units.

    Attributes:
        spearman: Rank correlation of the two, in [-1, 1].
        slope: Of log gradient distance against log data distance (least squares).
        smallest, largest: m and M: extreme ratios ‖Δg‖/‖Δx‖ that were met, per pixel unit. The true constants lie
            outside of them.
        comparisons: Number behind it.
    """

    spearman: float
    spearman_interval: tuple[float, float]
    slope: float
    slope_interval: tuple[float, float]
    smallest: float
    largest: float
    comparisons: int


def along_rays(
    snapshot: Snapshot, *, radii: Sequence[float] = RADII, rays: int = 8, generator: torch.Generator
) -> Distances:
    """Compare the true batch with itself moved along random directions.

    Args:
        radii: Root mean square change of a pixel in [0, 1]. Pixels may leave the range: clipping would bend the ray.
        rays: Directions, each of independent normal pixels; one simulated gradient for every ray and radius.
    """
    observation, truth = snapshot.observation, snapshot.truth
    leaves = observation.leaves()
    pixels = observation.normalization.to_pixels(truth.inputs)
    at_truth = observation.simulate(truth.inputs, truth.labels, leaves)
    moved, gradients, units = [], [], []
    for ray in range(rays):
        direction = torch.randn(pixels.shape, generator=generator).to(pixels)
        direction = direction / (direction**2).mean().sqrt()
        for radius in radii:
            moved.append(pixels + radius * direction)
            inputs = observation.normalization.from_pixels(moved[-1])
            gradients.append(observation.simulate(inputs, truth.labels, leaves))
            units.append((ray, ray))
    return _distances(units, [pixels] * len(moved), moved, [at_truth] * len(moved), gradients)


def over_pairs(observation: Observation, inputs: Tensor, labels: Tensor) -> Distances:
    """Compare images with each other, each by the gradient it gives alone.

    Args:
        inputs: (N, C, H, W) in the model's input space, N >= 3; N simulated gradients.
        labels: (N,).
    """
    if len(inputs) < 3:
        raise InvalidInputError(f"inputs: expected at least 3 images to compare, got {len(inputs)}.")
    leaves = observation.leaves()
    pixels = observation.normalization.to_pixels(inputs).split(1)
    gradients = [observation.simulate(x, y, leaves) for x, y in zip(inputs.split(1), labels.split(1), strict=True)]
    first, second = np.triu_indices(len(pixels), k=1)
    return _distances(
        list(zip(first.tolist(), second.tolist(), strict=True)),
        [pixels[i] for i in first],
        [pixels[j] for j in second],
        [gradients[i] for i in first],
        [gradients[j] for j in second],
    )


def along_attack(snapshot: Snapshot, reconstructions: Sequence[Reconstruction]) -> Distances:
    """Compare the true batch with reconstructions of growing effort (`analysis.effort.effort_curve`).

    Reconstructed images are taken in their own order, so batches of one are meant.
    """
    observation, truth = snapshot.observation, snapshot.truth
    leaves = observation.leaves()
    pixels = observation.normalization.to_pixels(truth.inputs)
    at_truth = observation.simulate(truth.inputs, truth.labels, leaves)
    moved = [observation.normalization.to_pixels(each.inputs) for each in reconstructions]
    gradients = [observation.simulate(each.inputs, truth.labels, leaves) for each in reconstructions]
    units = [(index, index) for index in range(len(moved))]
    return _distances(units, [pixels] * len(moved), moved, [at_truth] * len(moved), gradients)


def relation(
    distances: Distances,
    *,
    gradient: GradientDistance = "l2",
    data: DataDistance = "mse",
    tensor: str = "",
    seed: int = 0,
) -> Relation:
    """Summarise distances by rank correlation, log-log slope and local constants.

    Args:
        gradient, data: Which distances.
        tensor: Name of a gradient tensor; "" for all together.

    Raises:
        InvalidInputError: When there is no such tensor.
    """
    if (gradient, tensor) not in distances.gradient:
        known = sorted({name for _, name in distances.gradient})
        raise InvalidInputError(f"gradient, tensor: no distances for {(gradient, tensor)!r}; tensors: {known[:5]}.")
    x, y = distances.data[data].double().numpy(), distances.gradient[gradient, tensor].double().numpy()
    units = distances.units.numpy()
    numbers = np.unique(units)
    rng = np.random.default_rng(seed)
    draws = []
    for _ in range(_RESAMPLES):
        counts = np.bincount(rng.choice(numbers, len(numbers)), minlength=numbers.max() + 1)
        own = units[:, 0] == units[:, 1]
        weight = np.where(own, counts[units[:, 0]], counts[units[:, 0]] * counts[units[:, 1]])
        rows = np.repeat(np.arange(len(x)), weight)
        draws.append((spearman(x[rows], y[rows]), _slope(x[rows], y[rows])))
    ratios = distances.gradient["l2", tensor] / distances.euclidean.clamp_min(1e-12)
    correlations, slopes = zip(*draws, strict=True)
    return Relation(
        spearman=spearman(x, y),
        spearman_interval=_interval(correlations),
        slope=_slope(x, y),
        slope_interval=_interval(slopes),
        smallest=float(ratios.min()),
        largest=float(ratios.max()),
        comparisons=len(x),
    )


def spearman(x: np.ndarray, y: np.ndarray) -> float:
    """Return the rank correlation, ties sharing their mean rank; NaN when one side is constant."""
    if len(x) < 2 or not (np.isfinite(x).all() and np.isfinite(y).all()):
        return float("nan")
    ranks = [rankdata(each) - (len(x) + 1) / 2 for each in (x, y)]
    norm = np.sqrt((ranks[0] ** 2).sum() * (ranks[1] ** 2).sum())
    return float((ranks[0] * ranks[1]).sum() / norm) if norm > 0 else float("nan")


def _slope(x: np.ndarray, y: np.ndarray) -> float:
    used = (x > 0) & (y > 0)
    if used.sum() < 2:
        return float("nan")
    log_x, log_y = np.log(x[used]), np.log(y[used])
    centred = log_x - log_x.mean()
    spread = (centred**2).sum()
    return float((centred * log_y).sum() / spread) if spread > 0 else float("nan")


def _interval(values: Sequence[float]) -> tuple[float, float]:
    finite = np.asarray(values)[np.isfinite(values)]
    if not len(finite):
        return float("nan"), float("nan")
    tail = (1 - _CONFIDENCE) / 2
    return float(np.quantile(finite, tail)), float(np.quantile(finite, 1 - tail))


def _distances(
    units: list[tuple[int, int]],
    first: Sequence[Tensor],
    second: Sequence[Tensor],
    first_gradients: Sequence[Tensors],
    second_gradients: Sequence[Tensors],
) -> Distances:
    a, b = torch.cat(list(first)).float().cpu(), torch.cat(list(second)).float().cpu()
    size = len(first[0])
    measurable = usable_similarity("ssim", *a.shape[-2:]) == "ssim"
    ssim = 1 - similarity(a.clamp(0, 1), b.clamp(0, 1), "ssim") if measurable else torch.full((len(a),), torch.nan)
    gradient: dict[tuple[str, str], list[Tensor]] = {}
    for one, other in zip(first_gradients, second_gradients, strict=True):
        for key, value in _gradient_distances(one, other).items():
            gradient.setdefault(key, []).append(value)
    return Distances(
        units=torch.tensor(units),
        euclidean=(a - b).reshape(len(units), -1).norm(dim=1),
        data={
            "mse": mean_squared_error(a, b).reshape(-1, size).mean(1),
            "ssim": ssim.reshape(-1, size).mean(1),
        },
        gradient={key: torch.stack(values) for key, values in gradient.items()},
    )


def _gradient_distances(one: Tensors, other: Tensors) -> dict[tuple[str, str], Tensor]:
    """Return both distances of two gradients for every tensor and for all together."""
    parts = {name: (one[name].double().flatten().cpu(), other[name].double().flatten().cpu()) for name in one}
    parts[""] = (torch.cat([a for a, _ in parts.values()]), torch.cat([b for _, b in parts.values()]))
    found = {}
    for name, (a, b) in parts.items():
        found["l2", name] = (a - b).norm()
        # From the difference of unit vectors: 1 - cos itself would lose the small angles to rounding.
        unit_a, unit_b = a / a.norm().clamp_min(1e-30), b / b.norm().clamp_min(1e-30)
        found["cosine", name] = ((unit_a - unit_b) ** 2).sum() / 2
    return found

"""Gradient similarity against data similarity: does the gradient move when the images do?

The question of the paper that this package formalises ("Towards auditing gradient privacy risks in image
reconstruction attacks on deep learning models", Discover Computing, 2025; no formula here is claimed to be its own).

A description, never a risk. Over 15 states of small networks the strength of the correlation did not predict what an
attack got (Spearman -.02 and -.15): a sigmoid network keeps the order of distances almost perfectly while it squeezes
them, and hides the image; a multilayer perceptron scrambles the order and gives the image away. What counts is how far
images can move while the gradient hardly does. So the correlation stands here beside the local constants
m ‖Δx‖ <= ‖Δg‖ <= M ‖Δx‖, and leak-R² (`analyse`) is what such constants amount to.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import product
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from lightning_gradaudit.analysis.bounds import LOCAL, InPixels
from lightning_gradaudit.analysis.ceiling import layer_of
from lightning_gradaudit.analysis.image_covariance import NaturalImages, Prior
from lightning_gradaudit.analysis.jacobian import Jacobian, in_full_precision
from lightning_gradaudit.analysis.spectrum import extremes
from lightning_gradaudit.attacks.reconstruction import Reconstruction
from lightning_gradaudit.errors import InvalidInputError, UnsupportedError
from lightning_gradaudit.metrics.functional.correlation import gram_distances, image_distances, spearman
from lightning_gradaudit.metrics.functional.similarity import (
    assign,
    pairwise_similarity,
    similarity,
    usable_similarity,
)
from lightning_gradaudit.simulation.observation import Observation
from lightning_gradaudit.simulation.snapshot import Snapshot
from lightning_gradaudit.utils.tensors import Tensors

ALL = "all layers"
MAX_GRADIENTS = 2**28
"""Most numbers that the gradients of single images may hold together (1 GiB in float32)."""
_CONFIDENCE = (0.025, 0.975)
_GRADIENT: tuple[Literal["l2", "cosine"], ...] = ("l2", "cosine")
_DATA: tuple[Literal["mse", "ssim"], ...] = ("mse", "ssim")


@dataclass(frozen=True)
class Measured:
    """A statistic with its bootstrap interval of 95%; NaN where it is not defined."""

    value: float
    low: float
    high: float


@dataclass(frozen=True, kw_only=True)
class Association:
    """How well the order of gradient distances follows that of image distances.

    Attributes:
        over: "pairs" of images, "rays" around the truth, or the attack's own "path".
        layer: Or `ALL`.
        gradient: Distance of gradients: Euclidean, or 1 - cosine.
        data: Distance of images: mean squared error, or 1 - SSIM.
        rho: Spearman's coefficient, in [-1, 1]; positive: more alike in gradient, more alike in pixels.
    """

    over: Literal["pairs", "rays", "path"]
    layer: str
    gradient: Literal["l2", "cosine"]
    data: Literal["mse", "ssim"]
    rho: Measured


@dataclass(frozen=True, kw_only=True)
class SimilarityRelation:
    """The relation of gradient and data similarity at one step; images in pixels, [0, 1].

    Attributes:
        associations: Spearman coefficients. Bootstrapped by whole images (pairs share them), by whole rays, and by
            points of the path, whose interval is rough because they follow each other.
        slopes: Of log ‖Δg‖ against log ‖Δx‖ along rays, for each layer and `ALL`; 1 where the gradient is linear.
        least, largest: m and M, the extreme ratios ‖Δg‖/‖Δx‖ along rays. Extremes of a sample lie inside the true ones.
        sigma_min, sigma_max: Extreme singular values of the Jacobian, which bound the ratios at small radii.
            `sigma_max` is approached from below; `sigma_min` only from above unless `sigma_exact`.
        points: For each kind of comparison (mse, 1 - SSIM, Euclidean distance, 1 - cosine) over all layers.
        evaluations: Simulated gradients it cost.
        products: Products with the Jacobian it cost.
        assumption: What must hold.
    """

    associations: tuple[Association, ...]
    slopes: Mapping[str, Measured]
    least: Measured
    largest: Measured
    sigma_min: float
    sigma_max: float
    sigma_exact: bool
    points: Mapping[str, tuple[tuple[float, float, float, float], ...]]
    evaluations: int
    products: int
    assumption: str

    def rho(self, over: str, *, gradient: str = "l2", data: str = "mse", layer: str = ALL) -> Measured:
        """Return one of the coefficients."""
        for each in self.associations:
            if (each.over, each.gradient, each.data, each.layer) == (over, gradient, data, layer):
                return each.rho
        raise InvalidInputError(f"no coefficient over {over!r} of {gradient!r} with {data!r} in {layer!r}.")

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON."""
        return asdict(self)


@dataclass(frozen=True, eq=False)
class _Compared:
    """Distances of K comparisons: of images (K,) by name, and of gradients (K,) by layer and name."""

    data: dict[str, np.ndarray]
    gradient: dict[tuple[str, str], np.ndarray]

    @property
    def points(self) -> tuple[tuple[float, float, float, float], ...]:
        columns = [self.data[name] for name in _DATA] + [self.gradient[ALL, name] for name in _GRADIENT]
        return tuple(tuple(float(v) for v in row) for row in zip(*columns, strict=True))  # type: ignore[misc]


def similarity_relation(
    snapshot: Snapshot,
    *,
    images: Tensor | None = None,
    labels: Tensor | None = None,
    reconstruction: Reconstruction | None = None,
    radii: Sequence[float] = (1e-3, 3e-3, 1e-2, 3e-2, 1e-1, 3e-1),
    rays: int = 12,
    prior: Prior | None = None,
    steps: int = 30,
    resamples: int = 300,
    double: bool = False,
    seed: int = 0,
) -> SimilarityRelation:
    """Compare distances between gradients with distances between the images behind them.

    Args:
        snapshot: Rays start at its true batch, whose images move together.
        images, labels: (N, C, H, W) in the model's input space with their labels: every two of them are compared by
            the gradients each would give alone. None: the batch itself. Fewer than three: no pairs.
        reconstruction: An attack's result; with its `path` the candidates on the way are compared with the truth.
        radii: Root mean square change of a pixel.
        rays: Random directions, drawn from the prior.
        prior: None: `NaturalImages()`.
        steps: Krylov steps for the singular values, two products each.
        resamples: Bootstrap resamples.
        double: Compute in float64.

    Raises:
        InvalidInputError: When radii, rays or resamples are out of range.
        UnsupportedError: When the gradients of the images do not fit in memory.
        DoubleBackwardError: When the model has an operation without a second derivative.
    """
    if rays < 2 or resamples < 1 or len(radii) < 2 or not all(r > 0 for r in radii):
        raise InvalidInputError(
            "similarity_relation: expected rays >= 2, resamples >= 1 and at least two radii > 0, got "
            f"{rays}, {resamples} and {tuple(radii)}."
        )
    generator = torch.Generator().manual_seed(seed)
    rng = np.random.default_rng(seed)
    observation, note = in_full_precision(snapshot.observation, double=double)
    scene = _Scene(observation, snapshot)
    along = scene.along_rays(radii, rays, NaturalImages() if prior is None else prior, generator)
    associations = list(_associations("rays", along, _resampled_rays(rays, len(radii)), resamples, rng))
    points = {"rays": along.points}
    if images is None or labels is None:
        images, labels = snapshot.truth.inputs, snapshot.truth.labels
    if len(images) > 2:
        pairs = scene.between(images, labels)
        associations += _associations("pairs", pairs, _resampled_pairs(len(images)), resamples, rng)
        points["pairs"] = pairs.points
    if reconstruction is not None and len(reconstruction.path) > 2:
        path = scene.along_path(reconstruction)
        associations += _associations("path", path, _resampled_rays(len(reconstruction.path), 1), resamples, rng)
        points["path"] = path.points
    truth = snapshot.truth
    jacobian = Jacobian(snapshot.observation, truth.inputs, truth.labels, double=double)
    pixels = InPixels(jacobian, truth.inputs.shape, snapshot.observation.normalization, None)
    found = extremes(pixels, steps=steps, generator=generator)
    length = np.sqrt(along.data["mse"] * truth.inputs.numel())
    ratio = along.gradient[ALL, "l2"] / length
    resample = _resampled_rays(rays, len(radii))
    layers = [layer for layer, name in along.gradient if name == "l2"]
    return SimilarityRelation(
        associations=tuple(associations),
        slopes={
            layer: _measure(_slope, (length, along.gradient[layer, "l2"]), resample, resamples, rng) for layer in layers
        },
        least=_measure(np.min, (ratio,), resample, resamples, rng),
        largest=_measure(np.max, (ratio,), resample, resamples, rng),
        sigma_min=found.smallest**0.5,
        sigma_max=found.largest**0.5,
        sigma_exact=found.exact,
        points=points,
        evaluations=scene.evaluations,
        products=jacobian.products,
        assumption="; ".join(
            filter(None, (f"a description and no risk; {LOCAL}; rays leave [0, 1] where they must", note))
        ),
    )


class _Scene:
    """Gradients at the truth and elsewhere, before any defence, and a count of them."""

    def __init__(self, observation: Observation, snapshot: Snapshot) -> None:
        self.observation, self.snapshot = observation, snapshot
        self.labels = snapshot.truth.labels
        self.pixels = snapshot.observation.normalization.to_pixels(snapshot.truth.inputs.to(observation.input_dtype))
        self.measure = usable_similarity("ssim", *self.pixels.shape[-2:])
        self.evaluations = 0
        self._leaves = observation.leaves()
        self.gradient = self._simulate(self.pixels, self.labels)

    def along_rays(self, radii: Sequence[float], rays: int, prior: Prior, generator: torch.Generator) -> _Compared:
        """Compare the truth with points along random directions: rays by the row, radii by the column."""
        mse, ssim, gradients = [], [], []
        for _ in range(rays):
            drawn = torch.randn(self.pixels.shape, generator=generator).to(self.pixels)
            direction = prior.root(drawn)
            direction = direction / (direction**2).mean().sqrt()
            for radius in radii:
                moved = self.pixels + radius * direction
                mse.append(radius**2)
                ssim.append(self._dissimilarity(moved))
                gradients.append(_distances(self._simulate(moved, self.labels), self.gradient))
        return _Compared({"mse": np.array(mse), "ssim": np.array(ssim)}, _columns(gradients))

    def along_path(self, reconstruction: Reconstruction) -> _Compared:
        """Compare the truth with an attack's candidates on the way, each assigned anew."""
        labels = reconstruction.labels
        labels = self.labels if labels is None or labels.shape != self.labels.shape else labels.to(self.labels)
        mse, ssim, gradients = [], [], []
        for _, images in reconstruction.path:
            pixels = self.snapshot.observation.normalization.to_pixels(images.to(self.pixels))
            order = assign(pairwise_similarity(pixels.clamp(0, 1).float(), self.snapshot.truth_pixels, self.measure))
            mse.append(float(((pixels[order] - self.pixels) ** 2).mean()))
            ssim.append(self._dissimilarity(pixels[order]))
            gradients.append(_distances(self._simulate(pixels, labels), self.gradient))
        return _Compared({"mse": np.array(mse), "ssim": np.array(ssim)}, _columns(gradients))

    def between(self, images: Tensor, labels: Tensor) -> _Compared:
        """Compare every two images by the gradients each would give alone; pairs in the order of triu."""
        count = len(images)
        size = sum(g.numel() for g in self.gradient.values())
        if count * size > MAX_GRADIENTS:
            raise UnsupportedError(
                f"images: the gradients of {count} images hold {count * size} numbers, more than {MAX_GRADIENTS}: "
                f"pass at most {MAX_GRADIENTS // size} images."
            )
        pixels = self.snapshot.observation.normalization.to_pixels(images.to(self.pixels))
        single = [self._simulate(pixels[i : i + 1], labels[i : i + 1]) for i in range(count)]
        gradients: dict[tuple[str, str], np.ndarray] = {}
        total = torch.zeros((count, count), dtype=torch.float64, device=images.device)
        for layer, names in _layers(self.gradient).items():
            flat = torch.stack([torch.cat([g[name].reshape(-1) for name in names]) for g in single]).double()
            gram = flat @ flat.T
            total += gram
            gradients |= {(layer, name): values.cpu().numpy() for name, values in gram_distances(gram).items()}
        gradients |= {(ALL, name): values.cpu().numpy() for name, values in gram_distances(total).items()}
        return _Compared({name: image_distances(pixels, name).cpu().numpy() for name in _DATA}, gradients)

    def _simulate(self, pixels: Tensor, labels: Tensor) -> Tensors:
        self.evaluations += 1
        inputs = self.snapshot.observation.normalization.from_pixels(pixels).to(self.observation.input_dtype)
        return self.observation.simulate(inputs, labels, self._leaves)

    def _dissimilarity(self, pixels: Tensor) -> float:
        return 1 - float(similarity(pixels.clamp(0, 1).float(), self.snapshot.truth_pixels, self.measure).mean())


def _layers(gradient: Tensors) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for name in gradient:
        found.setdefault(layer_of(name), []).append(name)
    return found


def _distances(gradient: Tensors, reference: Tensors) -> dict[tuple[str, str], float]:
    """Return both distances of two gradients, by layer and over all.

    From differences in float64, since nearby gradients differ by less than single precision resolves of a cosine.
    """
    sums = {}
    for layer, names in _layers(reference).items():
        g, h = (torch.cat([each[n].reshape(-1) for n in names]).double() for each in (gradient, reference))
        sums[layer] = torch.stack([((g - h) ** 2).sum(), (g**2).sum(), (h**2).sum()])
    sums[ALL] = torch.stack(list(sums.values())).sum(0)
    result = {}
    for layer, (apart, g2, h2) in sums.items():
        lengths = (g2 * h2).sqrt().clamp_min(1e-300)
        result[layer, "l2"] = float(apart.sqrt())
        result[layer, "cosine"] = float((apart - (g2.sqrt() - h2.sqrt()) ** 2).clamp_min(0) / (2 * lengths))
    return result


def _columns(rows: list[dict[tuple[str, str], float]]) -> dict[tuple[str, str], np.ndarray]:
    return {key: np.array([row[key] for row in rows]) for key in rows[0]}


Resample = Callable[[np.random.Generator], np.ndarray]
"""Draws the indices of one bootstrap resample."""


def _resampled_rays(rays: int, radii: int) -> Resample:
    """Draw whole rays, with all points on them."""

    def draw(rng: np.random.Generator) -> np.ndarray:
        return (rng.integers(rays, size=rays)[:, None] * radii + np.arange(radii)).ravel()

    return draw


def _resampled_pairs(count: int) -> Resample:
    """Draw images, and take the pairs of those drawn that differ: pairs which share an image are not independent."""
    number = np.zeros((count, count), dtype=np.int64)
    number[np.triu_indices(count, 1)] = np.arange(count * (count - 1) // 2)
    number += number.T

    def draw(rng: np.random.Generator) -> np.ndarray:
        drawn = rng.integers(count, size=count)
        i, j = (drawn[index] for index in np.triu_indices(count, 1))
        return number[i, j][i != j]

    return draw


def _associations(
    over: Literal["pairs", "rays", "path"],
    compared: _Compared,
    resample: Resample,
    resamples: int,
    rng: np.random.Generator,
) -> Iterable[Association]:
    layers = dict.fromkeys(layer for layer, _ in compared.gradient)
    for layer, gradient, data in product(layers, _GRADIENT, _DATA):
        values = (compared.gradient[layer, gradient], compared.data[data])
        rho = _measure(spearman, values, resample, resamples, rng)
        yield Association(over=over, layer=layer, gradient=gradient, data=data, rho=rho)


def _slope(x: np.ndarray, y: np.ndarray) -> float:
    """Return the least squares slope of log y against log x; NaN where y vanishes."""
    if (y <= 0).any():
        return float("nan")
    log_x = np.log(x) - np.log(x).mean()
    return float((log_x * np.log(y)).sum() / (log_x**2).sum())


def _measure(
    statistic: Callable[..., float],
    values: tuple[np.ndarray, ...],
    resample: Resample,
    resamples: int,
    rng: np.random.Generator,
) -> Measured:
    """Return a statistic and the interval of its bootstrap."""
    drawn = []
    for _ in range(resamples):
        chosen = resample(rng)
        drawn.append(float(statistic(*(v[chosen] for v in values))))
    finite = [value for value in drawn if np.isfinite(value)]
    low, high = np.quantile(finite, _CONFIDENCE) if finite else (float("nan"), float("nan"))
    return Measured(float(statistic(*values)), float(low), float(high))

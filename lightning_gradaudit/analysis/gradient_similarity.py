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

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import product
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from lightning_gradaudit.analysis.ceiling import layer_of
from lightning_gradaudit.analysis.image_covariance import NaturalImages, Prior
from lightning_gradaudit.analysis.jacobian import LOCAL, InPixels, Jacobian, in_full_precision
from lightning_gradaudit.analysis.spectrum import Extremes, extremes
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
Resample = Callable[[np.random.Generator], np.ndarray]
"""Draws the indices of one bootstrap resample."""
Over = Literal["pairs", "rays", "path"]
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

    over: Over
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
    """Distances of K comparisons: of images (K,) by name, of gradients (K,) by layer and name, and how to resample."""

    data: dict[str, np.ndarray]
    gradient: dict[tuple[str, str], np.ndarray]
    resample: Resample

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
    _check_sample(rays, radii, resamples)
    generator = torch.Generator().manual_seed(seed)
    bootstrap = _Bootstrap(np.random.default_rng(seed), resamples)
    observation, note = in_full_precision(snapshot.observation, double=double)
    scene = _Scene(observation, snapshot)
    along = scene.along_rays(radii, rays, NaturalImages() if prior is None else prior, generator)
    compared: dict[Over, _Compared] = {"rays": along, **scene.comparisons(images, labels, reconstruction)}
    associations = [each for over, found in compared.items() for each in bootstrap.associations(over, found)]
    ends, products = _singular_values(snapshot, steps, generator, double=double)
    length = np.sqrt(along.data["mse"] * snapshot.truth.inputs.numel())
    ratio = along.gradient[ALL, "l2"] / length
    said = (f"a description and no risk; {LOCAL}; rays leave [0, 1] where they must", note)
    return SimilarityRelation(
        associations=tuple(associations),
        slopes=bootstrap.slopes(along, length),
        least=bootstrap.measure(np.min, (ratio,), along.resample),
        largest=bootstrap.measure(np.max, (ratio,), along.resample),
        sigma_min=ends.smallest**0.5,
        sigma_max=ends.largest**0.5,
        sigma_exact=ends.exact,
        points={over: found.points for over, found in compared.items()},
        evaluations=scene.evaluations,
        products=products,
        assumption="; ".join(filter(None, said)),
    )


def _check_sample(rays: int, radii: Sequence[float], resamples: int) -> None:
    if rays < 2 or resamples < 1 or len(radii) < 2 or not all(r > 0 for r in radii):
        raise InvalidInputError(
            "similarity_relation: expected rays >= 2, resamples >= 1 and at least two radii > 0, got "
            f"{rays}, {resamples} and {tuple(radii)}."
        )


def _singular_values(
    snapshot: Snapshot, steps: int, generator: torch.Generator, *, double: bool
) -> tuple[Extremes, int]:
    """Return the extreme eigenvalues of JᵀJ, images in pixels, and the products they cost."""
    truth, observation = snapshot.truth, snapshot.observation
    jacobian = Jacobian(observation, truth.inputs, truth.labels, double=double)
    pixels = InPixels(jacobian, truth.inputs.shape, observation.normalization, None)
    return extremes(pixels, steps=steps, generator=generator), jacobian.products


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

    def comparisons(
        self, images: Tensor | None, labels: Tensor | None, reconstruction: Reconstruction | None
    ) -> dict[Over, _Compared]:
        """Compare pairs of images, by default the batch's, and an attack's path with the truth; three at least."""
        found: dict[Over, _Compared] = {}
        if images is None or labels is None:
            images, labels = self.snapshot.truth.inputs, self.labels
        if len(images) > 2:
            found["pairs"] = self.between(images, labels)
        if reconstruction is not None and len(reconstruction.path) > 2:
            found["path"] = self.along_path(reconstruction)
        return found

    def along_rays(self, radii: Sequence[float], rays: int, prior: Prior, generator: torch.Generator) -> _Compared:
        """Compare the truth with points along random directions: rays by the row, radii by the column."""

        def points() -> Iterator[tuple[float, Tensor, Tensor]]:
            for _ in range(rays):
                direction = prior.root(torch.randn(self.pixels.shape, generator=generator).to(self.pixels))
                direction = direction / (direction**2).mean().sqrt()
                for radius in radii:
                    moved = self.pixels + radius * direction
                    yield radius**2, moved, moved

        return self._with_truth(points(), self.labels, _resampled_rays(rays, len(radii)))

    def along_path(self, reconstruction: Reconstruction) -> _Compared:
        """Compare the truth with an attack's candidates on the way, each assigned anew."""
        labels = reconstruction.labels
        labels = self.labels if labels is None or labels.shape != self.labels.shape else labels.to(self.labels)

        def points() -> Iterator[tuple[float, Tensor, Tensor]]:
            for _, images in reconstruction.path:
                pixels = self.snapshot.observation.normalization.to_pixels(images.to(self.pixels))
                alike = pairwise_similarity(pixels.clamp(0, 1).float(), self.snapshot.truth_pixels, self.measure)
                assigned = pixels[assign(alike)]
                yield float(((assigned - self.pixels) ** 2).mean()), assigned, pixels

        return self._with_truth(points(), labels, _resampled_rays(len(reconstruction.path), 1))

    def _with_truth(
        self, points: Iterable[tuple[float, Tensor, Tensor]], labels: Tensor, resample: Resample
    ) -> _Compared:
        """Compare the truth with points: squared error, images in the order of the truth, and in their own."""
        mse, ssim, gradients = [], [], []
        for error, assigned, pixels in points:
            mse.append(error)
            ssim.append(self._dissimilarity(assigned))
            gradients.append(_distances(self._simulate(pixels, labels), self.gradient))
        by_layer = {key: np.array([row[key] for row in gradients]) for key in gradients[0]}
        return _Compared({"mse": np.array(mse), "ssim": np.array(ssim)}, by_layer, resample)

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
        apart: dict[str, np.ndarray] = {name: image_distances(pixels, name).cpu().numpy() for name in _DATA}
        return _Compared(apart, gradients, _resampled_pairs(count))

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


def _slope(x: np.ndarray, y: np.ndarray) -> float:
    """Return the least squares slope of log y against log x; NaN where y vanishes."""
    if (y <= 0).any():
        return float("nan")
    log_x = np.log(x) - np.log(x).mean()
    return float((log_x * np.log(y)).sum() / (log_x**2).sum())


class _Bootstrap:
    """Statistics with the interval of their bootstrap, all from one generator."""

    def __init__(self, rng: np.random.Generator, resamples: int) -> None:
        self.rng, self.resamples = rng, resamples

    def measure(self, statistic: Callable[..., float], values: tuple[np.ndarray, ...], resample: Resample) -> Measured:
        """Return a statistic of the values and its interval."""
        drawn = []
        for _ in range(self.resamples):
            chosen = resample(self.rng)
            drawn.append(float(statistic(*(v[chosen] for v in values))))
        finite = [value for value in drawn if np.isfinite(value)]
        low, high = np.quantile(finite, (0.025, 0.975)) if finite else (float("nan"), float("nan"))
        return Measured(float(statistic(*values)), float(low), float(high))

    def slopes(self, compared: _Compared, length: np.ndarray) -> dict[str, Measured]:
        """Return the slope of each layer's gradient distances against the images' distances, both logarithms."""
        apart = {layer: values for (layer, name), values in compared.gradient.items() if name == "l2"}
        return {layer: self.measure(_slope, (length, y), compared.resample) for layer, y in apart.items()}

    def associations(self, over: Over, compared: _Compared) -> Iterable[Association]:
        """Return the rank correlation of each layer's gradient distances with each distance of images."""
        layers = dict.fromkeys(layer for layer, _ in compared.gradient)
        for layer, gradient, data in product(layers, _GRADIENT, _DATA):
            rho = self.measure(spearman, (compared.gradient[layer, gradient], compared.data[data]), compared.resample)
            yield Association(over=over, layer=layer, gradient=gradient, data=data, rho=rho)

"""What the Jacobian says any attacker can, or cannot, get: published bounds on one set of matrix-free products.

All of them are local: the gradient is linearised at the true images, where a strong attacker ends. None is a
guarantee. Bounds of the Cramér-Rao kind (FIL, dFIL) hold for unbiased attackers; prior knowledge beats them. Labels
and mode are taken as known. Each result says what it assumes, how far it can be off, and what it cost.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from lightning_gradaudit.analysis.jacobian import Jacobian
from lightning_gradaudit.analysis.priors import Prior
from lightning_gradaudit.analysis.spectrum import (
    Krylov,
    LinearMap,
    SpectralMeasure,
    bidiagonalise,
    conjugate_gradients,
    exact_measure,
    extremes,
    rademacher,
)
from lightning_gradaudit.errors import InvalidInputError
from lightning_gradaudit.observation import Normalization

LOCAL = "local: the gradient is linearised at the true images; labels and mode are known to the attacker"


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """A number with what it rests on.

    Attributes:
        value: The estimate.
        low, high: Where the exact value of the same quantity lies. The ends are proven at every number of steps for
            the probe that was drawn; they do not cover how probes differ, and are NaN where nothing is known.
        products: Products with J or its transpose that it cost, each about the work of a training step.
        assumption: What must hold.
    """

    value: float
    low: float
    high: float
    products: int
    assumption: str = LOCAL


class InPixels(LinearMap):
    """A = J S: the Jacobian by images in pixels, [0, 1], in units in which the prior is white.

    With Σ = S Sᵀ the prior's covariance, tr(S h(AᵀA) Sᵀ) sums over what the gradient resolves, weighted by how much
    images vary there.

    Args:
        jacobian: By images in the model's input space.
        normalization: Of that space.
        prior: Of the pixels; None: S is the identity.
    """

    def __init__(
        self, jacobian: LinearMap, shape: torch.Size, normalization: Normalization, prior: Prior | None
    ) -> None:
        self._jacobian, self._shape, self._prior = jacobian, shape, prior
        self.rows, self.columns = jacobian.rows, jacobian.columns
        self.dtype, self.device = jacobian.dtype, jacobian.device
        ones = torch.ones(shape[-3:], dtype=self.dtype, device=self.device)
        self._scale = normalization.from_pixels(ones) - normalization.from_pixels(torch.zeros_like(ones))

    def matvec(self, v: Tensor) -> Tensor:
        return self._jacobian.matvec((self.root(v).reshape(self._shape) * self._scale).reshape(-1))

    def rmatvec(self, u: Tensor) -> Tensor:
        return self.root((self._jacobian.rmatvec(u).reshape(self._shape) * self._scale).reshape(-1))

    def root(self, v: Tensor) -> Tensor:
        """Apply S, flat."""
        return v if self._prior is None else self._prior.root(v.reshape(self._shape)).reshape(-1)


class Tangential(LinearMap):
    """(I - ĝĝᵀ) A / ‖g‖: what is left of A when only the gradient's direction counts (cosine matching)."""

    def __init__(self, linear: LinearMap, gradient: Tensor) -> None:
        self._linear = linear
        self._norm = gradient.norm()
        if not float(self._norm) > 0:
            raise InvalidInputError("The gradient is 0: it has no direction, and gives nothing away.")
        self._direction = gradient / self._norm
        self.rows, self.columns, self.dtype, self.device = linear.rows, linear.columns, linear.dtype, linear.device

    def matvec(self, v: Tensor) -> Tensor:
        return self._project(self._linear.matvec(v)) / self._norm

    def rmatvec(self, u: Tensor) -> Tensor:
        return self._linear.rmatvec(self._project(u)) / self._norm

    def _project(self, u: Tensor) -> Tensor:
        return u - self._direction * (self._direction @ u)


class TensorRows(LinearMap):
    """The rows of J that belong to one gradient tensor."""

    def __init__(self, jacobian: Jacobian, name: str) -> None:
        if name not in jacobian.names:
            raise InvalidInputError(f"name: {name!r} is no tensor of this Jacobian; known: {jacobian.names[:5]}.")
        self._jacobian, self._name = jacobian, name
        self._like = torch.zeros(jacobian.rows, dtype=jacobian.dtype, device=jacobian.device)
        self.rows = jacobian.split(self._like)[name].numel()
        self.columns, self.dtype, self.device = jacobian.columns, jacobian.dtype, jacobian.device

    def matvec(self, v: Tensor) -> Tensor:
        return self._jacobian.split(self._jacobian.matvec(v))[self._name]

    def rmatvec(self, u: Tensor) -> Tensor:
        padded = self._like.clone()
        self._jacobian.split(padded)[self._name].copy_(u)  # a view of `padded`
        return self._jacobian.rmatvec(padded)


# Published bounds


def fil(linear: LinearMap, *, sigma: float, steps: int, generator: torch.Generator) -> Estimate:
    """Fisher information loss σ_max(J)/σ (Hannun et al., arXiv:2102.11673), >= 0, per unit of the images.

    Args:
        sigma: Standard deviation of Gaussian noise on every coordinate of the gradient, > 0.
    """
    _positive("sigma", sigma)
    found = extremes(linear, steps=steps, generator=generator)
    value = math.sqrt(found.largest) / sigma
    return Estimate(
        value=value,
        low=value,
        high=value if found.exact else math.nan,
        products=2 * found.steps,
        assumption=f"{LOCAL}; Gaussian noise of standard deviation {sigma:.3g}; an unbiased attacker",
    )


def dfil(linear: LinearMap, *, sigma: float, probes: int, generator: torch.Generator) -> Estimate:
    """Diagonal Fisher information leakage η² = tr(JᵀJ)/(d σ²) (Guo et al., arXiv:2201.12383).

    An unbiased attacker's mean squared error is at least 1/η². The interval is two standard errors of Hutchinson's
    estimate. With at least as many probes as columns the trace is exact.
    """
    _positive("sigma", sigma)
    d = linear.columns
    if probes >= d:
        values = exact_measure(linear).nodes * d
        mean, error, cost = float(values.mean()), 0.0, d
    else:
        drawn = torch.stack([(linear.matvec(rademacher(linear, generator)).double() ** 2).sum() for _ in range(probes)])
        mean, error, cost = float(drawn.mean()), float(drawn.std() / probes**0.5) if probes > 1 else math.nan, probes
    scale = 1 / (d * sigma**2)
    return Estimate(
        value=mean * scale,
        low=max(0.0, mean - 2 * error) * scale,
        high=(mean + 2 * error) * scale,
        products=cost,
        assumption=f"{LOCAL}; Gaussian noise of standard deviation {sigma:.3g}; an unbiased attacker",
    )


def i2f_bound(linear: LinearMap, perturbation: Tensor, *, steps: int, generator: torch.Generator) -> Estimate:
    """Lower bound ‖Jᵀδ‖/λ_max(JᵀJ) of the reconstruction error that δ causes (Zhang et al., arXiv:2309.13016).

    Args:
        perturbation: δ, shared minus true gradient, (rows,).

    Returns:
        A Euclidean distance of images, in the units of the map's columns. Trends and rankings only.
    """
    found = extremes(linear, steps=steps, generator=generator)
    value = float(linear.rmatvec(perturbation).norm()) / found.largest if found.largest > 0 else math.inf
    # λ_max is approached from below, so the bound from above.
    return Estimate(
        value=value,
        low=value if found.exact else math.nan,
        high=value,
        products=2 * found.steps + 1,
        assumption=f"{LOCAL}; a small perturbation; for rankings",
    )


def i2f(linear: LinearMap, perturbation: Tensor, *, damping: float, iterations: int) -> Estimate:
    """Reconstruction error ‖(JᵀJ + εI)⁻¹Jᵀδ‖ that δ causes (arXiv:2309.13016), by conjugate gradients.

    Args:
        perturbation: δ, shared minus true gradient, (rows,).
        damping: ε >= 0, in units of JᵀJ.
    """
    solution = conjugate_gradients(linear, linear.rmatvec(perturbation), shift=damping, iterations=iterations)
    value = float(solution.x.norm())
    # The iterates' norm grows towards the solution's (Hestenes and Stiefel, 1952).
    return Estimate(
        value=value,
        low=value,
        high=value * (1 + solution.residual) if solution.residual < 1e-6 else math.nan,
        products=2 * solution.iterations + 1,
        assumption=f"{LOCAL}; a small perturbation, damping {damping:.3g}; relative residual {solution.residual:.1e}",
    )


def lavp(
    jacobian: Jacobian,
    *,
    objective: Literal["l2", "cosine"],
    steps: int,
    generator: torch.Generator,
) -> tuple[Estimate, Estimate]:
    """Extreme eigenvalues of the matching loss' Hessian at the truth (Ye et al., arXiv:2312.12488), largest first.

    For ½‖g' - g‖² it is JᵀJ, for 1 - cos it is ‖g‖⁻² Jᵀ(I - ĝĝᵀ)J. The ranking of two states may depend on the
    objective. The smallest is only bounded from above until the Krylov space is exhausted.
    """
    linear: LinearMap = jacobian if objective == "l2" else Tangential(jacobian, jacobian.gradient)
    found = extremes(linear, steps=steps, generator=generator)
    nan = math.nan
    cost, assumption = 2 * found.steps, f"{LOCAL}; {objective} matching"
    return (
        Estimate(
            value=found.largest,
            low=found.largest,
            high=found.largest if found.exact else nan,
            products=cost,
            assumption=assumption,
        ),
        Estimate(
            value=found.smallest,
            low=found.smallest if found.exact else 0.0,
            high=found.smallest,
            products=cost,
            assumption=assumption,
        ),
    )


def effective_rank(linear: LinearMap, *, probes: int, generator: torch.Generator) -> float:
    """Return tr(AᵀA)²/tr((AᵀA)²): how many directions carry the sensitivity, from 1 to the rank; 0 for A = 0.

    Args:
        probes: Hutchinson probes, two products each; 0: exact, from the matrix itself.
    """
    if probes == 0:
        nodes = exact_measure(linear).nodes
        first, second = float(nodes.sum()), float((nodes**2).sum())
    else:
        first = second = 0.0
        for _ in range(probes):
            image = linear.matvec(rademacher(linear, generator))
            first += float((image.double() ** 2).sum()) / probes
            second += float((linear.rmatvec(image).double() ** 2).sum()) / probes
    return first**2 / second if second > 0 else 0.0


# Bayesian quantities, as functions of the spectral measure of A = J S


@dataclass(frozen=True, kw_only=True)
class Resolved:
    """How much of the prior's variance a gradient resolves at any noise, from one Krylov run.

    With the posterior covariance Σ_post = (JᵀJ/σ² + Σ⁻¹)⁻¹, leak-R² = 1 - tr Σ_post / tr Σ is the share of an
    image's variance that a Gaussian attacker recovers, in [0, 1]; finite for every J, whatever its rank.

    Attributes:
        upper, lower: Gauss and Gauss-Radau rules of the measure of AᵀA weighted by the prior's variance. For a batch
            of one they bound the exact value for the probe on both sides; with more images the sum over the batch.
        columns: Pixels of one image, C·H·W.
        rows: Coordinates of the gradient.
        products: Cost.
    """

    upper: SpectralMeasure
    lower: SpectralMeasure
    columns: int
    rows: int
    products: int

    def leak_r2(self, sigma: float) -> Tensor:
        """Return leak-R² of each image, (B,) in [0, 1], from above, at noise σ >= 0 per coordinate."""
        return _resolved(self.upper, sigma)

    def leak_r2_low(self, sigma: float) -> Tensor:
        """Return the same from below: what this many Krylov steps are sure to resolve, (B,) in [0, 1]."""
        return _resolved(self.lower, sigma)

    def noise_to_hide(self, level: float = 0.1) -> Tensor:
        """Return the smallest σ per coordinate that brings leak-R² of each image down to `level`, (B,).

        0 where it lies below already without noise.
        """
        if not 0 < level < 1:
            raise InvalidInputError(f"level must lie in (0, 1), got {level!r}.")
        top = float(self.upper.nodes.max())
        if top <= 0:
            return torch.zeros(len(self.upper.weights), dtype=torch.float64)
        # leak-R² falls in σ; beyond sqrt(top/level) it is below `level` for any weights.
        low = torch.full((len(self.upper.weights),), math.log(top) / 2 - 40.0, dtype=torch.float64)
        high = torch.full_like(low, math.log(top / level) / 2 + 1.0)
        nodes, weights = self.upper.nodes, self.upper.weights
        for _ in range(80):
            middle = (low + high) / 2
            value = (weights * (nodes / (nodes + (2 * middle).exp()[:, None]))).sum(1)
            low = torch.where(value > level, middle, low)
            high = torch.where(value > level, high, middle)
        floor = (weights * (nodes > 0)).sum(1) <= level
        return torch.where(floor, torch.zeros_like(high), high.exp())


def _resolved(measure: SpectralMeasure, sigma: float) -> Tensor:
    if sigma < 0:
        raise InvalidInputError(f"sigma must be >= 0, got {sigma!r}.")
    shift = sigma**2
    share = measure.integrate(lambda nodes: torch.where(nodes > 0, nodes / (nodes + shift).clamp_min(1e-300), 0.0))
    return share.clamp(0, 1)


def resolved(linear: InPixels, *, blocks: int, steps: int, probes: int, generator: torch.Generator) -> Resolved:
    """Measure what a gradient resolves under a prior, from random images of it.

    Args:
        linear: A = J S.
        blocks: Images of the batch.
        steps: Krylov steps of a probe, two products each.
        probes: Random images w = S z, z random signs; 0: the exact measure, from the matrix itself.
    """
    if probes == 0:
        exact = _exact_resolved(linear, blocks)
        return Resolved(
            upper=exact, lower=exact, columns=linear.columns // blocks, rows=linear.rows, products=linear.columns
        )
    runs = [bidiagonalise(linear, linear.root(rademacher(linear, generator)), steps) for _ in range(probes)]
    return resolved_from(runs, linear, blocks=blocks)


def resolved_from(runs: list[Krylov], linear: LinearMap, *, blocks: int) -> Resolved:
    """Turn Krylov runs into `Resolved`."""
    return Resolved(
        upper=SpectralMeasure.mean([run.measure(blocks=blocks) for run in runs]),
        lower=SpectralMeasure.mean([run.measure(blocks=blocks, radau=True) for run in runs]),
        columns=linear.columns // blocks,
        rows=linear.rows,
        products=sum(2 * run.steps for run in runs),
    )


def bracket_width(run: Krylov, sigma: float) -> float:
    """Return how far apart a run's bounds of leak-R² over the whole batch are at noise σ, in [0, 1]."""
    if run.exhausted:
        return 0.0
    upper, lower = run.measure(), run.measure(radau=True)
    return float(_resolved(upper, sigma)) - float(_resolved(lower, sigma))


def _exact_resolved(linear: InPixels, blocks: int) -> SpectralMeasure:
    """Return the measure of tr(S_b h(AᵀA) S_bᵀ) / tr Σ_b for each image b, from the matrix."""
    unit = torch.eye(linear.columns, dtype=linear.dtype, device=linear.device)
    matrix = torch.stack([linear.matvec(column) for column in unit], dim=1).double().cpu()
    root = torch.stack([linear.root(column) for column in unit]).double().cpu()
    _, singular, transposed = torch.linalg.svd(matrix, full_matrices=True)
    nodes = torch.zeros(linear.columns, dtype=torch.float64)
    nodes[: len(singular)] = singular**2
    energy = ((transposed @ root) ** 2).reshape(linear.columns, blocks, -1).sum(2).T
    return SpectralMeasure(nodes, energy / energy.sum(1, keepdim=True))


def leakage_bits(linear: LinearMap, *, sigma: float, steps: int, probes: int, generator: torch.Generator) -> Estimate:
    """Mutual information of images and gradient, ½ log₂ det(I + Σ JᵀJ/σ²) in bits for the whole batch.

    Stochastic Lanczos quadrature. Gaussian prior and noise; `probes=0` computes it from the matrix itself.

    Args:
        linear: A = J S.
        sigma: Noise per coordinate, > 0.
    """
    _positive("sigma", sigma)
    d = linear.columns

    def bits(measure: SpectralMeasure) -> float:
        return float(d * measure.integrate(lambda nodes: torch.log1p(nodes / sigma**2)).mean()) / (2 * math.log(2))

    if probes == 0:
        value = bits(exact_measure(linear))
        low = high = value
        cost = d
    else:
        runs = [bidiagonalise(linear, rademacher(linear, generator), steps) for _ in range(probes)]
        high = bits(SpectralMeasure.mean([run.measure() for run in runs]))
        low = bits(SpectralMeasure.mean([run.measure(radau=True) for run in runs]))
        value, cost = high, sum(2 * run.steps for run in runs)
    return Estimate(
        value=value,
        low=low,
        high=high,
        products=cost,
        assumption=f"{LOCAL}; Gaussian prior and noise of standard deviation {sigma:.3g}",
    )


# Which layer


@dataclass(frozen=True, kw_only=True)
class TensorEnergy:
    """How strongly one gradient tensor depends on the images.

    Attributes:
        name: The parameter's name.
        energy: ‖J_l‖²_F, estimated with two standard errors `error`.
        share: Of the sum over tensors, in [0, 1].
        largest: λ_max(J_lᵀJ_l), from below; NaN when it was not asked for.
    """

    name: str
    energy: float
    error: float
    share: float
    largest: float


def tensor_energies(
    jacobian: Jacobian, *, probes: int, generator: torch.Generator, steps: int = 0
) -> list[TensorEnergy]:
    """Split ‖J‖²_F over the gradient's tensors, strongest first, by `probes` products for all of them together.

    Args:
        steps: Krylov steps for λ_max of each tensor, two products each; 0: leave it out.
    """
    drawn: dict[str, list[float]] = {name: [] for name in jacobian.names}
    for _ in range(probes):
        for name, part in jacobian.split(jacobian.matvec(rademacher(jacobian, generator))).items():
            drawn[name].append(float((part.double() ** 2).sum()))
    means = {name: sum(values) / probes for name, values in drawn.items()}
    total = sum(means.values())
    result = []
    for name, values in drawn.items():
        error = 2 * float(torch.tensor(values).std() / probes**0.5) if probes > 1 else math.nan
        top = extremes(TensorRows(jacobian, name), steps=steps, generator=generator).largest if steps else math.nan
        share = means[name] / total if total > 0 else 0.0
        result.append(TensorEnergy(name=name, energy=means[name], error=error, share=share, largest=top))
    return sorted(result, key=lambda tensor: -tensor.energy)


def layer_shares(
    jacobian: Jacobian, linear: InPixels, run: Krylov, *, sigma: float, group: Callable[[str], str]
) -> dict[str, float]:
    """Split leak-R² over layers: how much of what the gradient resolves each of them contributes.

    The sum zᵀAᵀA(AᵀA + σ²)⁻¹z, which leak-R² is for a probe z, runs over rows of A, and rows belong to layers. One
    product more than the Krylov run. Shares sum to 1; where layers repeat or contradict each other a share may be
    small or below 0, though removing the layer never raises leak-R².

    Args:
        run: Krylov run of `linear`.
        group: Maps a tensor's name to its layer's.
    """
    solved = linear.matvec(run.solve(max(sigma, 1e-30) ** 2).to(linear.dtype))
    shares: dict[str, float] = {}
    images, solved_parts = jacobian.split(run.images), jacobian.split(solved)
    for name, part in images.items():
        layer = group(name)
        shares[layer] = shares.get(layer, 0.0) + float(part.double() @ solved_parts[name].double())
    total = sum(shares.values())
    return {layer: value / total if total > 0 else 0.0 for layer, value in shares.items()}


def _positive(name: str, value: float) -> None:
    if not (value > 0 and math.isfinite(value)):
        raise InvalidInputError(f"{name} must be positive and finite, got {value!r}.")

"""What the Jacobian says any attacker can, or cannot, get: published bounds on one set of matrix-free products.

All of them are local: the gradient is linearised at the true images, where a strong attacker ends. None is a
guarantee. Bounds of the Cramér-Rao kind (FIL, dFIL) hold for unbiased attackers; prior knowledge beats them. Labels
and mode are taken as known. Each result says what it assumes, how far it can be off, and what it cost.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from lightning_gradaudit.analysis.image_covariance import Prior
from lightning_gradaudit.analysis.jacobian import Jacobian
from lightning_gradaudit.analysis.spectrum import (
    LinearMap,
    conjugate_gradients,
    exact_measure,
    extremes,
    rademacher,
)
from lightning_gradaudit.errors import InvalidInputError
from lightning_gradaudit.simulation.normalization import Normalization

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
    positive("sigma", sigma)
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
    positive("sigma", sigma)
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


def positive(name: str, value: float) -> None:
    """Refuse a value that is not positive and finite."""
    if not (value > 0 and math.isfinite(value)):
        raise InvalidInputError(f"{name} must be positive and finite, got {value!r}.")

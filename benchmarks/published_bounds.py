"""Published bounds on what a gradient gives away, from products with its Jacobian: what `prediction` compares with.

All of them are local: the gradient is linearised at the true images, labels and mode are known. None is a guarantee.
Bounds of the Cramér-Rao kind (FIL, dFIL) hold for unbiased adversaries; prior knowledge beats them.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor

from lightning_gradaudit.analysis.jacobian import Jacobian
from lightning_gradaudit.analysis.spectrum import LinearMap, SpectralMeasure, bidiagonalise, extremes, rademacher
from lightning_gradaudit.errors import InvalidInputError


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


def fil(linear: LinearMap, *, sigma: float, steps: int, generator: torch.Generator) -> float:
    """Return the Fisher information loss σ_max(J)/σ (Hannun et al., arXiv:2102.11673), >= 0, per unit of the images.

    From below until the Krylov space is exhausted.

    Args:
        sigma: Standard deviation of Gaussian noise on every coordinate of the gradient, > 0.
    """
    return math.sqrt(extremes(linear, steps=steps, generator=generator).largest) / sigma


def dfil(linear: LinearMap, *, sigma: float, probes: int, generator: torch.Generator) -> float:
    """Return the diagonal Fisher information leakage η² = tr(JᵀJ)/(d σ²) (Guo et al., arXiv:2201.12383).

    An unbiased adversary's mean squared error is at least 1/η². The trace is Hutchinson's estimate.
    """
    drawn = [float((linear.matvec(rademacher(linear, generator)).double() ** 2).sum()) for _ in range(probes)]
    return sum(drawn) / probes / (linear.columns * sigma**2)


def i2f_bound(linear: LinearMap, perturbation: Tensor, *, steps: int, generator: torch.Generator) -> float:
    """Return a lower bound ‖Jᵀδ‖/λ_max(JᵀJ) of the error of images that δ causes (Zhang et al., arXiv:2309.13016).

    Args:
        perturbation: δ, shared minus true gradient, (rows,).

    Returns:
        A Euclidean distance of images, in the units of the map's columns; from above until the Krylov space is
        exhausted. For rankings only.
    """
    largest = extremes(linear, steps=steps, generator=generator).largest
    return float(linear.rmatvec(perturbation).norm()) / largest if largest > 0 else math.inf


def lavp(
    jacobian: Jacobian, *, objective: Literal["l2", "cosine"], steps: int, generator: torch.Generator
) -> tuple[float, float]:
    """Return the extreme eigenvalues of the matching loss' Hessian at the truth (Ye et al., arXiv:2312.12488).

    For ½‖g' - g‖² it is JᵀJ, for 1 - cos it is ‖g‖⁻² Jᵀ(I - ĝĝᵀ)J. The ranking of two states may depend on the
    objective.

    Returns:
        The largest, from below, and the smallest, from above until the Krylov space is exhausted.
    """
    linear: LinearMap = jacobian if objective == "l2" else Tangential(jacobian, jacobian.gradient)
    found = extremes(linear, steps=steps, generator=generator)
    return found.largest, found.smallest


def leakage_bits(linear: LinearMap, *, sigma: float, steps: int, probes: int, generator: torch.Generator) -> float:
    """Return the mutual information of images and gradient, ½ log₂ det(I + Σ JᵀJ/σ²) in bits for the whole batch.

    Stochastic Lanczos quadrature, from above for the probes that were drawn. Gaussian prior and noise.

    Args:
        linear: A = J S.
        sigma: Noise per coordinate, > 0.
    """
    runs = [bidiagonalise(linear, rademacher(linear, generator), steps) for _ in range(probes)]
    measure = SpectralMeasure.mean([run.measure() for run in runs])
    logs = measure.integrate(lambda nodes: torch.log1p(nodes / sigma**2)).mean()
    return float(linear.columns * logs) / (2 * math.log(2))

"""Spectra of a linear map A that is known through its products alone: Krylov methods in the space of the images.

One run of Golub-Kahan bidiagonalisation from a start vector z gives the spectral measure of AᵀA as z sees it, and
every quantity of the form zᵀ f(AᵀA) z is a sum over that measure. Working on A and not on AᵀA keeps singular values
accurate to rounding relative to the largest one, where their squares would lose half of the digits.

Sources: Golub and Kahan (1965); Simon and Zha (2000) for orthogonalising one side only; Golub and Meurant, "Matrices,
Moments and Quadrature" (2010) for Gauss and Gauss-Radau bounds; Ubaru, Chen and Saad (2017) for stochastic Lanczos
quadrature.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_gradaudit.errors import InvalidInputError

STEPS_BETWEEN_CHECKS = 4
"""Steps between two checks whether a run has gone far enough."""


class LinearMap(ABC):
    """A real matrix (rows, columns) given by its products; vectors are flat.

    Attributes:
        rows, columns: Its shape.
        dtype, device: Of the vectors.
    """

    rows: int
    columns: int
    dtype: torch.dtype
    device: torch.device

    @abstractmethod
    def matvec(self, v: Tensor) -> Tensor:
        """Return A v, (rows,), for v (columns,)."""

    @abstractmethod
    def rmatvec(self, u: Tensor) -> Tensor:
        """Return Aᵀ u, (columns,), for u (rows,)."""


@dataclass(frozen=True)
class SpectralMeasure:
    """Point masses at eigenvalues of AᵀA: ∫ f dμ approximates zᵀ f(AᵀA) z / zᵀz for each block of z.

    Attributes:
        nodes: (K,) eigenvalues, >= 0.
        weights: (blocks, K); each row sums to 1. Those of a single block are >= 0; a block of several carries cross
            terms of mean 0.
    """

    nodes: Tensor
    weights: Tensor

    def integrate(self, function: Callable[[Tensor], Tensor]) -> Tensor:
        """Return Σ_k weights[b, k] function(nodes[k]) for each block b."""
        return self.weights @ function(self.nodes)

    @staticmethod
    def mean(measures: list[SpectralMeasure]) -> SpectralMeasure:
        """Average measures over probes."""
        weights = torch.cat([m.weights for m in measures], dim=1) / len(measures)
        return SpectralMeasure(torch.cat([m.nodes for m in measures]), weights)


@dataclass(frozen=True)
class Krylov:
    """A V = U B after k steps from z, with V (k, columns) orthonormal and B (k, k + 1) upper bidiagonal, in float64.

    Attributes:
        start: z.
        basis: V and the next direction, (k + 1, columns); zero where there is none.
        bidiagonal: B with its last column, which couples to the next direction.
        exhausted: Whether the space is invariant, so that quadrature from it is exact up to rounding.
        images: A z = ‖z‖ B[0, 0] U[0], kept because it costs a product.
    """

    start: Tensor
    basis: Tensor
    bidiagonal: Tensor
    exhausted: bool
    images: Tensor

    @property
    def steps(self) -> int:
        """Number of steps taken; each cost one product with A and one with its transpose."""
        return len(self.bidiagonal)

    def ritz(self, *, radau: bool = False) -> tuple[Tensor, Tensor]:
        """Return eigenvalues and eigenvectors (columns) of AᵀA restricted to the space.

        Args:
            radau: Restrict to one more direction under the condition that 0 is an eigenvalue.
        """
        matrix = self.bidiagonal if radau else self.bidiagonal[:, :-1]
        _, singular, transposed = torch.linalg.svd(matrix, full_matrices=True)
        nodes = torch.zeros(matrix.shape[1], dtype=matrix.dtype)
        nodes[: len(singular)] = singular**2
        return nodes, transposed.T

    def measure(self, *, blocks: int = 1, radau: bool = False) -> SpectralMeasure:
        """Return the quadrature rule of this run.

        For one block and f(λ) = 1/(λ + s) or -log(λ + s), whose derivatives alternate in sign, the Gauss rule is a
        lower bound of the integral and the Radau rule an upper one, at every number of steps.

        Args:
            blocks: Equal parts of the start vector (images of a batch) to tell apart.
            radau: Gauss-Radau with a node at 0 in place of Gauss.
        """
        nodes, vectors = self.ritz(radau=radau)
        if blocks == 1:
            return SpectralMeasure(nodes, vectors[0:1] ** 2)
        z = self.start.double().cpu().reshape(blocks, -1)
        parts = self.basis[: len(vectors)].double().cpu().reshape(len(vectors), blocks, -1)
        overlap = torch.einsum("kbd,bd->bk", parts, z) / (z**2).sum(1, keepdim=True).clamp_min(1e-300)
        return SpectralMeasure(nodes, (overlap @ vectors) * vectors[0] * z.norm())

    def solve(self, shift: float) -> Tensor:
        """Return the Galerkin approximation of (AᵀA + shift)⁻¹ z, (columns,): what conjugate gradients would give."""
        nodes, vectors = self.ritz()
        coefficients = vectors @ (vectors[0] / (nodes + shift))
        basis = self.basis[: len(vectors)]
        return self.start.norm() * (coefficients.to(basis) @ basis)


def bidiagonalise(
    linear: LinearMap,
    start: Tensor,
    steps: int,
    *,
    tolerance: float | None = None,
    enough: Callable[[Krylov], bool] | None = None,
) -> Krylov:
    """Run Golub-Kahan bidiagonalisation with full reorthogonalisation of the right vectors.

    Args:
        linear: A.
        start: z, (columns,), not 0.
        steps: Largest number of steps; each costs two products.
        tolerance: Relative size below which a direction counts as exhausted; None: by the dtype.
        enough: Asked every few steps with the run so far; True ends it.

    Raises:
        InvalidInputError: When z is 0 or not finite, or a product is not finite.
    """
    tolerance = 64 * torch.finfo(linear.dtype).eps if tolerance is None else tolerance
    norm = _length(start, steps)
    basis = torch.zeros((min(steps, linear.columns) + 1, linear.columns), dtype=linear.dtype, device=linear.device)
    basis[0] = start / norm
    alphas: list[float] = []
    betas: list[float] = []
    # U[k] α_k in place of U[k]: rows outnumber columns by far, and a pass over them is much of a small model's step.
    left = images = torch.zeros(linear.rows, dtype=linear.dtype, device=linear.device)
    largest, exhausted = 0.0, False
    for k in range(len(basis) - 1):
        image = linear.matvec(basis[k])
        left = left.mul_(-betas[-1] / alphas[-1]).add_(image) if betas else image.clone()
        alpha = _finite(left.norm())
        images = left * norm if k == 0 else images
        largest = max(largest, alpha)
        if alpha <= tolerance * largest or alpha == 0:  # the last direction is in the null space of A
            exhausted, alphas, betas = True, [*alphas, 0.0], [*betas, 0.0]
            break
        right = linear.rmatvec(left) / alpha
        for _ in range(2):  # twice is enough
            right = right - basis[: k + 1].T @ (basis[: k + 1] @ right)
        beta = _finite(right.norm())
        largest = max(largest, beta)
        alphas.append(alpha)
        if beta <= tolerance * largest:
            exhausted, betas = True, [*betas, 0.0]
            break
        betas.append(beta)
        basis[k + 1] = right / beta
        asked = enough is not None and len(alphas) % STEPS_BETWEEN_CHECKS == 0
        if asked and enough(_krylov(start, basis, alphas, betas, exhausted=False, images=images)):  # type: ignore[misc]
            break
    else:  # with as many steps as columns there is no further direction: what is left is rounding
        exhausted = len(alphas) == linear.columns
    return _krylov(start, basis, alphas, betas, exhausted=exhausted, images=images)


def _length(start: Tensor, steps: int) -> Tensor:
    norm = start.norm()
    if steps < 1 or not (torch.isfinite(norm) and norm > 0):
        raise InvalidInputError(f"start must be finite and not 0, and steps >= 1; got norm {float(norm)}, {steps}.")
    return norm


def _krylov(
    start: Tensor, basis: Tensor, alphas: list[float], betas: list[float], *, exhausted: bool, images: Tensor
) -> Krylov:
    k = len(alphas)
    matrix = torch.zeros((k, k + 1), dtype=torch.float64)
    index = torch.arange(k)
    matrix[index, index] = torch.tensor(alphas, dtype=torch.float64)
    matrix[index, index + 1] = torch.tensor(betas, dtype=torch.float64)
    if exhausted:
        matrix[-1, -1] = 0.0
    return Krylov(start, basis[: k + 1], matrix, exhausted, images)


def _finite(value: Tensor) -> float:
    number = float(value)
    if not math.isfinite(number):
        raise InvalidInputError(
            "A product with the Jacobian is not finite: the loss is not smooth enough at this batch "
            "(an overflow, or a square root or logarithm at 0)."
        )
    return number


def rademacher(linear: LinearMap, generator: torch.Generator) -> Tensor:
    """Draw a probe of independent signs, (columns,)."""
    signs = torch.randint(2, (linear.columns,), generator=generator) * 2 - 1
    return signs.to(linear.device, linear.dtype)


def effective_rank(linear: LinearMap, *, probes: int, generator: torch.Generator) -> float:
    """Return tr(AᵀA)²/tr((AᵀA)²): how many directions carry the sensitivity, from 1 to the rank; 0 for A = 0.

    Args:
        probes: Hutchinson probes, two products each.
    """
    first = second = 0.0
    for _ in range(probes):
        image = linear.matvec(rademacher(linear, generator))
        first += float((image.double() ** 2).sum()) / probes
        second += float((linear.rmatvec(image).double() ** 2).sum()) / probes
    return first**2 / second if second > 0 else 0.0


@dataclass(frozen=True)
class Extremes:
    """Extreme eigenvalues of AᵀA.

    Attributes:
        largest, smallest: Ritz values: from below the one, from above the other.
        exact: Whether the Krylov space was exhausted; otherwise `smallest` is only an upper bound.
        steps: Taken; two products each.
    """

    largest: float
    smallest: float
    exact: bool
    steps: int


def extremes(linear: LinearMap, *, steps: int, generator: torch.Generator) -> Extremes:
    """Estimate the extreme eigenvalues of AᵀA from a random start (see `Extremes`)."""
    krylov = bidiagonalise(linear, rademacher(linear, generator), steps)
    nodes, _ = krylov.ritz()
    return Extremes(float(nodes.max()), float(nodes.min()), krylov.exhausted, krylov.steps)

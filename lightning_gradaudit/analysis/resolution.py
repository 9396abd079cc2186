"""What a gradient resolves of images that are drawn from a prior: functions of the spectral measure of A = J S.

Gaussian prior and noise: with the posterior covariance Σ_post = (JᵀJ/σ² + Σ⁻¹)⁻¹ everything is known in closed form,
and finite for every J, whatever its rank. Local: the gradient is linearised at the true images.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_gradaudit.analysis.jacobian import InPixels, Jacobian
from lightning_gradaudit.analysis.spectrum import (
    Krylov,
    SpectralMeasure,
    bidiagonalise,
    rademacher,
)
from lightning_gradaudit.errors import InvalidInputError


@dataclass(frozen=True, kw_only=True)
class Resolved:
    """How much of the prior's variance a gradient resolves at any noise, from one Krylov run.

    With the posterior covariance Σ_post = (JᵀJ/σ² + Σ⁻¹)⁻¹, leak-R² = 1 - tr Σ_post / tr Σ is the share of an
    image's variance that a Gaussian attacker recovers, in [0, 1]; finite for every J, whatever its rank.

    Attributes:
        upper, lower: Gauss and Gauss-Radau rules of the measure of AᵀA weighted by the prior's variance. For a batch
            of one they bound the exact value for the probe on both sides; with more images the sum over the batch.
    """

    upper: SpectralMeasure
    lower: SpectralMeasure

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
        probes: Random images w = S z, z random signs.
    """
    runs = [bidiagonalise(linear, linear.root(rademacher(linear, generator)), steps) for _ in range(probes)]
    return resolved_from(runs, blocks=blocks)


def resolved_from(runs: list[Krylov], *, blocks: int) -> Resolved:
    """Turn Krylov runs into `Resolved`."""
    return Resolved(
        upper=SpectralMeasure.mean([run.measure(blocks=blocks) for run in runs]),
        lower=SpectralMeasure.mean([run.measure(blocks=blocks, radau=True) for run in runs]),
    )


def bracket_width(run: Krylov, sigma: float) -> float:
    """Return how far apart a run's bounds of leak-R² over the whole batch are at noise σ, in [0, 1]."""
    if run.exhausted:
        return 0.0
    upper, lower = run.measure(), run.measure(radau=True)
    return float(_resolved(upper, sigma)) - float(_resolved(lower, sigma))


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

"""How far an adversary gets whose search starts far from the truth, where the gradient is not linear.

Leak-R² is local: it says how sharply the gradient determines the image once the linearisation at the truth holds. A
search does not begin there. At a distance r from the truth, in units of what an image drawn from the prior differs by,
the linearisation is off by ν(r) = ‖g(x + r d) - g(x) - r J d‖, which acts like noise. Solving the linearised problem
with that noise leaves an error r' with r'² = 1 - R²(ν(r)); at that distance the gradient bends less, and so on.
Followed from r = 1, the sequence falls to 0 or stops where bending and resolution balance. This is a state evolution
of Gauss-Newton with a Gaussian prior, a heuristic of this package: ν is treated as white noise, which it is not.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from lightning_gradaudit.analysis.image_covariance import Prior
from lightning_gradaudit.analysis.jacobian import Jacobian
from lightning_gradaudit.analysis.resolution import Resolved
from lightning_gradaudit.simulation.observation import Observation

RADII = (1.0, 0.5, 0.25, 0.1, 0.03, 0.01)
"""Distances at which the bending is measured, in units of what a start differs from the truth by."""
MAX_ROUNDS = 50
SMOOTH_EXPONENT = 2.0
"""Below the smallest measured radius ν falls with this power of the radius, as of a function with two derivatives."""


@dataclass(frozen=True)
class Bending:
    """How far the gradient leaves its linearisation along rays, per coordinate.

    Attributes:
        radii: Distances, in units of what a start differs from the truth by, descending.
        deviations: (rays, radii), as noise of that standard deviation would.
        evaluations: Simulated gradients.
    """

    radii: tuple[float, ...]
    deviations: Tensor
    evaluations: int

    def at(self, radius: float, ray: int) -> float:
        """Return the deviation at a distance > 0, on straight lines between the logarithms."""
        known = self.deviations[ray].double().clamp_min(1e-30).log().flip(0).numpy()
        logs = np.log(self.radii[::-1])
        below = SMOOTH_EXPONENT * min(math.log(radius) - logs[0], 0.0)
        return math.exp(float(np.interp(math.log(radius), logs, known)) + below)


def bending(
    jacobian: Jacobian,
    observation: Observation,
    truth: Tensor,
    *,
    prior: Prior,
    rays: int,
    generator: torch.Generator,
) -> Bending:
    """Look along rays from the truth to the prior's mean and to images drawn from it.

    Args:
        jacobian: At the truth.
        observation: The step.
        truth: (B, C, H, W) model inputs; all images of the batch are moved at once.
        prior: What images look like.
        rays: The first leads to the prior's mean.
        generator: Draws the others.
    """
    truth = truth.to(jacobian.dtype)
    found = []
    for ray in range(rays):
        white = torch.randn(truth.shape, generator=generator).to(truth)
        drawn = prior.root(white) if ray else torch.zeros_like(truth)
        start = observation.normalization.from_pixels((prior.mean + drawn).clamp(0, 1))
        slope = jacobian.matvec((start - truth).reshape(-1))
        off = []
        for r in RADII:  # in place: passes over so long a vector are most of a small model's cost
            left = jacobian.gradient_at(torch.lerp(truth, start, r)).sub_(jacobian.gradient).sub_(slope, alpha=r)
            off.append(float(left.norm()) / jacobian.rows**0.5)
        found.append(off)
    return Bending(RADII, torch.tensor(found), rays * len(RADII))


def reach(found: Resolved, bent: Bending, noise: float) -> Tensor:
    """Follow the error from afar to where it stops.

    Args:
        found: Leak-R² at any noise.
        bent: What the linearisation leaves, which counts as noise.
        noise: Standard deviation per coordinate that the gradient has in any case, > 0.

    Returns:
        (B,) shares of each image's variance in [0, 1] that are resolved where the error stops, means over rays. At
        most the leak-R² at `noise` alone.
    """
    stopped = []
    for ray in range(len(bent.deviations)):
        radius = 1.0
        for _ in range(MAX_ROUNDS):
            resolved = found.leak_r2(math.hypot(noise, bent.at(radius, ray)))
            error = math.sqrt(max(1 - float(resolved.mean()), 1e-12))
            if error >= radius:
                break
            radius = error
        stopped.append(found.leak_r2(math.hypot(noise, bent.at(radius, ray))))
    return torch.stack(stopped).mean(0).float()

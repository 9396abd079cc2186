"""How a closed form verifies its solution without the truth."""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_gradaudit.attacks.budget import Meter
from lightning_gradaudit.attacks.reconstruction import Outcome, Reconstruction
from lightning_gradaudit.metrics.functional.gradients import relative_squared_error
from lightning_gradaudit.simulation.observation import Observation

VERIFIED_SQUARED_ERROR = 1e-6
"""Relative squared error of the simulated gradient below which a solution is verified."""


def simulated_error(observation: Observation, images: Tensor, labels: Tensor | None, meter: Meter) -> float:
    """Return the relative squared error of the gradient at a solution, for one evaluation.

    Returns:
        Infinite where labels or budget are missing.
    """
    if labels is None or meter.exhausted:
        return torch.inf
    meter.spend()
    return float(relative_squared_error(observation.simulate(images, labels), observation.gradients))


def solution(
    images: Tensor, labels: Tensor | None, error: float, certified: Tensor, meter: Meter, reason: str
) -> Reconstruction:
    """Return the answer of a closed form, exact when all of its images are certified, (B,) bool."""
    return Reconstruction(
        inputs=images,
        labels=labels,
        matching_loss=error,
        evaluations=meter.evaluations,
        outcome=Outcome.EXACT if bool(certified.all()) else Outcome.CONVERGED,
        certified=certified,
        reason=reason,
    )

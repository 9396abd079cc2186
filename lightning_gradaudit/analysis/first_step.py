"""Where an attacker's first step leads: one linear solve at a grey image, against the way to the truth.

What the gradient holds and what a search finds are two questions. In a deep network the Jacobian at the truth may fix
every pixel while the one at a grey image, where a search begins, speaks of something else: the pattern of its active
units has little in common with the truth's. So the linearised problem is solved there, g* - g(x₀) ≈ J(x₀) d with the
prior's damping, and the share of ‖x - x₀‖² that lies along d is what the step is worth. A heuristic of ours and no
bound: attacks take many steps.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_gradaudit.analysis.bounds import InPixels
from lightning_gradaudit.analysis.jacobian import Jacobian
from lightning_gradaudit.analysis.priors import Prior
from lightning_gradaudit.analysis.spectrum import bidiagonalise
from lightning_gradaudit.observation import Observation

STEPS = 10  # Krylov steps of the solve; with twenty and forty the cosine was the same within 0.02 on eight networks
_DAMPING = torch.logspace(-8, 1, 19).tolist()  # relative to the largest eigenvalue
_LEAVES_SYMMETRY = 0.02  # standard deviation of the pixels' noise: a flat image may lie on a kink


@dataclass(frozen=True, eq=False)
class FirstStep:
    """What the step is worth.

    Attributes:
        share: (B,) squared cosines in [0, 1] of the step with the way to the truth; 0 where it points away.
        products: Products with the Jacobian.
    """

    share: Tensor
    products: int


def first_step(
    observation: Observation,
    truth: Tensor,
    labels: Tensor,
    shared: Tensor,
    *,
    prior: Prior,
    generator: torch.Generator,
    steps: int = STEPS,
    double: bool = False,
) -> FirstStep:
    """Solve the linearised problem at the prior's mean.

    Args:
        observation: The step; all its images begin grey together.
        truth: (B, C, H, W) model inputs.
        labels: As the training step gets them.
        shared: (p,) the gradient that the attacker holds, flat, with what noise there is.
        prior: What images look like; it damps the solve.
        generator: Draws the little noise on the grey.
        steps: Of the Krylov solver; two products each.
        double: Compute in float64.

    Returns:
        The best over dampings: the attacker is taken to know which.

    Raises:
        DoubleBackwardError: When the model has an operation without a second derivative.
        InvalidInputError: When a product is not finite.
    """
    grey = prior.mean + _LEAVES_SYMMETRY * torch.randn(truth.shape, generator=generator)
    start = observation.normalization.from_pixels(grey.to(truth))
    jacobian = Jacobian(observation, start, labels, double=double)
    linear = InPixels(jacobian, truth.shape, observation.normalization, prior)
    slope = linear.rmatvec(shared.to(jacobian.gradient) - jacobian.gradient)
    if float(slope.norm()) == 0:  # it leads nowhere
        return FirstStep(torch.zeros(len(truth)), jacobian.products)
    run = bidiagonalise(linear, slope, steps)
    largest = float(run.ritz()[0].max())
    way = (observation.normalization.to_pixels(truth.to(jacobian.dtype)) - grey.to(slope)).flatten(1)
    found = torch.stack([_cosines(linear.root(run.solve(d * largest)).reshape(way.shape), way) for d in _DAMPING])
    best = found[found.mean(1).argmax()]
    return FirstStep(best.clamp_min(0).square().float().cpu(), jacobian.products)


def _cosines(steps: Tensor, ways: Tensor) -> Tensor:
    return torch.nn.functional.cosine_similarity(steps, ways, dim=1).nan_to_num(0.0)

"""The first step of a search: one linear solve at a grey image, compared with the difference to the truth.

What the gradient holds and what a search finds are two questions. In a deep network the Jacobian at the truth may
determine every pixel, while the Jacobian at a grey image, where a search begins, differs: other units are active
there. So the linearised problem g* - g(x₀) ≈ J(x₀) d is solved at the grey image x₀, with the prior's damping. The
worth of d is its correlation with x - x₀, after the local mean is taken off both. Brightness and smooth shades make up
most of the length of x - x₀, nearly every gradient gives them, and nothing can be recognised by them. Exposure does
not count them either: SSIM compares windows less their means.

A search continues from where its first step led. `searched` estimates what several steps find, each the same share of
what the steps before left. Both are heuristics of this package and no bounds.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lightning_gradaudit.analysis.image_covariance import Prior
from lightning_gradaudit.analysis.jacobian import InPixels, Jacobian
from lightning_gradaudit.analysis.spectrum import bidiagonalise
from lightning_gradaudit.simulation.observation import Observation


@dataclass(frozen=True, kw_only=True)
class FirstStepSettings:
    """Settings of `first_step`.

    Attributes:
        krylov_steps: Of the solve; with 20 and 40 the cosine was the same within 0.02 on eight networks.
        dampings: Tried, relative to the largest eigenvalue.
        search_steps: Of `searched`; over 144 states of training 3 to 15 ranked attacks alike, and 4 is near by size.
        window_pixels: Side of the window whose means are taken off, near SSIM's.
        start_noise_std: Of the noise on the grey image's pixels, because a flat image may lie on a kink.
    """

    krylov_steps: int = 10
    dampings: tuple[float, ...] = tuple(torch.logspace(-8, 1, 19).tolist())
    search_steps: int = 4
    window_pixels: int = 7
    start_noise_std: float = 0.02


SETTINGS = FirstStepSettings()


@dataclass(frozen=True, eq=False)
class FirstStep:
    """The worth of the step.

    Attributes:
        worth: (B,) in [0, 1]: the correlation of the step with the difference to the truth, both less their means over
            the window around each pixel; 0 where it is negative.
        products: Products with the Jacobian.
    """

    worth: Tensor
    products: int


def first_step(
    observation: Observation,
    truth: Tensor,
    labels: Tensor,
    shared: Tensor,
    *,
    prior: Prior,
    generator: torch.Generator,
    steps: int = SETTINGS.krylov_steps,
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
        That of the damping whose step is worth most: the adversary is assumed to know it.

    Raises:
        DoubleBackwardError: When the model has an operation without a second derivative.
        InvalidInputError: When a product is not finite.
    """
    grey = prior.mean + SETTINGS.start_noise_std * torch.randn(truth.shape, generator=generator)
    start = observation.normalization.from_pixels(grey.to(truth))
    jacobian = Jacobian(observation, start, labels, double=double)
    linear = InPixels(jacobian, truth.shape, observation.normalization, prior)
    slope = linear.rmatvec(shared.to(jacobian.gradient) - jacobian.gradient)
    if float(slope.norm()) == 0:  # there is no step
        return FirstStep(torch.zeros(len(truth)), jacobian.products)
    run = bidiagonalise(linear, slope, steps)
    largest = float(run.ritz()[0].max())
    way = observation.normalization.to_pixels(truth.to(jacobian.dtype)) - grey.to(slope)
    taken = [linear.root(run.solve(damping * largest)).reshape(way.shape) for damping in SETTINGS.dampings]
    detail = _detail(way)
    worths = torch.stack([_cosines(_detail(step), detail) for step in taken])
    return FirstStep(worths[worths.mean(1).argmax()].clamp_min(0).float().cpu(), jacobian.products)


def searched(worth: Tensor) -> Tensor:
    """Return what a search finds whose first step is worth this much, same shape, in [0, 1]; 0 stays 0 and 1 stays 1.

    Example:
        >>> searched(torch.tensor([0.0, 0.1, 0.5, 1.0]))
        tensor([0.0000, 0.3439, 0.9375, 1.0000])
    """
    return 1 - (1 - worth) ** SETTINGS.search_steps


def _detail(images: Tensor) -> Tensor:
    """Take off each pixel the mean of the window around it, as far as it lies in the image."""
    side = SETTINGS.window_pixels
    means = nn.functional.avg_pool2d(images, side, stride=1, padding=side // 2, count_include_pad=False)
    return images - means


def _cosines(steps: Tensor, ways: Tensor) -> Tensor:
    return nn.functional.cosine_similarity(steps.flatten(1), ways.flatten(1), dim=1).nan_to_num(0.0)

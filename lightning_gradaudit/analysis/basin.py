"""How good a first guess a search needs: searches that start near the truth.

They use the truth, so they are no attacks. They measure what the ceiling does not: the gradients of two networks may
both determine the image, while a search finds it from one of them only.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812

from lightning_gradaudit.analysis.jacobian import Jacobian
from lightning_gradaudit.attacks.budget import Budget
from lightning_gradaudit.attacks.matching.gradient_matching import GradientMatching
from lightning_gradaudit.attacks.matching.objectives import CosineDistance, Objective
from lightning_gradaudit.attacks.matching.parametrizations import Pixels, Start
from lightning_gradaudit.attacks.matching.problem import MatchingProblem
from lightning_gradaudit.attacks.matching.recipes import InvertingGradients
from lightning_gradaudit.errors import InvalidInputError
from lightning_gradaudit.metrics.functional.similarity import similarity, usable_similarity
from lightning_gradaudit.simulation.observation import Observation
from lightning_gradaudit.simulation.snapshot import Snapshot

MID_GREY, CONTRAST = 0.5, 0.25
"""Mean and standard deviation of the pixels of a typical photograph, in [0, 1]."""


@dataclass(frozen=True, kw_only=True, eq=False)
class WarmStart(Start):
    """Start at sqrt(1 - a²) x + a n: the truth, faded and under noise, in units in which both have one variance.

    Pixels count from mid-grey in units of 0.25, a photograph's contrast; what leaves [0, 1] is cut off.

    Args:
        pixels: (B, C, H, W) the truth, in [0, 1].
        amount: a in [0, 1]: 0 is the truth itself, 1 noise alone.
    """

    pixels: Tensor
    amount: float

    def __post_init__(self) -> None:
        if not 0 <= self.amount <= 1:
            raise InvalidInputError(f"amount must lie in [0, 1], got {self.amount!r}.")

    def __call__(self, observation: Observation, generator: torch.Generator) -> Tensor:
        noise = torch.randn(observation.shape, generator=generator).to(observation.device)
        signal = (self.pixels.to(observation.device) - MID_GREY) / CONTRAST
        mixed = math.sqrt(1 - self.amount**2) * signal + self.amount * noise
        return observation.normalization.from_pixels((MID_GREY + CONTRAST * mixed).clamp(0, 1))


@dataclass(frozen=True, kw_only=True, eq=False)
class Basin:
    """What searches made of starts at growing distance from the truth.

    Attributes:
        amounts: (K,) share a of noise in the start.
        initial, final: (K, B) similarity to the truth before and after, in [0, 1].
        measure: "ssim" or "nmse".
        evaluations: Simulated gradients of all searches together.
        assumption: What was known.
    """

    amounts: tuple[float, ...]
    initial: Tensor
    final: Tensor
    measure: str
    evaluations: int
    assumption: str

    @property
    def gain(self) -> Tensor:
        """(K,) final minus initial similarity, means over the batch: > 0 where the search goes towards the truth.

        A start nearer than the attack's steps are long loses at first, whatever the network: read the far ones.
        """
        return (self.final - self.initial).mean(1)

    def reach(self, level: float = 0.5) -> float:
        """Return the largest amount of noise from which a search ends, on average, at `level` similarity; 0: none.

        1 means that the attacker needs no prior at all.
        """
        ends = zip(self.amounts, self.final.mean(1).tolist(), strict=True)
        return max((amount for amount, end in ends if end >= level), default=0.0)


def basin(
    snapshot: Snapshot,
    *,
    attack: GradientMatching | None = None,
    amounts: Sequence[float] = (0.3, 0.5, 0.7, 0.9),
    budget: Budget = Budget(evaluations=100),  # noqa: B008 - immutable
    seed: int = 0,
) -> Basin:
    """Start a search near the truth, at several distances, and see whether it comes closer.

    All images of the batch are searched for at once; each amount of noise is a search of its own, since the gradient
    of a batch is one.

    Args:
        attack: A matching attack over pixels; None: Inverting Gradients.
        amounts: See `WarmStart`.
        budget: Of each search.

    Raises:
        InvalidInputError: When the attack does not search over pixels.
    """
    attack = InvertingGradients() if attack is None else attack
    if not isinstance(attack, GradientMatching) or not isinstance(attack.parametrization, Pixels):
        raise InvalidInputError(f"attack: expected a GradientMatching over Pixels, got {attack!r}.")
    observation = replace(snapshot.observation, labels=snapshot.truth.labels)
    truth = snapshot.truth_pixels
    measure = usable_similarity("ssim", *truth.shape[-2:])
    initial: list[Tensor] = []
    final: list[Tensor] = []
    spent = 0
    for amount in amounts:
        start = WarmStart(pixels=truth, amount=amount)
        begun = start(observation, torch.Generator().manual_seed(seed))
        warm = replace(attack, parametrization=replace(attack.parametrization, initial=start))
        result = warm(observation, budget=budget, generator=torch.Generator().manual_seed(seed))
        spent += result.evaluations
        for images, kept in ((begun, initial), (result.inputs, final)):
            pixels = observation.normalization.to_pixels(images.float()).clamp(0, 1).nan_to_num(0.5)
            kept.append(similarity(pixels, truth, measure).cpu())
    return Basin(
        amounts=tuple(amounts),
        initial=torch.stack(initial),
        final=torch.stack(final),
        measure=measure,
        evaluations=spent,
        assumption=f"{attack.name}, {budget.evaluations} evaluations a start; labels, mode and the start are given",
    )


@dataclass(frozen=True, kw_only=True)
class DescentAlignment:
    """Whether the first step of a search points at the truth, and how straight the way is; means over starts.

    Attributes:
        cosine: Of the step along the gradient's sign with the way back, averaged over images, in [-1, 1].
        linearity: Of the gradient along that way: the cosine of g(x') - g(x) with J (x' - x), in [-1, 1].
        evaluations, products: Simulated gradients and products with J.
        assumption: What was known.
    """

    cosine: float
    linearity: float
    evaluations: int
    products: int
    assumption: str = "labels and mode are known; starts are the truth, faded and under noise"

    @property
    def score(self) -> float:
        """Their product; 0 where either points away."""
        return max(self.cosine, 0.0) * max(self.linearity, 0.0)


def descent_alignment(
    snapshot: Snapshot,
    *,
    objective: Objective | None = None,
    amounts: Sequence[float] = (0.5, 0.9),
    seed: int = 0,
) -> DescentAlignment:
    """Look at the first step from starts near the truth: the price of two gradients and a product for each.

    A heuristic and no bound: it says whether signed descent sets off in the right direction.

    Args:
        objective: Distance between gradients; None: the cosine distance.
        amounts: See `WarmStart`.
    """
    observation = replace(snapshot.observation, labels=snapshot.truth.labels)
    truth, labels = snapshot.truth.inputs, snapshot.truth.labels
    evaluation = MatchingProblem(observation, CosineDistance() if objective is None else objective)
    jacobian = Jacobian(observation, truth, labels)
    cosines, linearities = [], []
    for amount in amounts:
        warm = WarmStart(pixels=snapshot.truth_pixels, amount=amount)
        start = warm(observation, torch.Generator().manual_seed(seed)).to(truth)
        step = -evaluation(start, labels).inputs_gradient.sign()
        cosines.append(float(F.cosine_similarity(step.flatten(1), (truth - start).flatten(1), dim=1).mean()))
        there = observation.simulate(start, labels)
        moved = torch.cat([there[name].reshape(-1) for name in jacobian.names]) - jacobian.gradient
        linearities.append(float(F.cosine_similarity(moved, jacobian.matvec((start - truth).reshape(-1)), dim=0)))
    return DescentAlignment(
        cosine=sum(cosines) / len(cosines),
        linearity=sum(linearities) / len(linearities),
        evaluations=2 * len(cosines),
        products=jacobian.products,
    )

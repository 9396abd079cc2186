"""What an attack returns."""

from __future__ import annotations

import enum
import math
from dataclasses import dataclass, field

import torch
from torch import Tensor

from lightning_gradaudit.simulation.observation import Observation


class Outcome(str, enum.Enum):
    """How an attack ended. Divergence is a value here; misuse is an exception."""

    EXACT = "exact"  # an algebraic solution, verified without the truth
    CONVERGED = "converged"
    BUDGET_SPENT = "budget_spent"
    NONFINITE = "nonfinite"
    NOT_APPLICABLE = "not_applicable"

    def __str__(self) -> str:
        return self.value


@dataclass(frozen=True, kw_only=True, eq=False)
class Reconstruction:
    """The adversary's guess at the batch.

    Attributes:
        inputs: (B, C, H, W) in the model's input space; order is arbitrary.
        labels: (B,) class indices in the same order, (B, classes) probabilities, or None.
        matching_loss: Relative squared error ‖g' - g‖² / ‖g‖² of the gradient at this guess, >= 0; infinite when
            there is none. The same for every attack, so that the adversary can choose between them.
        evaluations: Simulated gradients spent: the adversary's effort.
        outcome: How it ended.
        attack: Which attack made it.
        reason: What decided: why it does not apply, or how it ended.
        details: What other attacks of a portfolio did, or why they do not apply.
        certified: (B,) whether the adversary knows, without the truth, that the image is exact.
        trajectory: (evaluations spent, objective) pairs along the best run.
        path: (evaluations spent, images) pairs along the best run, a few dozen at most: the best candidate at each of
            these times, on the CPU. The auditor computes from it how soon an image was exposed.
    """

    inputs: Tensor
    labels: Tensor | None
    matching_loss: float
    evaluations: int
    outcome: Outcome
    attack: str = ""
    reason: str = ""
    details: str = ""
    certified: Tensor | None = None
    trajectory: tuple[tuple[int, float], ...] = field(default=(), repr=False)
    path: tuple[tuple[int, Tensor], ...] = field(default=(), repr=False)

    @classmethod
    def not_applicable(cls, observation: Observation, reason: str, *, evaluations: int = 0) -> Reconstruction:
        """Return the result of an attack that does not apply: a batch of mid-grey, and the reason."""
        grey = torch.full(observation.shape, 0.5, device=observation.device)
        return cls(
            inputs=observation.normalization.from_pixels(grey),
            labels=observation.labels,
            matching_loss=math.inf,
            evaluations=evaluations,
            outcome=Outcome.NOT_APPLICABLE,
            reason=reason,
        )

"""Optimizers of the candidates and the schedules of their learning rates."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

_FUSED_DEVICES = ("cpu", "cuda")  # where every supported version of torch has Adam's step as one kernel
_INITIAL_GRADIENT_NORM = 1e3  # that L-BFGS starts with


class Schedule(ABC):
    """A factor on the learning rate as a function of the share of the budget that is spent."""

    @abstractmethod
    def __call__(self, progress: float) -> float:
        """Return the factor, >= 0, at a progress in [0, 1]."""


@dataclass(frozen=True, kw_only=True)
class StepDecay(Schedule):
    """Multiply by `gamma` at each milestone (shares of the budget); no milestones: a constant rate."""

    milestones: tuple[float, ...] = (3 / 8, 5 / 8, 7 / 8)
    gamma: float = 0.1

    def __call__(self, progress: float) -> float:
        return float(self.gamma ** sum(progress >= m for m in self.milestones))


@dataclass(frozen=True, kw_only=True)
class CosineDecay(Schedule):
    """Rise linearly over a warm-up (a share of the budget), then fall to 0 along half a cosine."""

    warmup: float = 0.0

    def __call__(self, progress: float) -> float:
        if progress < self.warmup:
            return max(progress / self.warmup, 1e-2)
        return 0.5 * (1 + math.cos(math.pi * (progress - self.warmup) / (1 - self.warmup)))


class Optimizer(ABC):
    """Settings of a torch optimizer for the variables of a candidate."""

    @property
    def exact(self) -> bool:
        """Whether it needs exact gradients, as an optimizer does that compares them with each other."""
        return True

    @abstractmethod
    def build(self, variables: list[Tensor]) -> torch.optim.Optimizer:
        """Make the torch optimizer."""

    def learning_rate(self, progress: float) -> float | None:
        """Return the learning rate at a share of the budget in [0, 1]; None: do not change it."""
        return None

    def transform(self, gradient: Tensor, progress: float) -> Tensor:
        """Change a variable's gradient before the step."""
        return gradient

    def scale(self, gradients: list[Tensor]) -> Tensor | None:
        """Return a factor on the loss for the cycle that starts with these gradients; None: 1."""
        return None

    def stalled(self, evaluations: int) -> bool:
        """Tell from the number of evaluations in one step whether further steps would change nothing."""
        return evaluations == 0


@dataclass(frozen=True, kw_only=True)
class Adam(Optimizer):
    """Adam, on the gradient or on its sign (Geiping et al., arXiv:2003.14053).

    Args:
        lr: Learning rate in units of the variables: of the model's normalised input for pixels.
        signed: Use the gradient's sign; "soft": tanh(s ∇)/s with s = 1 - progress, which becomes the gradient itself
            towards the end.
        schedule: Factor on the rate over the budget.
    """

    lr: float = 0.1
    signed: bool | Literal["soft"] = False
    schedule: Schedule = StepDecay()

    @property
    def exact(self) -> bool:
        return False

    def build(self, variables: list[Tensor]) -> torch.optim.Optimizer:
        fused = all(v.device.type in _FUSED_DEVICES for v in variables) or None  # None: torch decides
        return torch.optim.Adam(variables, lr=self.lr, fused=fused)

    def learning_rate(self, progress: float) -> float:
        return self.lr * self.schedule(progress)

    def transform(self, gradient: Tensor, progress: float) -> Tensor:
        if self.signed == "soft":
            sharpness = max(1 - progress, 1e-3)
            return (gradient * sharpness).tanh() / sharpness
        return gradient.sign() if self.signed else gradient


@dataclass(frozen=True, kw_only=True)
class LBFGS(Optimizer):
    """L-BFGS, up to 20 iterations and 25 evaluations a step.

    Args:
        lr: Length of a step, or of the line search's first trial.
        history: Pairs kept.
        line_search: None as in DLG's published setting; with "strong_wolfe" fewer starts diverge.
    """

    lr: float = 1.0
    history: int = 100
    line_search: Literal["strong_wolfe"] | None = None

    def build(self, variables: list[Tensor]) -> torch.optim.Optimizer:
        # The tolerances are absolute and the objective may be tiny, so the loop decides when to stop.
        return torch.optim.LBFGS(
            variables,
            lr=self.lr,
            history_size=self.history,
            line_search_fn=self.line_search,
            max_iter=20,
            tolerance_grad=0.0,
            tolerance_change=0.0,
        )

    def scale(self, gradients: list[Tensor]) -> Tensor | None:
        if self.line_search is None:  # as published
            return None
        # torch drops pairs with yᵀs <= 1e-10, which an objective as small as a squared gradient never exceeds.
        return _INITIAL_GRADIENT_NORM / torch.stack([g.norm() for g in gradients]).norm().clamp_min(1e-30)

    def stalled(self, evaluations: int) -> bool:
        return evaluations <= 1  # the step's first evaluation only repeats the last point

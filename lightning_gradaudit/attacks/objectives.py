"""Matching objectives: how far a simulated gradient lies from the observed one."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_gradaudit.defences import Tensors


def _dot(a: Tensors, b: Tensors) -> Tensor:
    return torch.stack([(a[name] * b[name]).sum() for name in b]).sum()


class Objective(ABC):
    """A differentiable distance between two gradients."""

    @abstractmethod
    def __call__(self, simulated: Tensors, observed: Tensors) -> Tensor:
        """Return a scalar >= 0 that is 0 when both are equal."""


@dataclass(frozen=True)
class CosineDistance(Objective):
    """1 - cos(g', g) over all tensors jointly, in [0, 2] (Geiping et al., arXiv:2003.14053)."""

    def __call__(self, simulated: Tensors, observed: Tensors) -> Tensor:
        # Root before product: late in training squares of squares would underflow.
        norm = _dot(simulated, simulated).clamp_min(1e-36).sqrt() * _dot(observed, observed).clamp_min(1e-36).sqrt()
        return 1 - _dot(simulated, observed) / norm


@dataclass(frozen=True)
class SquaredError(Objective):
    """‖g' - g‖², the objective of deep leakage from gradients (Zhu et al., arXiv:1906.08935).

    Args:
        scale: Factor on the sum; 1 as published.
    """

    scale: float = 1.0

    def __call__(self, simulated: Tensors, observed: Tensors) -> Tensor:
        terms = [((simulated[name] - observed[name]) ** 2).sum() for name in observed]
        return self.scale * torch.stack(terms).sum()


def relative_squared_error(simulated: Tensors, observed: Tensors) -> Tensor:
    """Return ‖g' - g‖² / ‖g‖², the common scale on which attacks are compared, a scalar >= 0."""
    return SquaredError()(simulated, observed) / _dot(observed, observed).clamp_min(1e-30)

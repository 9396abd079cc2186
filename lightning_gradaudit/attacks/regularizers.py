"""What an attacker knows about images in general."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

from torch import Tensor


class Regularizer(ABC):
    """A differentiable penalty on candidate images."""

    @abstractmethod
    def __call__(self, inputs: Tensor) -> Tensor:
        """Return a scalar >= 0 for candidates (B, C, H, W) in the model's input space."""


@dataclass(frozen=True, kw_only=True)
class TotalVariation(Regularizer):
    """Mean absolute difference of neighbouring pixels, for any number of channels (anisotropic TV).

    Args:
        weight: Published settings range from 1e-6 to 1e-1 with the cosine objective.
    """

    weight: float = 1e-2

    def __call__(self, inputs: Tensor) -> Tensor:
        rows = (inputs[..., 1:, :] - inputs[..., :-1, :]).abs().mean()
        columns = (inputs[..., :, 1:] - inputs[..., :, :-1]).abs().mean()
        return self.weight * (rows + columns)

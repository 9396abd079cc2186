"""How pixels become the inputs of a model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_gradaudit.errors import InvalidInputError


@dataclass(frozen=True)
class Normalization:
    """The public affine map between pixels in [0, 1] and the model's input space, per channel.

    Attributes:
        mean, std: One value per channel, or a single one for all; `input = (pixel - mean) / std`.
    """

    mean: tuple[float, ...] = (0.0,)
    std: tuple[float, ...] = (1.0,)

    @classmethod
    def of(cls, mean: float | Sequence[float] | None, std: float | Sequence[float] | None) -> Normalization:
        """Build from what users write: a number, a sequence, or None for the identity."""
        return cls(_floats(mean, 0.0), _floats(std, 1.0))

    def __post_init__(self) -> None:
        if any(not s > 0 for s in self.std):
            raise InvalidInputError(f"std: every channel's standard deviation must be > 0, got {self.std}.")

    def to_pixels(self, inputs: Tensor) -> Tensor:
        """Map model inputs (..., C, H, W) to pixels, without clipping."""
        return inputs * self._column(self.std, inputs) + self._column(self.mean, inputs)

    def from_pixels(self, pixels: Tensor) -> Tensor:
        """Map pixels (..., C, H, W) to model inputs."""
        return (pixels - self._column(self.mean, pixels)) / self._column(self.std, pixels)

    @staticmethod
    def _column(values: tuple[float, ...], like: Tensor) -> Tensor:
        channels = like.shape[-3]
        if len(values) not in (1, channels):
            raise InvalidInputError(
                f"mean/std: expected 1 or {channels} values (the images have {channels} channels), got {len(values)}."
            )
        return torch.tensor(values, dtype=like.dtype, device=like.device).reshape(-1, 1, 1)


def _floats(value: float | Sequence[float] | Tensor | None, default: float) -> tuple[float, ...]:
    if value is None:
        return (default,)
    return tuple(torch.as_tensor(value, dtype=torch.float64).reshape(-1).tolist())

"""How pixels become the inputs of a model."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_gradaudit.errors import InvalidInputError

_LEAST_WIDTH, _MOST_WIDTH = 1 / 16, 16.0  # of the pixel range in model inputs; that of normalised images is within


@dataclass(frozen=True)
class Normalization:
    """The public affine map between pixels in [0, 1] and the model's input space, per channel.

    Attributes:
        mean, std: One value per channel, or a single one for all; `input = (pixel - mean) / std`.
    """

    mean: tuple[float, ...] = (0.0,)
    std: tuple[float, ...] = (1.0,)

    @classmethod
    def of_batch(
        cls, mean: float | Sequence[float] | None, std: float | Sequence[float] | None, dtype: torch.dtype
    ) -> Normalization:
        """Build from what users write about a batch of this type: bytes about which they say nothing are pixels."""
        bare = mean is None and std is None and dtype == torch.uint8
        return cls.of(0.0, 1 / 255) if bare else cls.of(mean, std)

    @classmethod
    def of(cls, mean: float | Sequence[float] | None, std: float | Sequence[float] | None) -> Normalization:
        """Build from what users write: a number, a sequence, or None for the identity."""
        return cls(_floats(mean, 0.0), _floats(std, 1.0))

    def __post_init__(self) -> None:
        if any(not s > 0 for s in self.std):
            raise InvalidInputError(f"std: every channel's standard deviation must be > 0, got {self.std}.")

    @property
    def unit(self) -> float:
        """A power of two near the width of the pixel range in model inputs where that is far from 1, else 1.

        Attacks are made for inputs that span a few units: their step sizes, starts and penalties would be 255 times too
        small or too large for images in [0, 255]. Divided by the unit these are images that attacks are made for, and
        a division by a power of two changes no digit.
        """
        width = len(self.std) / sum(self.std)
        return 1.0 if _LEAST_WIDTH <= width <= _MOST_WIDTH else 2.0 ** round(math.log2(width))

    def in_units(self, unit: float) -> Normalization:
        """Return the map between pixels and model inputs divided by `unit`."""
        return self if unit == 1 else Normalization(self.mean, tuple(s * unit for s in self.std))

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

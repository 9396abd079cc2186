"""What is known of an image before any gradient: covariances of pixels, applied without being built."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from lightning_gradaudit.errors import InvalidInputError

PIXEL_VARIANCE = 0.06
"""Variance of a pixel in [0, 1] over natural images, all positions and channels together."""


class Prior(ABC):
    """A Gaussian over images in pixel space, in [0, 1], independent between the images of a batch."""

    mean: float = 0.5

    @abstractmethod
    def root(self, images: Tensor) -> Tensor:
        """Apply the symmetric square root of the covariance to images (B, C, H, W)."""


@dataclass(frozen=True, kw_only=True)
class WhitePixels(Prior):
    """Independent pixels of one variance: an attacker who knows nothing of what images look like.

    Args:
        variance: Of a pixel in [0, 1].
    """

    variance: float = PIXEL_VARIANCE

    def __post_init__(self) -> None:
        _check(self.variance)

    def root(self, images: Tensor) -> Tensor:
        return images * math.sqrt(self.variance)


@dataclass(frozen=True, kw_only=True)
class NaturalImages(Prior):
    """A power law over spatial frequency, the same for every channel up to their common part.

    The power of natural images falls with frequency as 1/f² (Field, 1987; Ruderman, 1994). Here frequencies are those
    of the cosine transform, f = sqrt(i² + j²) cycles per two image widths, and the power is 1/(1 + f)^exponent, so
    that the image's mean has a finite share. Channels of colour images are correlated.

    Args:
        variance: Of a pixel in [0, 1], on average over the image.
        exponent: Of the power's fall with frequency.
        correlation: Between channels, in [0, 1).
    """

    variance: float = PIXEL_VARIANCE
    exponent: float = 2.0
    correlation: float = 0.9

    def __post_init__(self) -> None:
        _check(self.variance)
        if not 0 <= self.correlation < 1 or self.exponent < 0:
            raise InvalidInputError(
                f"NaturalImages: expected correlation in [0, 1) and exponent >= 0, got {self.correlation!r} and "
                f"{self.exponent!r}."
            )

    def root(self, images: Tensor) -> Tensor:
        channels, height, width = images.shape[-3:]
        rows, columns = (_cosines(side, images.dtype, images.device) for side in (height, width))
        amplitude = _amplitude(height, width, self.exponent, images.dtype, images.device)
        filtered = rows.T @ ((rows @ images @ columns.T) * (amplitude * math.sqrt(self.variance))) @ columns
        # A matrix of ones off by a multiple of the identity: its root is known in closed form.
        common = filtered.mean(-3, keepdim=True)
        shared = math.sqrt(1 + (channels - 1) * self.correlation)
        return math.sqrt(1 - self.correlation if channels > 1 else 1.0) * (filtered - common) + shared * common


@lru_cache(maxsize=16)
def _cosines(size: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return the orthonormal type-II cosine transform, (size, size)."""
    k = torch.arange(size, dtype=torch.float64)
    matrix = torch.cos(math.pi * (k + 0.5) * k[:, None] / size) * math.sqrt(2 / size)
    matrix[0] /= math.sqrt(2)
    return matrix.to(device, dtype)


@lru_cache(maxsize=16)
def _amplitude(height: int, width: int, exponent: float, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return the spectrum's amplitude at each frequency, (height, width); its square has mean 1."""
    squares = (torch.arange(height)[:, None] ** 2 + torch.arange(width) ** 2).double()
    power = (1 + squares.sqrt()) ** -exponent
    return (power / power.mean()).sqrt().to(device, dtype)


def _check(variance: float) -> None:
    if not variance > 0:
        raise InvalidInputError(f"variance must be > 0, got {variance!r}.")

"""Exposure: how much closer to a copy than to a guess a reconstruction comes."""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_gradaudit.errors import InvalidInputError

LEAST_ROOM = 1e-6
"""Distance of the null from a copy below which there is nothing left to give away."""


def exposure(similarity: Tensor, null: Tensor) -> Tensor:
    """Return clip((s - n) / (1 - n), 0, 1) for each image.

    Args:
        similarity: Similarity s of each reconstruction to its true image, in [0, 1].
        null: Best similarity n that a guess without this gradient reaches, in [0, 1].

    Returns:
        Same shape, in [0, 1]: 0 when the gradient gives nothing beyond a guess, 1 for a copy.

    Example:
        >>> exposure(torch.tensor([0.2, 0.7, 1.0]), torch.tensor([0.4, 0.4, 0.4]))
        tensor([0.0000, 0.5000, 1.0000])
    """
    if similarity.shape != null.shape:
        raise InvalidInputError(
            f"similarity and null must have one shape, got {tuple(similarity.shape)} and {tuple(null.shape)}."
        )
    # An image that a guess already copies (n = 1) has nothing left to give away, whatever s is.
    gain = (similarity - null) / (1 - null).clamp_min(LEAST_ROOM)
    return torch.where(1 - null > LEAST_ROOM, gain, torch.zeros_like(gain)).clamp(0, 1)

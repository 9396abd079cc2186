"""Similarity and errors of two gradients, and accuracy of recovered labels."""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_gradaudit.errors import InvalidInputError
from lightning_gradaudit.utils.tensors import TINY, Tensors, global_norm, sum_of_squares


def gradient_similarity(preds: Tensors, target: Tensors) -> Tensor:
    """Return the cosine of two gradients over all tensors jointly, a scalar in [-1, 1].

    Example:
        >>> gradient_similarity({"w": torch.tensor([1.0, 0.0])}, {"w": torch.tensor([1.0, 1.0])})
        tensor(0.7071)
    """
    if set(preds) != set(target):
        raise InvalidInputError(
            f"preds and target must name the same parameters; differing: {sorted(set(preds) ^ set(target))[:3]}."
        )
    dot = torch.stack([(preds[name] * t).sum() for name, t in target.items()]).sum()
    return dot / (global_norm(preds) * global_norm(target)).clamp_min(TINY)


def relative_squared_error(preds: Tensors, target: Tensors) -> Tensor:
    """Return ‖g' - g‖² / ‖g‖² of gradients g' and g, a scalar >= 0: the common scale on which attacks are compared."""
    residual = {name: preds[name] - t for name, t in target.items()}
    return sum_of_squares(residual) / sum_of_squares(target).clamp_min(TINY)


def scale_free_error(preds: Tensors, target: Tensors) -> Tensor:
    """Return the relative squared error for the best factor, min over a >= 0 of ‖a g' - g‖² / ‖g‖², in [0, 1].

    It compares attacks that match directions with attacks that match vectors.
    """
    sizes = [global_norm(gradient).clamp_min(TINY) for gradient in (preds, target)]
    # 1 - cosine, as half the squared distance of the unit vectors: without the cancellation near 0.
    distance = 0.5 * sum_of_squares({name: preds[name] / sizes[0] - t / sizes[1] for name, t in target.items()})
    cosine = (1 - distance).clamp_min(0)
    return torch.where(cosine > 0, distance * (1 + cosine), torch.ones_like(distance))


def label_multiset_accuracy(preds: Tensor, target: Tensor) -> Tensor:
    """Return the share of labels recovered as a multiset (order is not observable), a scalar in [0, 1].

    Example:
        >>> label_multiset_accuracy(torch.tensor([2, 2, 0]), torch.tensor([0, 2, 1]))
        tensor(0.6667)
    """
    if preds.shape != target.shape or preds.ndim != 1:
        raise InvalidInputError(
            f"preds and target must be (B,) class indices, got {tuple(preds.shape)} and {tuple(target.shape)}."
        )
    low, high = torch.cat([preds, target]).aminmax()  # ignored labels are negative
    length = int(high - low) + 1
    shared = torch.minimum(
        torch.bincount(preds - low, minlength=length), torch.bincount(target - low, minlength=length)
    )
    return shared.sum() / len(target)

"""Similarity of two gradients, and accuracy of recovered labels."""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_gradaudit.errors import InvalidInputError
from lightning_gradaudit.utils.tensors import Tensors, global_norm


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
    return dot / (global_norm(preds) * global_norm(target)).clamp_min(1e-30)


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

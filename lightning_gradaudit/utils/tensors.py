"""Tensors keyed by parameter name."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

TINY = 1e-30


def sum_of_squares(tensors: Tensors) -> Tensor:
    """Return the sum of the squares of all coordinates, a scalar."""
    return torch.stack([(t * t).sum() for t in tensors.values()]).sum()


Tensors = Mapping[str, Tensor]
"""Tensors keyed by parameter name."""


def global_norm(tensors: Tensors) -> Tensor:
    """Return the Euclidean norm over all tensors together, a scalar in the tensors' dtype."""
    return torch.linalg.vector_norm(torch.stack([torch.linalg.vector_norm(t) for t in tensors.values()]))

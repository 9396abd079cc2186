"""Tensors keyed by parameter name."""

from __future__ import annotations

import math
from collections.abc import Mapping
from enum import Enum
from typing import Any

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


def plain_json(value: Any) -> Any:
    """Return a value as plain JSON: tensors and tuples as lists, enumerations by their value, not finite as None."""
    if isinstance(value, Tensor):
        value = value.tolist()
    if isinstance(value, Enum):
        return value.value
    if hasattr(value, "to_dict"):
        return value.to_dict()
    if isinstance(value, Mapping):
        return {key: plain_json(v) for key, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain_json(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value

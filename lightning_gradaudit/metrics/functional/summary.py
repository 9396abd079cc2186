"""One figure for many images."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from lightning_gradaudit.errors import InvalidInputError

Statistic = Literal["worst", "p90", "mean"]


def check_statistic(statistic: Statistic) -> None:
    """Refuse what `summary` does not know."""
    if statistic not in ("worst", "p90", "mean"):
        raise InvalidInputError(f"statistic must be 'worst', 'p90' or 'mean', got {statistic!r}.")


def summary(values: Tensor, statistic: Statistic) -> Tensor:
    """Reduce values (N,) to their maximum, 90th percentile (rounded up to an observed one) or mean; NaN if empty.

    Example:
        >>> summary(torch.tensor([0.1, 0.2, 0.9]), "worst")
        tensor(0.9000)
    """
    check_statistic(statistic)
    if not len(values):
        return values.new_tensor(torch.nan)
    if statistic == "worst":
        return values.max()
    if statistic == "p90":
        return values.quantile(0.9, interpolation="higher")
    return values.mean()

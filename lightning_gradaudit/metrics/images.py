"""What metrics over audited images have in common."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.utilities import dim_zero_cat

from lightning_gradaudit.metrics.functional.summary import Statistic, check_statistic, summary


class ImageMetric(Metric):
    """A statistic of one value for each image.

    Args:
        statistic: "worst", "p90" or "mean" (see `functional.summary`).
    """

    is_differentiable = False
    full_state_update = False
    values: list[Tensor]

    def __init__(self, statistic: Statistic, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        check_statistic(statistic)
        self.statistic = statistic
        self.add_state("values", default=[], dist_reduce_fx="cat")

    def compute(self) -> Tensor:
        """Return the statistic, a scalar; NaN without any image."""
        # A list of tensors, and one tensor once processes were gathered: `len` serves both.
        values = dim_zero_cat(self.values) if len(self.values) else torch.empty(0, device=self.device)
        return summary(values, self.statistic)

    def plot(self, val: Tensor | Sequence[Tensor] | None = None, ax: Any = None) -> Any:
        """Plot one value or a sequence of them; needs matplotlib."""
        return self._plot(val, ax)

"""What the metrics have in common."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.utilities import dim_zero_cat

from lightning_gradaudit.metrics.functional.summary import Statistic, check_statistic, summary


class LeakageMetric(Metric):
    """A metric of what leaked: not differentiable, updated without the whole state, and with a plot."""

    is_differentiable = False
    full_state_update = False

    def plot(self, val: Tensor | Sequence[Tensor] | None = None, ax: Any = None) -> Any:
        """Plot one value or a sequence of them; needs matplotlib."""
        return self._plot(val, ax)


class ImageMetric(LeakageMetric):
    """A statistic of one value for each image; a subclass names its own `default_statistic`.

    Args:
        statistic: "worst", "p90" or "mean" (see `functional.summary`); None: the default.
    """

    default_statistic: ClassVar[Statistic] = "worst"
    values: list[Tensor]

    def __init__(self, statistic: Statistic | None = None, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.statistic: Statistic = self.default_statistic if statistic is None else statistic
        check_statistic(self.statistic)
        self.add_state("values", default=[], dist_reduce_fx="cat")

    def compute(self) -> Tensor:
        """Return the statistic, a scalar; NaN without any image."""
        # A list of tensors, and one tensor once processes were gathered: `len` serves both.
        values = dim_zero_cat(self.values) if len(self.values) else torch.empty(0, device=self.device)
        return summary(values, self.statistic)

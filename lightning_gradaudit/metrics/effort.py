"""Effort as a torchmetrics metric."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torchmetrics.utilities import dim_zero_cat

from lightning_gradaudit.metrics.base import LeakageMetric
from lightning_gradaudit.metrics.functional.effort import bound_of, observed, quantile_of


class Effort(LeakageMetric):
    """Simulated gradients after which a share of the images is exposed, by the Kaplan-Meier estimate.

    Images that no budget exposed count for as long as they were attacked (see `functional.effort_quantile`). Where the
    result is infinite the effort is more than `more_than`.

    Args:
        share: In [0, 1]; 0.5 (default): the median image, 0: the first.

    Example:
        >>> metric = Effort()
        >>> metric.update(torch.tensor([20.0, 50.0]), spent=100)
        >>> metric.update(torch.tensor([torch.inf, torch.inf]), spent=400)
        >>> metric.compute(), metric.more_than
        (tensor(50.), tensor(400.))
        >>> metric.update(torch.tensor([torch.inf]), spent=400)
        >>> metric.compute()
        tensor(inf)
    """

    higher_is_better = True
    plot_lower_bound = 0.0
    time: list[Tensor]
    exposed: list[Tensor]

    def __init__(self, share: float = 0.5, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        quantile_of(torch.empty(0), torch.empty(0), share)
        self.share = share
        self.add_state("time", default=[], dist_reduce_fx="cat")
        self.add_state("exposed", default=[], dist_reduce_fx="cat")

    def update(self, effort: Tensor, spent: Tensor | float) -> None:
        """Add images.

        Args:
            effort: (B,) evaluations after which each was exposed, as `AuditRecord.effort`: infinite where it never
                was, NaN where that was not measured. All for one exposure.
            spent: Evaluations the images were attacked for, a number or (B,), as `AuditRecord.followed`.
        """
        time, exposed = observed(effort, spent)
        self.time.append(time.float())
        self.exposed.append(exposed)

    def compute(self) -> Tensor:
        """Return the evaluations, a scalar; infinite when too few images were exposed, NaN without any."""
        if not len(self.time):
            return torch.tensor(torch.nan, device=self.device)
        return quantile_of(dim_zero_cat(self.time), dim_zero_cat(self.exposed), self.share)

    @property
    def more_than(self) -> Tensor:
        """What an infinite result is estimated to exceed (`functional.effort_more_than`); of this process alone."""
        return bound_of(dim_zero_cat(self.time) if len(self.time) else torch.empty(0, device=self.device), self.share)

"""Effort over many images, some of which no budget reached: survival analysis with right censoring."""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_gradaudit.errors import InvalidInputError

ROUNDING = 1e-12
"""Of a product of shares."""


def observed(effort: Tensor, spent: Tensor | float) -> tuple[Tensor, Tensor]:
    """Return how long each image was followed, and whether it was exposed at the end of that time, (N,) each.

    Images whose effort is NaN, which were not measured, are left out.

    Raises:
        InvalidInputError: When an effort is negative or larger than what was spent.
    """
    if effort.ndim != 1:
        raise InvalidInputError(f"effort: expected one value for each image, (N,), got {tuple(effort.shape)}.")
    effort = effort.detach().double()
    limit = torch.as_tensor(spent, dtype=torch.float64, device=effort.device)
    if limit.shape not in (torch.Size([]), effort.shape):
        raise InvalidInputError(f"spent: expected a number or {tuple(effort.shape)}, got {tuple(limit.shape)}.")
    measured = ~effort.isnan()
    effort, limit = effort[measured], limit.expand(measured.shape)[measured]
    exposed = effort.isfinite()
    if bool((limit.isnan() | (limit < 0) | (effort < 0) | (exposed & (effort > limit))).any()):
        raise InvalidInputError(
            f"effort: expected values in [0, spent], or infinity where the image was not exposed, got "
            f"{effort.tolist()} with {limit.tolist()} spent."
        )
    return torch.minimum(effort, limit), exposed


def share_of(time: Tensor, exposed: Tensor) -> tuple[Tensor, Tensor]:
    """Return the Kaplan-Meier curve of what `observed` returns: times and the share exposed from each on, (T,)."""
    times = time[exposed].unique()
    left = (time >= times[:, None]).sum(1)
    fallen = ((time == times[:, None]) & exposed).sum(1)
    return times, 1 - (1 - fallen.double() / left).cumprod(0)


def exposed_share(effort: Tensor, spent: Tensor | float) -> tuple[Tensor, Tensor]:
    """Return after how many evaluations which share of the images is exposed; arguments as in `effort_quantile`.

    Returns:
        Evaluations, rising, (T,), and the share in [0, 1] exposed from each on, (T,): a curve in steps from 0.

    Example:
        >>> times, share = exposed_share(torch.tensor([20.0, 50.0, torch.inf, torch.inf]), 100)
        >>> times.tolist(), share.tolist()
        ([20.0, 50.0], [0.25, 0.5])
    """
    return share_of(*observed(effort, spent))


def quantile_of(time: Tensor, exposed: Tensor, share: float) -> Tensor:
    """Return the Kaplan-Meier quantile of what `observed` returns, a scalar."""
    if not 0 <= share <= 1:
        raise InvalidInputError(f"share must lie in [0, 1], got {share!r}.")
    if not len(time):
        return time.new_tensor(torch.nan)
    times, reached_share = share_of(time, exposed)
    reached = times[reached_share >= share - ROUNDING]
    return reached[0] if len(reached) else time.new_tensor(torch.inf)


def effort_quantile(effort: Tensor, spent: Tensor | float, *, share: float = 0.5) -> Tensor:
    """Return the evaluations after which a share of the images is exposed (Kaplan and Meier, 1958).

    An image that a budget of 100 did not expose says that its effort is larger than 100 and nothing more. Leaving it
    out, or taking 100 for its effort, would understate the median; here it counts among those not yet exposed for as
    long as it was followed. The estimate assumes that how long says nothing about how hard the image is. Where an
    attack ended by itself, it does: more budget would change nothing, so pass infinity as `spent`.

    Args:
        effort: (N,) evaluations after which each image was exposed; infinite: never within `spent`; NaN: not measured.
        spent: Evaluations each image was attacked for, a number or (N,).
        share: In [0, 1]; 0.5: the median, 0: the first image.

    Returns:
        A scalar; infinite when so many were never exposed: then it is more than `effort_more_than`. NaN without images.

    Example:
        >>> effort_quantile(torch.tensor([20.0, 50.0, torch.inf, torch.inf]), torch.tensor([100, 100, 30, 100]))
        tensor(50., dtype=torch.float64)
    """
    return quantile_of(*observed(effort, spent), share)


def bound_of(time: Tensor, share: float) -> Tensor:
    """Return `effort_more_than` of what `observed` returns, a scalar."""
    if not len(time):
        return time.new_tensor(torch.nan)
    ended = time.isinf()
    if float(ended.double().mean()) > 1 - share or bool(ended.all()):
        return time.new_tensor(torch.inf)
    return time[~ended].max()


def effort_more_than(effort: Tensor, spent: Tensor | float, *, share: float = 0.5) -> Tensor:
    """Return what an infinite `effort_quantile` is estimated to exceed; same arguments.

    That is the largest finite number of evaluations that an image was followed for: until it was exposed, or the
    budget ended. It is infinite when attacks ended
    by themselves on so many images that no budget would expose the share, NaN without images.

    Example:
        >>> effort_more_than(torch.tensor([20.0, torch.inf, torch.inf]), 400)
        tensor(400., dtype=torch.float64)
    """
    time, _ = observed(effort, spent)
    return bound_of(time, share)

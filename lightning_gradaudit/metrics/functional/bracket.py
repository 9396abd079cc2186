"""The ceiling, its gap to the exposure, and the noise that would hide images; images that are NaN are left out."""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_gradaudit.errors import InvalidInputError
from lightning_gradaudit.metrics.functional.summary import Statistic, summary


def known(name: str, values: Tensor, *, most: float = torch.inf) -> Tensor:
    """Return the values (N,) that are not NaN.

    Raises:
        InvalidInputError: When one of them lies outside [0, most].
    """
    if values.ndim != 1:
        raise InvalidInputError(f"{name}: expected one value for each image, (N,), got {tuple(values.shape)}.")
    found = values.detach()[~values.isnan()].float()
    if bool(((found < 0) | (found > most)).any()):
        raise InvalidInputError(f"{name}: expected values in [0, {most:g}] or NaN, got {values.tolist()}.")
    return found


def ceiling(leak_r2: Tensor, statistic: Statistic = "mean") -> Tensor:
    """Return a statistic of leak-R², the share of an image's variance that the gradient resolves.

    A local estimate at a stated precision and no guarantee (see `analysis.analyse`).

    Args:
        leak_r2: (N,) in [0, 1], as `AuditRecord.ceiling` or `Leakage.leak_r2`; NaN: not analysed.
        statistic: "mean", "worst" (the image that is given away most) or "p90".

    Returns:
        A scalar in [0, 1]; NaN when no image was analysed.

    Example:
        >>> ceiling(torch.tensor([0.2, 0.6, torch.nan]))
        tensor(0.4000)
    """
    return summary(known("leak_r2", leak_r2, most=1.0), statistic)


def noise_to_hide(noise: Tensor, statistic: Statistic = "worst") -> Tensor:
    """Return a statistic of the noise that would hide images.

    Args:
        noise: (N,) >= 0, relative to the gradient's norm, as `Leakage.noise_to_hide`; NaN: not analysed.
        statistic: "worst" is the noise that hides every image, "p90" nine of ten, "mean" describes.

    Returns:
        A scalar >= 0, as `GaussianNoise(relative=)` takes it; NaN when no image was analysed.

    Example:
        >>> noise_to_hide(torch.tensor([0.5, 3.0]))
        tensor(3.)
    """
    return summary(known("noise", noise), statistic)


def gaps(ceiling: Tensor, exposure: Tensor) -> Tensor:
    """Return ceiling - exposure of each image that has both, (N,) in [-1, 1]."""
    if ceiling.shape != exposure.shape:
        raise InvalidInputError(
            f"ceiling and exposure must have one shape, got {tuple(ceiling.shape)} and {tuple(exposure.shape)}."
        )
    known("ceiling", ceiling, most=1.0)
    known("exposure", exposure, most=1.0)
    found = ceiling.detach().float() - exposure.detach().to(ceiling.device).float()
    return found[~found.isnan()]


def bracket_gap(ceiling: Tensor, exposure: Tensor, statistic: Statistic = "mean") -> Tensor:
    """Return a statistic of what could be got minus what was got.

    Wide: the attack missed something, or the estimate is too high; a failed attack proves nothing there. Narrow: the
    attack recovered about what there is. The two ends are not in one unit (a share of variance; structural similarity
    beyond a guess), so compare gaps with each other and not with 0. Below 0 the local estimate was wrong.

    Args:
        ceiling: (N,) in [0, 1], leak-R²; NaN: not analysed.
        exposure: (N,) in [0, 1], what an attack reached.
        statistic: "mean", "worst" (the widest) or "p90".

    Returns:
        A scalar in [-1, 1]; NaN when no image has both.

    Example:
        >>> bracket_gap(torch.tensor([0.9, 0.5]), torch.tensor([0.1, 0.5]))
        tensor(0.4000)
    """
    return summary(gaps(ceiling, exposure), statistic)

"""The ceiling, its gap to the exposure, and the noise that would hide images; images that are NaN are left out."""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_gradaudit.errors import InvalidInputError
from lightning_gradaudit.metrics.base import ImageMetric


class Ceiling(ImageMetric):
    """Leak-R² of a set of images: the share of their variance that the gradient resolves, in [0, 1].

    A local estimate at a stated precision and no guarantee (see `analysis.analyse`).

    Args:
        statistic: "mean" (default), "worst" (the image that is given away most) or "p90".

    Example:
        >>> import torch
        >>> metric = Ceiling()
        >>> metric.update(torch.tensor([0.2, 0.6]))
        >>> metric.compute()
        tensor(0.4000)
    """

    higher_is_better = False
    plot_lower_bound = 0.0
    plot_upper_bound = 1.0
    default_statistic = "mean"

    def update(self, leak_r2: Tensor) -> None:
        """Add images: their leak-R², (B,) in [0, 1], as `AuditRecord.ceiling`; NaN ones, not analysed, are left out."""
        self.values.append(_known("leak_r2", leak_r2, most=1.0))


class NoiseToHide(ImageMetric):
    """Noise relative to the gradient's norm that would hide a set of images, >= 0.

    Args:
        statistic: "worst" (default): what hides every image; "p90": nine of ten; "mean" describes.

    Example:
        >>> import torch
        >>> metric = NoiseToHide()
        >>> metric.update(torch.tensor([0.5, 3.0]))
        >>> metric.compute()
        tensor(3.)
    """

    higher_is_better = False
    plot_lower_bound = 0.0

    def update(self, noise: Tensor) -> None:
        """Add images: (B,) >= 0, as `Leakage.noise_to_hide`, all for one level of what counts as hidden."""
        self.values.append(_known("noise", noise))


class BracketGap(ImageMetric):
    """What could be got of a set of images minus what was got, in [-1, 1].

    Wide: the attack missed something, or the estimate is too high; a failed attack proves nothing there. Narrow: the
    attack recovered about what there is. The two ends are not in one unit (a share of variance; structural similarity
    beyond a guess), so compare gaps with each other and not with 0. Below 0 the local estimate was wrong.

    Args:
        statistic: "mean" (default), "worst" (the widest) or "p90".

    Example:
        >>> import torch
        >>> metric = BracketGap()
        >>> metric.update(ceiling=torch.tensor([0.9, 0.5]), exposure=torch.tensor([0.1, 0.5]))
        >>> metric.compute()
        tensor(0.4000)
    """

    higher_is_better = None
    plot_lower_bound = -1.0
    plot_upper_bound = 1.0
    default_statistic = "mean"

    def update(self, ceiling: Tensor, exposure: Tensor) -> None:
        """Add images: leak-R² and the exposure reached, (B,) each in [0, 1]; those without both are left out."""
        self.values.append(_gaps(ceiling, exposure))


def _gaps(ceiling: Tensor, exposure: Tensor) -> Tensor:
    """Return ceiling - exposure of each image that has both, (N,) in [-1, 1]."""
    if ceiling.shape != exposure.shape:
        raise InvalidInputError(
            f"ceiling and exposure must have one shape, got {tuple(ceiling.shape)} and {tuple(exposure.shape)}."
        )
    _known("ceiling", ceiling, most=1.0)
    _known("exposure", exposure, most=1.0)
    found = ceiling.detach().float() - exposure.detach().to(ceiling.device).float()
    return found[~found.isnan()]


def _known(name: str, values: Tensor, *, most: float = torch.inf) -> Tensor:
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

"""The ceiling, its gap to the exposure, and the noise that would hide images, as torchmetrics metrics."""

from __future__ import annotations

from torch import Tensor

from lightning_gradaudit.metrics.base import ImageMetric
from lightning_gradaudit.metrics.functional.bracket import gaps, known


class Ceiling(ImageMetric):
    """Leak-R² of a set of images: the share that any attacker could get by a local estimate, in [0, 1].

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
        self.values.append(known("leak_r2", leak_r2, most=1.0))


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
        self.values.append(known("noise", noise))


class BracketGap(ImageMetric):
    """What could be got of a set of images minus what was got, in [-1, 1] (see `functional.bracket_gap`).

    Neither better nor worse when high: a wide gap under a high ceiling is a weak attack, and a narrow one a strong one.

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
        self.values.append(gaps(ceiling, exposure))

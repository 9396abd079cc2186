"""torchmetrics classes for what torchmetrics lacks; SSIM and PSNR come from torchmetrics itself.

In a data-parallel run `compute()` first gathers from all processes, a collective that every process must reach. Where
they do not (late results, process zero alone), or all hold the same audits, pass `sync_on_compute=False`.
"""

from lightning_gradaudit.metrics.bracket import BracketGap, Ceiling, NoiseToHide
from lightning_gradaudit.metrics.effort import Effort
from lightning_gradaudit.metrics.exposure import Exposure
from lightning_gradaudit.metrics.gradients import GradientSimilarity, LabelMultisetAccuracy
from lightning_gradaudit.metrics.identification import Identification

__all__ = [
    "BracketGap",
    "Ceiling",
    "Effort",
    "Exposure",
    "GradientSimilarity",
    "Identification",
    "LabelMultisetAccuracy",
    "NoiseToHide",
]

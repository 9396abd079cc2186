"""torchmetrics classes for what torchmetrics lacks; SSIM and PSNR come from torchmetrics itself."""

from lightning_gradaudit.metrics.exposure import Exposure
from lightning_gradaudit.metrics.gradients import GradientSimilarity, LabelMultisetAccuracy
from lightning_gradaudit.metrics.identification import Identification

__all__ = ["Exposure", "GradientSimilarity", "Identification", "LabelMultisetAccuracy"]

"""How the images of a data set are normalized."""

from __future__ import annotations

import logging
from typing import Any

from pytorch_lightning import Trainer
from torch import Tensor

from lightning_gradaudit.simulation.normalization import Normalization

log = logging.getLogger(__name__)


def normalization_of_data(trainer: Trainer) -> Normalization | None:
    """Read a `Normalize` among the transforms of the training data, where there is one."""
    loader: Any = trainer.train_dataloader
    dataset: Any = getattr(loader, "dataset", None)
    while hasattr(dataset, "dataset"):  # Subset and its like
        dataset = dataset.dataset
    transform = getattr(dataset, "transform", None)
    for step in getattr(transform, "transforms", [transform]):
        if type(step).__name__ == "Normalize" and hasattr(step, "mean") and hasattr(step, "std"):
            return Normalization.of(step.mean, step.std)
    return None


def normalization_of_range(inputs: Tensor) -> Normalization:
    """Infer the pixel range from images: [0, 1] when they lie in it, else their own extremes."""
    low, high = float(inputs.min()), float(inputs.max())
    if low >= 0 and high <= 1:
        return Normalization()
    log.warning(
        "GradAudit: images span [%.2f, %.2f] and no normalisation is known; this range is taken for [0, 1]. "
        "Pass mean= and std=.",
        low,
        high,
    )
    # pixel = (input - low) / (high - low), so input = (pixel - mean) / std with:
    width = max(high - low, 1e-6)
    return Normalization.of(-low / width, 1 / width)

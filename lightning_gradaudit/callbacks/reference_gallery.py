"""The reference images of a run's training distribution, and how images are normalized."""

from __future__ import annotations

import logging
from typing import Any

from pytorch_lightning import Trainer
from torch import Tensor

from lightning_gradaudit.errors import EmptyBatchError, InvalidInputError
from lightning_gradaudit.metrics.baseline import Baseline
from lightning_gradaudit.simulation.batch import BatchLayout, SampleId
from lightning_gradaudit.simulation.normalization import Normalization

log = logging.getLogger(__name__)


class ReferenceGallery:
    """Fill a baseline with reference images, and find out how images are normalized.

    Args:
        gallery: (N, C, H, W) images in the model's input space, or a pair of them and their (N,) class indices; None:
            the first training batches are kept.
        normalization: As it was declared; None: it is read from the data set's transforms, or from the range of the
            first images.
        sample_id: Where batches hold names of their images (see `BatchLayout`).

    Attributes:
        normalization: None until it is known.

    Raises:
        InvalidInputError: When the gallery is no batch of images, or its labels are not as many.
    """

    def __init__(
        self,
        gallery: Tensor | tuple[Tensor, Tensor] | None,
        *,
        normalization: Normalization | None,
        sample_id: SampleId | None,
    ) -> None:
        pair = gallery if isinstance(gallery, (tuple, list)) else (gallery, None)
        self._images: Tensor | None = pair[0]
        self._labels: Tensor | None = pair[1]
        if self._images is not None:
            _check_gallery(self._images, self._labels)
        self.normalization, self._sample_id = normalization, sample_id
        self._baseline = Baseline()
        self._batches_left = 0

    def start(self, trainer: Trainer, baseline: Baseline) -> None:
        """Begin to fill a baseline: with the images that were given, or from the training batches to come."""
        self._baseline, self._batches_left = baseline, baseline.gallery_size  # a batch has at least one image
        if self.normalization is None:
            self.normalization = normalization_of_data(trainer)
        if self._images is not None:
            baseline.gallery_size = len(self._images)
            self._observe(self._images, self._labels)

    @property
    def needs_batches(self) -> bool:
        """Whether the gallery is not full, and training batches could be read so far."""
        return self._batches_left > 0 and not self._baseline.gallery_full

    def add_batch(self, batch: Any) -> None:
        """Add the images of a training batch; after one that cannot be read no other is tried.

        Raises:
            InvalidInputError: When the batch holds no images or labels that can be audited.
        """
        left, self._batches_left = self._batches_left - 1, 0
        try:
            truth = BatchLayout.of(batch, self._sample_id).split(batch)
        except EmptyBatchError:
            self._batches_left = left
            return
        self._batches_left = left
        self._observe(truth.inputs.detach(), truth.labels.detach())

    def _observe(self, inputs: Tensor, labels: Tensor | None) -> None:
        if self.normalization is None:
            self.normalization = normalization_of_range(inputs)
        self._baseline.observe(self.normalization.to_pixels(inputs).clamp(0, 1), labels)


def _check_gallery(images: Any, labels: Any) -> None:
    if not isinstance(images, Tensor) or images.ndim != 4 or not images.is_floating_point():
        got = f"{tuple(images.shape)} {images.dtype}" if isinstance(images, Tensor) else type(images).__name__
        raise InvalidInputError(f"gallery: expected floating-point images (N, C, H, W), got {got}.")
    if labels is not None and (not isinstance(labels, Tensor) or labels.shape != images.shape[:1]):
        got = str(tuple(labels.shape)) if isinstance(labels, Tensor) else type(labels).__name__
        raise InvalidInputError(f"gallery: expected labels ({len(images)},), one for each image, got {got}.")


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
    """Infer the pixel range from images: [0, 1] or [0, 255] when they lie in it, else their own extremes."""
    low, high = float(inputs.min()), float(inputs.max())
    if low >= 0 and high <= 1:
        return Normalization()
    if low >= 0 and 2 < high <= 255:
        return Normalization.of(0.0, 1 / 255)
    log.warning(
        "GradAudit: images span [%.2f, %.2f] and no normalisation is known; this range is taken for [0, 1]. "
        "Pass mean= and std=.",
        low,
        high,
    )
    # pixel = (input - low) / (high - low), so input = (pixel - mean) / std with:
    width = max(high - low, 1e-6)
    return Normalization.of(-low / width, 1 / width)

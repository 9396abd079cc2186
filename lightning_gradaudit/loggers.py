"""The one place that knows how each logger takes late steps and images."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torchvision.utils import make_grid, save_image

from lightning_gradaudit.namespaces import is_a
from lightning_gradaudit.record import AuditRecord

STEP_KEY = "gradaudit/step"


def declare(logger: Any, keys: Sequence[str]) -> None:
    """Announce the curves. W&B draws late results at the step of capture only for exactly named metrics."""
    if is_a(logger, "WandbLogger"):
        run = logger.experiment
        run.define_metric(STEP_KEY, hidden=True)
        for key in keys:
            run.define_metric(key, step_metric=STEP_KEY, step_sync=False)


def log_scalars(logger: Any, values: Mapping[str, float], *, step: int) -> None:
    """Log a row at the step of capture, which may lie behind what the logger has already seen."""
    if is_a(logger, "WandbLogger"):
        logger.experiment.log({**values, STEP_KEY: step})
    else:
        logger.log_metrics(dict(values), step=step)


def pairs_picture(record: AuditRecord, count: int, *, enlarge: int = 3) -> Tensor | None:
    """Lay the most exposed true images (top row) over their reconstructions: (3, H, W) in [0, 1].

    Args:
        record: An audit; None is returned when it holds no images.
        count: Most pairs shown.
        enlarge: Screen pixels a pixel.
    """
    if record.truth is None or record.pixels is None or count < 1:
        return None
    worst = record.exposure.argsort(descending=True)[:count]
    rows = torch.cat([record.truth[worst], record.pixels[worst]]).float().clamp(0, 1)
    rows = torch.nn.functional.interpolate(rows, scale_factor=enlarge, mode="nearest")
    return make_grid(rows, nrow=len(worst), padding=4, pad_value=1.0)


def log_pairs(logger: Any, picture: Tensor, *, step: int, key: str) -> None:
    """Log a picture where the logger can hold one; others are left without."""
    if is_a(logger, "WandbLogger"):
        import wandb

        image = wandb.Image(picture.permute(1, 2, 0).numpy(), caption=f"step {step}: truth above, reconstruction below")
        logger.experiment.log({key: image, STEP_KEY: step})
    elif is_a(logger, "TensorBoardLogger"):
        logger.experiment.add_image(key, picture, step)
    elif is_a(logger, "CSVLogger"):
        save_image(picture, Path(logger.log_dir) / f"{key.replace('/', '_')}_{step:08d}.png")


def finish(logger: Any) -> None:
    """Flush and close what a finished run wrote, so that the next run starts its own."""
    logger.finalize("success")
    if is_a(logger, "WandbLogger"):
        logger.experiment.finish()


def describe(logger: Any) -> str:
    """Name a logger in messages."""
    return type(logger).__name__

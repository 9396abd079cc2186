"""What is published of a verdict and of an audit."""

from __future__ import annotations

import torch
from torch import Tensor
from torchvision.utils import make_grid

from lightning_gradaudit.audit.record import AuditRecord


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
    if rows.shape[1] not in (1, 3):  # no picture holds more channels
        rows = rows.mean(1, keepdim=True)
    rows = torch.nn.functional.interpolate(rows, scale_factor=enlarge, mode="nearest")
    return make_grid(rows, nrow=len(worst), padding=4, pad_value=1.0)


UNKNOWN_RISK = 1.0
"""What `trainer.callback_metrics` says before the first valid audit: unknown counts as the worst."""

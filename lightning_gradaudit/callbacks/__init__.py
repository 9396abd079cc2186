"""The Lightning callbacks `GradAudit` and `RiskGatedCheckpoint`, and what they log."""

from lightning_gradaudit.callbacks.curves import CURVES
from lightning_gradaudit.callbacks.loggers import wandb_workspace

__all__ = ["CURVES", "wandb_workspace"]

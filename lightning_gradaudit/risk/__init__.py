"""From records to a verdict: the gate, its checks and statistics, and the history of a run."""

from lightning_gradaudit.risk.intervals import clopper_pearson, log_e_value, upper_share

__all__ = ["clopper_pearson", "log_e_value", "upper_share"]

"""Audit what a training gradient gives away, while training runs."""

from lightning_gradaudit._version import __version__
from lightning_gradaudit.audit import audit_snapshot, audit_snapshots
from lightning_gradaudit.auditor import Auditor
from lightning_gradaudit.baseline import Baseline
from lightning_gradaudit.budget import Budget
from lightning_gradaudit.callback import GradAudit
from lightning_gradaudit.checkpoint import RiskGatedCheckpoint
from lightning_gradaudit.comparison import Comparison, compare
from lightning_gradaudit.defences import ClipNorm, GaussianNoise
from lightning_gradaudit.errors import GradAuditError
from lightning_gradaudit.observation import Observation, ThreatModel
from lightning_gradaudit.ray_executor import RayExecutor
from lightning_gradaudit.reconstruction import Outcome, Reconstruction
from lightning_gradaudit.record import AuditRecord
from lightning_gradaudit.risk import RiskGate
from lightning_gradaudit.schedules import AtSteps, EveryNSteps
from lightning_gradaudit.snapshot import Snapshot
from lightning_gradaudit.verdict import Status, Verdict

__all__ = [
    "AtSteps",
    "AuditRecord",
    "Auditor",
    "Baseline",
    "Budget",
    "ClipNorm",
    "Comparison",
    "EveryNSteps",
    "GaussianNoise",
    "GradAudit",
    "GradAuditError",
    "Observation",
    "Outcome",
    "RayExecutor",
    "Reconstruction",
    "RiskGate",
    "RiskGatedCheckpoint",
    "Snapshot",
    "Status",
    "ThreatModel",
    "Verdict",
    "__version__",
    "audit_snapshot",
    "audit_snapshots",
    "compare",
]

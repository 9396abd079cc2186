"""Audit what a training gradient gives away, while training runs."""

from lightning_gradaudit._version import __version__
from lightning_gradaudit.attacks.budget import Budget
from lightning_gradaudit.attacks.reconstruction import Outcome, Reconstruction
from lightning_gradaudit.audit.auditor import Auditor
from lightning_gradaudit.audit.comparison import Comparison, compare
from lightning_gradaudit.audit.engine import audit_snapshot
from lightning_gradaudit.audit.record import AuditRecord
from lightning_gradaudit.audit.settings import AuditSettings
from lightning_gradaudit.callbacks.grad_audit import GradAudit
from lightning_gradaudit.callbacks.risk_gated_checkpoint import RiskGatedCheckpoint
from lightning_gradaudit.callbacks.schedules import AtSteps, EveryNSteps
from lightning_gradaudit.errors import GradAuditError
from lightning_gradaudit.execution.ray_executor import RayExecutor
from lightning_gradaudit.metrics.baseline import Baseline
from lightning_gradaudit.risk.gate import RiskGate
from lightning_gradaudit.risk.verdict import Status, Verdict
from lightning_gradaudit.simulation.defences import ClipNorm, GaussianNoise
from lightning_gradaudit.simulation.observation import Observation
from lightning_gradaudit.simulation.snapshot import Snapshot
from lightning_gradaudit.simulation.threat_model import ThreatModel

__all__ = [
    "AtSteps",
    "AuditRecord",
    "AuditSettings",
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
    "compare",
]

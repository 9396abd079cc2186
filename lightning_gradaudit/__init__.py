"""Audit what a training gradient gives away, while training runs.

Names are imported when they are first used (PEP 562), so that `gradaudit --help` does not wait for torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from lightning_gradaudit._version import __version__

if TYPE_CHECKING:
    from lightning_gradaudit.attacks.budget import Budget
    from lightning_gradaudit.attacks.reconstruction import Outcome, Reconstruction
    from lightning_gradaudit.audit.auditor import Auditor
    from lightning_gradaudit.audit.comparison import Comparison, compare
    from lightning_gradaudit.audit.engine import audit_snapshot
    from lightning_gradaudit.audit.looks import audit_looks
    from lightning_gradaudit.audit.record import AuditRecord
    from lightning_gradaudit.audit.settings import AuditSettings
    from lightning_gradaudit.callbacks.apply_defences import ApplyDefences
    from lightning_gradaudit.callbacks.grad_audit import GradAudit
    from lightning_gradaudit.callbacks.overhead import Limits
    from lightning_gradaudit.callbacks.privacy_accounting import PrivacyAccounting
    from lightning_gradaudit.callbacks.risk_gated_checkpoint import RiskGatedCheckpoint
    from lightning_gradaudit.callbacks.schedules import AtSteps, EveryNSteps
    from lightning_gradaudit.callbacks.server_check import ServerCheck
    from lightning_gradaudit.capture.loop import RecordedStep, record_step
    from lightning_gradaudit.errors import GradAuditError
    from lightning_gradaudit.execution.ray_executor import RayExecutor
    from lightning_gradaudit.metrics.baseline import Baseline
    from lightning_gradaudit.risk.gate import RiskGate
    from lightning_gradaudit.risk.verdict import Status, Verdict
    from lightning_gradaudit.simulation.defences import (
        ClipLayers,
        ClipNorm,
        ClipValue,
        GaussianNoise,
        LaplaceNoise,
        PruneSmallest,
        Quantise,
        SignOnly,
        Soteria,
        WithholdLayers,
    )
    from lightning_gradaudit.simulation.observation import Observation
    from lightning_gradaudit.simulation.snapshot import Snapshot
    from lightning_gradaudit.simulation.threat_model import ThreatModel

__all__ = [
    "ApplyDefences",
    "AtSteps",
    "AuditRecord",
    "AuditSettings",
    "Auditor",
    "Baseline",
    "Budget",
    "ClipLayers",
    "ClipNorm",
    "ClipValue",
    "Comparison",
    "EveryNSteps",
    "GaussianNoise",
    "GradAudit",
    "GradAuditError",
    "LaplaceNoise",
    "Limits",
    "Observation",
    "Outcome",
    "PrivacyAccounting",
    "PruneSmallest",
    "Quantise",
    "RayExecutor",
    "Reconstruction",
    "RecordedStep",
    "RiskGate",
    "RiskGatedCheckpoint",
    "ServerCheck",
    "SignOnly",
    "Snapshot",
    "Soteria",
    "Status",
    "ThreatModel",
    "Verdict",
    "WithholdLayers",
    "__version__",
    "audit_looks",
    "audit_snapshot",
    "compare",
    "record_step",
]
_MODULES = {
    "attacks.budget": ("Budget",),
    "attacks.reconstruction": ("Outcome", "Reconstruction"),
    "audit.auditor": ("Auditor",),
    "audit.comparison": ("Comparison", "compare"),
    "audit.engine": ("audit_snapshot",),
    "audit.looks": ("audit_looks",),
    "audit.record": ("AuditRecord",),
    "audit.settings": ("AuditSettings",),
    "callbacks.apply_defences": ("ApplyDefences",),
    "callbacks.grad_audit": ("GradAudit",),
    "callbacks.overhead": ("Limits",),
    "callbacks.privacy_accounting": ("PrivacyAccounting",),
    "callbacks.risk_gated_checkpoint": ("RiskGatedCheckpoint",),
    "callbacks.schedules": ("AtSteps", "EveryNSteps"),
    "callbacks.server_check": ("ServerCheck",),
    "capture.loop": ("RecordedStep", "record_step"),
    "errors": ("GradAuditError",),
    "execution.ray_executor": ("RayExecutor",),
    "metrics.baseline": ("Baseline",),
    "risk.gate": ("RiskGate",),
    "risk.verdict": ("Status", "Verdict"),
    "simulation.defences": (
        "ClipLayers",
        "ClipNorm",
        "ClipValue",
        "GaussianNoise",
        "LaplaceNoise",
        "PruneSmallest",
        "Quantise",
        "SignOnly",
        "Soteria",
        "WithholdLayers",
    ),
    "simulation.observation": ("Observation",),
    "simulation.snapshot": ("Snapshot",),
    "simulation.threat_model": ("ThreatModel",),
}
_MODULE_OF = {name: module for module, names in _MODULES.items() for name in names}
_PACKAGES = ("analysis", "attacks", "audit", "callbacks", "errors", "metrics", "risk")


def __getattr__(name: str) -> Any:
    """Import a public name, or a package of them, when it is first asked for."""
    if name in _PACKAGES:
        return import_module(f"{__name__}.{name}")
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = globals()[name] = getattr(import_module(f"{__name__}.{_MODULE_OF[name]}"), name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__, *_PACKAGES})

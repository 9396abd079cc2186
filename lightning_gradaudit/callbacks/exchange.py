"""What the processes of a distributed run tell each other."""

from __future__ import annotations

from dataclasses import dataclass, field

from lightning_gradaudit.audit.engine_check import EngineCheck
from lightning_gradaudit.audit.record import AuditRecord
from lightning_gradaudit.risk.checks import Fault, Losses


@dataclass
class RankResults:
    """What one process of several has found since they last met.

    Attributes:
        records, faults, lost, engine: As in `AuditHistory`.
    """

    records: list[AuditRecord] = field(default_factory=list)
    faults: list[Fault] = field(default_factory=list)
    lost: Losses = field(default_factory=Losses)
    engine: EngineCheck | None = None

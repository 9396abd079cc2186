"""A finished (or running) run, read from its folder, in the shape reports need."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lightning_gradaudit.evidence import Evidence, RunFolder, evidence_from_events
from lightning_gradaudit.record import AuditRecord
from lightning_gradaudit.risk import RiskGate, Verdict


@dataclass(frozen=True)
class Row:
    """One audit with the risk as it stood after it.

    Attributes:
        record: The audit.
        risk: `Verdict.to_dict()` at that moment.
        lag: Training steps between capture and result.
        pairs: Picture of true images over their reconstructions, when images were kept.
    """

    record: AuditRecord
    risk: dict[str, Any]
    lag: float
    pairs: Path | None


@dataclass(frozen=True)
class Run:
    """Everything a report shows of one run.

    Attributes:
        name: Folder name of the run.
        evidence: Its audits.
        rows: Audits with the risk as it stood, oldest first.
        decisions: What gates said about checkpoints, oldest first.
    """

    name: str
    evidence: Evidence
    rows: list[Row]
    decisions: list[dict[str, Any]] = field(default_factory=list)

    def verdict(self, gate: RiskGate) -> Verdict:
        """Judge the whole run."""
        return self.evidence.verdict(gate)

    @property
    def limit(self) -> float | None:
        """The limit of the newest gate that decided, else of the newest audit's verdict."""
        if self.decisions:
            return float(self.decisions[-1]["limit"])
        return float(self.rows[-1].risk["limit"]) if self.rows else None


def load_run(path: str | Path, *, name: str | None = None) -> Run:
    """Read a run folder.

    Args:
        path: The folder that holds `records.jsonl`, or one whose `gradaudit` folder does.
        name: How to call the run; None: the folder's name.

    Raises:
        InvalidInputError: When it is no run folder.
    """
    folder = RunFolder(path)
    if not folder.records_path.exists() and RunFolder(folder.path / "gradaudit").records_path.exists():
        folder = RunFolder(folder.path / "gradaudit")
    events = list(folder.events())
    rows, decisions = [], []
    for event in events:
        if event.get("kind") == "record":
            pairs = folder.path / event["pairs"] if event.get("pairs") else None
            record = AuditRecord.from_dict(event)
            rows.append(Row(record, event.get("risk", {}), float(event.get("lag_steps", 0)), pairs))
        elif event.get("kind") == "verdict":
            decisions.append(event)
    shown = folder.path.parent.name if folder.path.name == "gradaudit" else folder.path.name
    return Run(name or shown, evidence_from_events(events), rows, decisions)

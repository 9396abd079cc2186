"""A finished (or running) run, read from its folder, in the shape reports need."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lightning_gradaudit.analysis.effort import EXPOSED
from lightning_gradaudit.audit.record import AuditRecord
from lightning_gradaudit.errors import InvalidInputError
from lightning_gradaudit.risk.gate import RiskGate
from lightning_gradaudit.risk.history import RECORDS_FILE, AuditHistory, identity
from lightning_gradaudit.risk.run_log import RunLog, evidence_from_events, newest_run
from lightning_gradaudit.risk.verdict import Status, Verdict
from lightning_gradaudit.utils.files import read_json_lines
from lightning_gradaudit.utils.formatting import printable

_BOUNDS = ("risk", "low", "high", "limit")


@dataclass(frozen=True)
class Row:
    """One audit with the risk as it stood after it.

    Attributes:
        record: The audit.
        risk: Of `Verdict.to_dict()` at that moment: status, risk, low, high and limit; None where not measured.
        lag: Training steps between capture and result.
        pairs: Where the log says that a picture of true images over their reconstructions is; it can say anything, so
            read it with `files.read_picture`.
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
        folder: Where it was read from; no picture from elsewhere is shown.
    """

    name: str
    evidence: AuditHistory
    rows: list[Row]
    decisions: list[dict[str, Any]] = field(default_factory=list)
    folder: Path = Path()

    def verdict(self, gate: RiskGate) -> Verdict:
        """Judge the whole run."""
        return self.evidence.verdict(gate)

    @property
    def limit(self) -> float | None:
        """The limit of the newest gate that decided, else of the newest audit's verdict."""
        newest = self.decisions[-1] if self.decisions else self.rows[-1].risk if self.rows else {}
        return newest.get("limit")


def load_run(path: str | Path, *, name: str | None = None) -> Run:
    """Read the newest run of a run folder.

    Args:
        path: The folder that holds `records.jsonl`, or one whose `gradaudit` folder does.
        name: How to call the run; None: the folder's name.

    Raises:
        InvalidInputError: When it is no run folder, or its log holds something else than audits and decisions.
    """
    folder = RunLog(path)
    if not folder.records_path.exists() and RunLog(folder.path / "gradaudit").records_path.exists():
        folder = RunLog(folder.path / "gradaudit")
    if not folder.records_path.is_file():
        raise InvalidInputError(
            f"path: no {RECORDS_FILE} in {printable(folder.path, 300)}; is it the folder of an audited run?"
        )
    log = read_json_lines(folder.records_path)
    try:
        evidence = evidence_from_events(log)
        events = [event for session in newest_run(log) for event in session]
        told = {identity(AuditRecord.from_dict(event)): event for event in events if event.get("kind") == "record"}
        rows = [_row(record, told.get(identity(record), {}), folder.path) for record in evidence.records]
        decisions = [_decision(event) for event in events if event.get("kind") == "verdict"]
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise InvalidInputError(
            f"path: {printable(folder.records_path, 300)} is not the log of an audited run ({printable(error, 200)})."
        ) from error
    shown = folder.path.parent.name if folder.path.name == "gradaudit" else folder.path.name
    return Run(name or shown, evidence, rows, decisions, folder.path)


def _row(record: AuditRecord, event: dict[str, Any], folder: Path) -> Row:
    pairs, risk = event.get("pairs"), _judged(event.get("risk", {}))
    return Row(
        record=record.published(risk.get("limit") or EXPOSED),
        risk=risk,
        lag=_number(event, "lag_steps") or 0.0,
        pairs=(folder / str(pairs)).absolute() if pairs else None,
    )


def _decision(event: dict[str, Any]) -> dict[str, Any]:
    """Return what a gate said about a checkpoint, with the types that a report needs."""
    reasons, step = event["reasons"], event.get("step")
    if not isinstance(event["released"], bool) or not isinstance(reasons, list):
        raise InvalidInputError("expected a decision with released and reasons")
    return _judged(event) | {
        "released": event["released"],
        "reasons": [str(reason) for reason in reasons],
        "action": str(event.get("action", "")),
        "checkpoint": str(event["checkpoint"]),
        "step": None if step is None else int(step),
    }


def _judged(values: dict[str, Any]) -> dict[str, Any]:
    status = Status(values["status"]) if "status" in values else ""
    return {"status": str(status)} | {name: _number(values, name) for name in _BOUNDS}


def _number(values: dict[str, Any], name: str) -> float | None:
    value = values.get(name)
    if value is not None and (isinstance(value, bool) or not isinstance(value, (int, float))):
        raise InvalidInputError(f"expected a number as {name}, got {printable(value, 60)}")
    return None if value is None else float(value)

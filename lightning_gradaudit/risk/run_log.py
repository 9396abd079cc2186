"""The log of a run: what is written as it goes on, and read again."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor
from torchvision.utils import save_image

from lightning_gradaudit.audit.record import AuditRecord
from lightning_gradaudit.errors import InvalidInputError
from lightning_gradaudit.risk.history import RECORDS_FILE, UNBOUND, AuditHistory, add_record, identity
from lightning_gradaudit.risk.parsing import read_engine_check, read_fault, read_losses, read_step, read_texts
from lightning_gradaudit.risk.privacy_ledger import PrivacyLedger
from lightning_gradaudit.utils.digests import json_digest
from lightning_gradaudit.utils.files import read_json_lines, regular_file


class RunLog:
    """An append-only log of one or more runs: a JSON line per event, readable while training goes on.

    Kinds of line: "run" (a session begins: the run's identity, settings, and the evidence it was resumed with),
    "engine", "record", "fault", "privacy" (the private steps), "step" (where training stands), "verdict" (a gate's
    decision about a checkpoint). Each line carries a digest of itself and the line before it in its session: a changed,
    missing or moved line shows.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self._chain: str | None = None

    @property
    def records_path(self) -> Path:
        """The log."""
        return self.path / RECORDS_FILE

    def create(self) -> None:
        """Make the folder, show that it can be written to, and cut off a last line that a crash left unfinished.

        Raises:
            InvalidInputError: When it cannot.
        """
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            with self.records_path.open("ab+") as file:
                file.seek(0)
                content = file.read()
                file.truncate(content.rfind(b"\n") + 1)
        except OSError as error:
            raise InvalidInputError(
                f"dirpath: the audit's folder {self.path} cannot be written ({error}). Pass a writable dirpath=."
            ) from error

    def begin(self, evidence: AuditHistory) -> None:
        """Begin a session of a run; what it was resumed with goes along."""
        self._chain = ""
        known = {"run": evidence.run, "settings": dict(evidence.settings), "evidence": evidence.to_dict()}
        self.append("run", known)

    def append(self, kind: str, values: dict[str, Any]) -> None:
        """Write one event."""
        if self._chain is None:
            events = read_json_lines(self.records_path) if self.records_path.is_file() else []
            self._chain = str(events[-1].get("chain", "")) if events else ""
        line = {"kind": kind, **values}
        self._chain = _link(self._chain, line)
        with self.records_path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line | {"chain": self._chain}, allow_nan=False) + "\n")

    def add_record(self, values: dict[str, Any], picture: Tensor | None) -> None:
        """Write a finished audit, and the picture of its pairs, (3, H, W) in [0, 1], where there is one."""
        if picture is not None:
            name = f"images/step_{values['step']:08d}.png"
            (self.path / name).parent.mkdir(exist_ok=True)
            save_image(picture, self.path / name)
            values = values | {"pairs": name}
        self.append("record", values)

    def events(self) -> list[dict[str, Any]]:
        """Return all events; a last line cut off by a crash is left out.

        Raises:
            InvalidInputError: When there is no log, or it cannot be read.
        """
        try:
            regular_file(self.records_path)
        except InvalidInputError as error:
            raise InvalidInputError(
                f"path: no {RECORDS_FILE} in {self.path}; is it the folder of an audited run?"
            ) from error
        return read_json_lines(self.records_path)

    def evidence(self) -> AuditHistory:
        """Read the newest run of the log back.

        Raises:
            InvalidInputError: As `events`, or when an event is not what it should be.
        """
        return evidence_from_events(self.events())


def sessions(events: Iterable[dict[str, Any]]) -> list[list[dict[str, Any]]]:
    """Part a log at the beginnings of its sessions."""
    parts: list[list[dict[str, Any]]] = []
    for event in events:
        if event.get("kind") == "run" or not parts:
            parts.append([])
        parts[-1].append(event)
    return parts


def newest_run(events: Iterable[dict[str, Any]]) -> list[list[dict[str, Any]]]:
    """Return the sessions of the newest run of a log, oldest first."""
    parts = sessions(events)
    if not parts:
        return []
    run = parts[-1][0].get("run")
    return [part for part in parts if part[0].get("run") == run] if run else parts[-1:]


def evidence_from_events(events: Iterable[dict[str, Any]]) -> AuditHistory:
    """Rebuild the evidence of the newest run in a log; each audit counts once.

    Where a run was resumed from before its last audit, what the abandoned part found still counts.

    Raises:
        InvalidInputError: When an event is not what it should be.
    """
    parts = newest_run(events)
    if not parts:
        return AuditHistory(run="", damage=["The run folder's log is empty."])
    evidence = _of_session(parts[-1])
    known = {identity(record) for record in evidence.records}
    earlier: list[AuditRecord] = []
    resumed = AuditHistory.from_dict(parts[-1][0]["evidence"]) if parts[-1][0].get("evidence") else AuditHistory()
    for part in parts[:-1]:
        session = _of_session(part)
        _note_abandoned(session, resumed, evidence)
        new = [record for record in session.records if identity(record) not in known]
        known |= {identity(record) for record in new}
        earlier += _further(new, evidence)
        evidence.faults += [fault for fault in session.faults if fault not in evidence.faults]
        evidence.damage += [text for text in session.damage if text not in evidence.damage]
    evidence.records = earlier + evidence.records
    return evidence


def _note_abandoned(session: AuditHistory, resumed: AuditHistory, evidence: AuditHistory) -> None:
    """Note private steps of an earlier session that the newest one did not go on from: they were shared, too."""
    known = 0 if resumed.privacy is None else resumed.privacy.steps
    if evidence.privacy is not None and session.privacy is not None and session.privacy.steps > known:
        evidence.privacy.add_fault("A part of the run was abandoned, and its private steps are not accounted for.")


def _further(records: Iterable[AuditRecord], evidence: AuditHistory) -> list[AuditRecord]:
    """Return the audits that an evidence does not hold; what further rungs add to those that it holds is put in."""
    both = list(evidence.records)
    count = len(both)
    complaints = [add_record(both, record) for record in records]
    evidence.damage += [text for text in complaints if text and text not in evidence.damage]
    evidence.records, further = both[:count], both[count:]
    return further


def _of_session(events: Sequence[dict[str, Any]]) -> AuditHistory:
    first = events[0]
    known = first.get("evidence")
    evidence = AuditHistory(run="") if known is None else AuditHistory.from_dict(known)
    if first.get("kind") != "run" or not isinstance(first.get("run"), str) or not first["run"]:
        evidence.damage.append(UNBOUND)
    else:
        evidence.run = first["run"]
        evidence.damage += _broken_links(events)
    evidence.step = None  # what is known of an earlier session is no age of this one
    seen = {identity(record) for record in evidence.records}
    try:
        for event in events:
            _take(evidence, event, seen)
    except (KeyError, TypeError, AttributeError) as error:
        raise InvalidInputError(f"path: the log holds an event that is not of this format ({error!r}).") from error
    return evidence


def _take(evidence: AuditHistory, event: dict[str, Any], seen: set[tuple[Any, ...]]) -> None:
    kind = event.get("kind")
    if kind == "run":
        evidence.settings = read_texts(event.get("settings", {}))
    elif kind == "record":
        record = AuditRecord.from_dict(event)
        if identity(record) not in seen:
            seen.add(identity(record))
            evidence.add(record)
    elif kind == "fault":
        evidence.faults.append(read_fault(event["step"], event["message"], event.get("lasting", False)))
    elif kind == "engine":
        evidence.engine = read_engine_check({"passed": event["passed"], "psnr": event["psnr"]})
    elif kind == "privacy":
        evidence.privacy = PrivacyLedger.from_dict(event["ledger"])
    elif kind == "step":
        evidence.step = read_step(event["step"])
        evidence.lost = read_losses(event.get("lost", event))


def _link(chain: str, line: dict[str, Any]) -> str:
    return hashlib.sha256(f"{chain}{json_digest(line)}".encode()).hexdigest()


def _broken_links(events: Sequence[dict[str, Any]]) -> list[str]:
    chain = ""
    for event in events:
        chain = _link(chain, {key: value for key, value in event.items() if key != "chain"})
        if event.get("chain") != chain:
            return ["The run folder's log was changed after it was written: a line's digest does not fit."]
    return []

"""A run's audits as they are kept: in a run folder, in a checkpoint's stamp, in the callback's state."""

from __future__ import annotations

import hashlib
import json
import math
import uuid
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from heapq import nlargest
from pathlib import Path
from typing import Any

from torch import Tensor
from torchvision.utils import save_image

from lightning_gradaudit.audit.engine import EngineCheck
from lightning_gradaudit.audit.record import AuditRecord
from lightning_gradaudit.errors import InvalidInputError
from lightning_gradaudit.risk.checks import Fault, Losses
from lightning_gradaudit.risk.gate import RiskGate
from lightning_gradaudit.risk.verdict import Verdict
from lightning_gradaudit.utils.digests import json_digest
from lightning_gradaudit.utils.files import read_json_lines, regular_file

VERSION = 2
RECORDS_FILE = "records.jsonl"
SIDECAR_SUFFIX = ".gradaudit.json"
STAMP = "gradaudit"
_MOST_DROPPED = 10_000_000
_UNBOUND = "The evidence was written by version 1 of this format, which binds it to no run and to no weights."


def new_run_id() -> str:
    """Return a name for a run that no other run has."""
    return uuid.uuid4().hex


@dataclass
class Evidence:
    """What a gate needs to judge a run, and what a report shows; never an image.

    Attributes:
        records: Audits, oldest first.
        faults: What failed.
        engine: The run's engine check; None while unknown.
        step: Where training stands (the logger's step); None: unknown.
        lost: Due samples that no audit tells of.
        settings: The callback's settings as text, for the record.
        run: The run's identity, kept when it is resumed.
        damage: What is wrong with the storage that this was read from, as sentences; such evidence cannot pass.
    """

    records: list[AuditRecord] = field(default_factory=list)
    faults: list[Fault] = field(default_factory=list)
    engine: EngineCheck | None = None
    step: int | None = None
    lost: Losses = field(default_factory=Losses)
    settings: dict[str, str] = field(default_factory=dict)
    run: str = field(default_factory=new_run_id)
    damage: list[str] = field(default_factory=list)

    @property
    def dropped(self) -> int:
        """Samples given up because the queue was full or the gradient was not finite."""
        return self.lost.dropped

    @property
    def thinned(self) -> int:
        """Due samples that were not taken, to stay below the largest overhead."""
        return self.lost.thinned

    def verdict(self, gate: RiskGate, *, engine_required: bool = True) -> Verdict:
        """Judge this evidence with a gate."""
        return gate.verdict(
            self.records,
            step=self.step,
            engine=self.engine,
            engine_required=engine_required,
            faults=self.faults,
            lost=self.lost,
            damage=self.damage,
        )

    def most_exposed(self, count: int = 10) -> list[dict[str, Any]]:
        """Return the most exposed images, worst first: step, index in the batch, the user's id and scores."""
        images = (
            (exposure, record, index)
            for record in self.records
            for index, exposure in enumerate(record.exposure.tolist())
            if record.attacked and math.isfinite(exposure)
        )
        return [
            {
                "step": record.step,
                "index": index,
                "id": record.ids[index] if record.ids else "",
                "exposure": exposure,
                "psnr": float(record.psnr[index]),
                "ssim": float(record.ssim[index]),
                "identified": float(record.identified[index]),
            }
            for exposure, record, index in nlargest(count, images, key=lambda image: image[0])
        ]

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON."""
        return {
            "version": VERSION,
            "run": self.run,
            "records": [record.to_dict() for record in self.records],
            "faults": [list(fault) for fault in self.faults],
            "engine": None if self.engine is None else self.engine.to_dict(),
            "step": self.step,
            "lost": self.lost.to_dict(),
            "settings": dict(self.settings),
            "damage": list(self.damage),
        }

    @classmethod
    def from_dict(cls, values: Any) -> Evidence:
        """Read what `to_dict` wrote, of this version or of the first.

        Raises:
            InvalidInputError: When it is of another version or shape.
        """
        version = values.get("version") if isinstance(values, dict) else None
        if version not in (1, VERSION) or isinstance(version, bool):
            raise InvalidInputError(
                f"evidence: expected version {VERSION} (or 1) of this format, got {str(values)[:80]!r}."
            )
        old = version == 1
        try:
            return cls(
                records=[AuditRecord.from_dict(record) for record in values.get("records", [])],
                faults=[_fault(*each) for each in values.get("faults", [])],
                engine=None if values.get("engine") is None else _engine(values["engine"]),
                step=_step(values.get("step")),
                lost=_losses(values if old else values["lost"]),
                settings=_texts(values.get("settings", {})),
                run="" if old else _name(values["run"]),
                damage=[*map(_text, values.get("damage", [])), *([_UNBOUND] if old else [])],
            )
        except (KeyError, TypeError, AttributeError) as error:
            raise InvalidInputError(f"evidence: not of version {version} of this format ({error!r}).") from error


def make_stamp(evidence: Evidence, gate: RiskGate, *, weights: str | None, global_step: int) -> dict[str, Any]:
    """Return what a checkpoint carries: verdict, evidence, and what they are bound to; plain JSON.

    Args:
        evidence: The run's, with its step at saving.
        gate: The gate that decides about the checkpoint.
        weights: `digests.weights_digest` of the state dictionary; None: unknown.
        global_step: The Trainer's at saving.
    """
    kept = evidence.to_dict()  # all of it: another gate may remember what this one forgets
    for record in kept["records"]:
        record["leakage"] = None  # most of a record's size, and nothing that a gate looks at
    values = {
        "version": VERSION,
        "verdict": evidence.verdict(gate).to_dict(),
        "evidence": kept,
        "gate": gate.settings(),
        "weights": weights,
        "global_step": global_step,
    }
    return values | {"digest": json_digest(values)}


def check_stamp(stamp: Any) -> Evidence:
    """Return the evidence of a stamp that is what `make_stamp` wrote.

    Raises:
        InvalidInputError: When it is of another shape, or was changed.
    """
    inner = stamp.get("evidence") if isinstance(stamp, dict) else None
    if not isinstance(inner, dict):
        raise InvalidInputError(f"stamp: expected an audit's stamp, got {str(stamp)[:80]!r}.")
    if inner.get("version") == 1:
        return Evidence.from_dict(inner)  # it has no digest, and cannot pass
    rest = {key: value for key, value in stamp.items() if key not in ("digest", "file")}
    try:
        found = json_digest(rest)
    except (TypeError, ValueError, RecursionError) as error:
        raise InvalidInputError(f"stamp: expected plain JSON ({error}).") from error
    if stamp.get("digest") != found:
        raise InvalidInputError("stamp: it was changed after it was written: its digest does not fit.")
    if stamp.get("version") != VERSION:
        raise InvalidInputError(f"stamp: expected version {VERSION}, got {str(stamp.get('version'))[:80]!r}.")
    return Evidence.from_dict(inner)


@dataclass
class Outbox:
    """What one process of several has found since they last met.

    Attributes:
        records, faults, lost, engine: As in `Evidence`.
    """

    records: list[AuditRecord] = field(default_factory=list)
    faults: list[Fault] = field(default_factory=list)
    lost: Losses = field(default_factory=Losses)
    engine: EngineCheck | None = None


class RunFolder:
    """An append-only log of one or more runs: a JSON line per event, readable while training goes on.

    Kinds of line: "run" (a session begins: the run's identity, settings, and the evidence it was resumed with),
    "engine", "record", "fault", "step" (where training stands), "verdict" (a gate's decision about a checkpoint). Each
    line carries a digest of itself and the line before it in its session: a changed, missing or moved line shows.
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

    def begin(self, evidence: Evidence) -> None:
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

    def evidence(self) -> Evidence:
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


def evidence_from_events(events: Iterable[dict[str, Any]]) -> Evidence:
    """Rebuild the evidence of the newest run in a log; each audit counts once.

    Where a run was resumed from before its last audit, what the abandoned part found still counts.

    Raises:
        InvalidInputError: When an event is not what it should be.
    """
    parts = newest_run(events)
    if not parts:
        return Evidence(run="", damage=["The run folder's log is empty."])
    evidence = _of_session(parts[-1])
    known = {identity(record) for record in evidence.records}
    earlier: list[AuditRecord] = []
    for part in parts[:-1]:
        session = _of_session(part)
        new = [record for record in session.records if identity(record) not in known]
        known |= {identity(record) for record in new}
        earlier += new
        evidence.faults += [fault for fault in session.faults if fault not in evidence.faults]
        evidence.damage += [text for text in session.damage if text not in evidence.damage]
    evidence.records = earlier + evidence.records
    return evidence


def _of_session(events: Sequence[dict[str, Any]]) -> Evidence:
    first = events[0]
    known = first.get("evidence")
    evidence = Evidence(run="") if known is None else Evidence.from_dict(known)
    if first.get("kind") != "run" or not isinstance(first.get("run"), str) or not first["run"]:
        evidence.damage.append(_UNBOUND)
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


def _take(evidence: Evidence, event: dict[str, Any], seen: set[tuple[Any, ...]]) -> None:
    kind = event.get("kind")
    if kind == "run":
        evidence.settings = _texts(event.get("settings", {}))
    elif kind == "record":
        record = AuditRecord.from_dict(event)
        if identity(record) not in seen:
            seen.add(identity(record))
            evidence.records.append(record)
    elif kind == "fault":
        evidence.faults.append(_fault(event["step"], event["message"], event.get("lasting", False)))
    elif kind == "engine":
        evidence.engine = _engine({"passed": event["passed"], "psnr": event["psnr"]})
    elif kind == "step":
        evidence.step = _step(event["step"])
        evidence.lost = _losses(event.get("lost", event))


def identity(record: AuditRecord) -> tuple[Any, ...]:
    """Tell audits of one run apart: where several micro-batches share a step, by their images.

    Two that disagree about what was found are two: no later line takes a finding back.
    """
    found = repr((record.exposure.tolist(), record.identified.tolist(), record.outcome))  # NaN equals itself here
    return record.session, record.rank, record.step, record.digests or record.ids, found


def _link(chain: str, line: dict[str, Any]) -> str:
    return hashlib.sha256(f"{chain}{json_digest(line)}".encode()).hexdigest()


def _broken_links(events: Sequence[dict[str, Any]]) -> list[str]:
    chain = ""
    for event in events:
        chain = _link(chain, {key: value for key, value in event.items() if key != "chain"})
        if event.get("chain") != chain:
            return ["The run folder's log was changed after it was written: a line's digest does not fit."]
    return []


def _fault(step: Any, message: Any, lasting: Any = False) -> Fault:
    if not isinstance(lasting, bool):
        raise InvalidInputError(f"evidence: expected a fault to last or not, got {lasting!r}.")
    known = _step(step)
    if known is None:
        raise InvalidInputError("evidence: a fault has no step.")
    return Fault(known, _text(message), lasting)


def _engine(values: Any) -> EngineCheck:
    passed, psnr = values["passed"], values["psnr"]
    numbers = isinstance(psnr, dict) and all(
        isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
        for value in psnr.values()
    )
    if not isinstance(passed, bool) or not numbers or set(values) - {"passed", "psnr"}:
        raise InvalidInputError(f"evidence: not the result of an engine check: {str(values)[:80]!r}.")
    return EngineCheck(passed=passed, psnr={_text(name): float(value) for name, value in psnr.items()})


def _step(value: Any) -> int | None:
    if value is not None and (not isinstance(value, int) or isinstance(value, bool) or value < 0):
        raise InvalidInputError(f"evidence: expected a step >= 0, got {value!r}.")
    return value


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise InvalidInputError(f"evidence: expected text, got {value!r}.")
    return value


def _name(value: Any) -> str:
    if not _text(value):
        raise InvalidInputError("evidence: expected the identity of a run, got an empty text.")
    return str(value)


def _losses(values: Any) -> Losses:
    """Read what was lost; judging spreads the dropped samples over their steps, which takes memory for each."""
    lost = Losses.from_dict(values)
    counted = sum(count for *_, count in lost.runs)
    if counted > _MOST_DROPPED or any(last < first for first, last, _ in lost.runs):
        raise InvalidInputError(
            f"evidence: expected at most {_MOST_DROPPED} dropped samples, each from a first step to a last, got "
            f"{str(lost.runs)[:80]}."
        )
    return lost


def _texts(values: Any) -> dict[str, str]:
    if not isinstance(values, dict):
        raise InvalidInputError(f"evidence: expected settings, got {values!r}.")
    return {_text(key): _text(value) for key, value in values.items()}

"""A run's audits as they are kept: in a run folder, in a checkpoint's stamp, in the callback's state."""

from __future__ import annotations

import math
import uuid
from dataclasses import dataclass, field
from heapq import nlargest
from typing import Any

from lightning_gradaudit.audit.engine_check import EngineCheck
from lightning_gradaudit.audit.record import AuditRecord
from lightning_gradaudit.errors import InvalidInputError
from lightning_gradaudit.risk.checks import Fault, Losses
from lightning_gradaudit.risk.gate import RiskGate
from lightning_gradaudit.risk.parsing import (
    read_engine_check,
    read_fault,
    read_losses,
    read_run_id,
    read_step,
    read_text,
    read_texts,
)
from lightning_gradaudit.risk.privacy_ledger import PrivacyLedger
from lightning_gradaudit.risk.proof import join_proof
from lightning_gradaudit.risk.verdict import Verdict
from lightning_gradaudit.utils.digests import json_digest

VERSION = 2
RECORDS_FILE = "records.jsonl"
SIDECAR_SUFFIX = ".gradaudit.json"
STAMP = "gradaudit"
UNBOUND = "The evidence was written by version 1 of this format, which binds it to no run and to no weights."


def new_run_id() -> str:
    """Return a name for a run that no other run has."""
    return uuid.uuid4().hex


@dataclass
class AuditHistory:
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
        privacy: The run's private steps; None: nobody accounted for them (`PrivacyAccounting`).
    """

    records: list[AuditRecord] = field(default_factory=list)
    faults: list[Fault] = field(default_factory=list)
    engine: EngineCheck | None = None
    step: int | None = None
    lost: Losses = field(default_factory=Losses)
    settings: dict[str, str] = field(default_factory=dict)
    run: str = field(default_factory=new_run_id)
    damage: list[str] = field(default_factory=list)
    privacy: PrivacyLedger | None = None

    @property
    def dropped(self) -> int:
        """Samples given up because the queue was full or the gradient was not finite."""
        return self.lost.dropped

    @property
    def skipped(self) -> int:
        """Due samples that were not taken, to stay below the largest overhead."""
        return self.lost.skipped

    def add(self, record: AuditRecord) -> None:
        """Keep an audit, or what a further rung adds to one that is known."""
        complaint = add_record(self.records, record)
        if complaint and complaint not in self.damage:
            self.damage.append(complaint)

    def verdict(self, gate: RiskGate, *, engine_required: bool = True, prove: bool = True) -> Verdict:
        """Judge this evidence with a gate.

        Args:
            gate: Limit and rules.
            engine_required: UNKNOWN by demonstration without a passed engine check.
            prove: Compose the private steps, which takes up to a few seconds.
        """
        demonstrated = gate.verdict(
            self.records,
            step=self.step,
            engine=self.engine,
            engine_required=engine_required,
            faults=self.faults,
            lost=self.lost,
            damage=self.damage,
        )
        if self.privacy is None or not prove:
            return demonstrated
        doubts = [*self.damage, *(Fault(*each).message for each in self.faults)]
        return join_proof(demonstrated, self.records, self.privacy, gate, step=self.step, doubts=doubts)

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
            "privacy": None if self.privacy is None else self.privacy.to_dict(),
        }

    @classmethod
    def from_dict(cls, values: Any) -> AuditHistory:
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
                faults=[read_fault(*each) for each in values.get("faults", [])],
                engine=None if values.get("engine") is None else read_engine_check(values["engine"]),
                step=read_step(values.get("step")),
                lost=read_losses(values if old else values["lost"]),
                settings=read_texts(values.get("settings", {})),
                run="" if old else read_run_id(values["run"]),
                privacy=None if values.get("privacy") is None else PrivacyLedger.from_dict(values["privacy"]),
                damage=[*map(read_text, values.get("damage", [])), *([UNBOUND] if old else [])],
            )
        except (KeyError, TypeError, AttributeError) as error:
            raise InvalidInputError(f"evidence: not of version {version} of this format ({error!r}).") from error


def make_stamp(evidence: AuditHistory, gate: RiskGate, *, weights: str | None, global_step: int) -> dict[str, Any]:
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


def check_stamp(stamp: Any) -> AuditHistory:
    """Return the evidence of a stamp that is what `make_stamp` wrote.

    Raises:
        InvalidInputError: When it is of another shape, or was changed.
    """
    inner = stamp.get("evidence") if isinstance(stamp, dict) else None
    if not isinstance(inner, dict):
        raise InvalidInputError(f"stamp: expected an audit's stamp, got {str(stamp)[:80]!r}.")
    if inner.get("version") == 1:
        return AuditHistory.from_dict(inner)  # it has no digest, and cannot pass
    rest = {key: value for key, value in stamp.items() if key not in ("digest", "file")}
    try:
        found = json_digest(rest)
    except (TypeError, ValueError, RecursionError) as error:
        raise InvalidInputError(f"stamp: expected plain JSON ({error}).") from error
    if stamp.get("digest") != found:
        raise InvalidInputError("stamp: it was changed after it was written: its digest does not fit.")
    if stamp.get("version") != VERSION:
        raise InvalidInputError(f"stamp: expected version {VERSION}, got {str(stamp.get('version'))[:80]!r}.")
    return AuditHistory.from_dict(inner)


def add_record(records: list[AuditRecord], record: AuditRecord) -> str:
    """Add an audit to a list; what a further rung adds to one of the list replaces it, so that it counts once.

    Returns:
        What is wrong with it: a result that takes an earlier one of its audit back stands beside it. Else nothing.
    """
    for at, known in enumerate(records if record.rungs > 1 else ()):
        if _same_audit(known, record):
            if _holds(record, known):
                records[at] = record
                return ""
            if _holds(known, record):
                return ""
            records.append(record)
            return f"A later result of the audit of step {record.step} takes back what an earlier one found."
    records.append(record)
    return ""


def _same_audit(one: AuditRecord, other: AuditRecord) -> bool:
    """Whether two records are of rungs of one audit."""
    told = [(r.session, r.rank, r.step, r.audit, r.rungs, r.digests or r.ids) for r in (one, other)]
    return one.rungs > 1 and bool(one.session) and told[0] == told[1]


def _holds(later: AuditRecord, earlier: AuditRecord) -> bool:
    """Whether a record tells at least as much as another of its audit."""
    found = ("exposure", "identified", "exact_leaks", "copied")
    pairs = [(getattr(later, name).float(), getattr(earlier, name).float()) for name in found]
    kept = all(bool((after.nan_to_num(-1.0) >= before.nan_to_num(-1.0)).all()) for after, before in pairs)
    return kept and later.rung >= earlier.rung and later.evaluations >= earlier.evaluations


def identity(record: AuditRecord) -> tuple[Any, ...]:
    """Tell audits of one run apart: where several micro-batches share a step, by their images.

    Two that disagree about what was found are two: no later line takes a finding back.
    """
    found = repr((record.exposure.tolist(), record.identified.tolist(), record.outcome))  # NaN equals itself here
    rung = (record.audit, record.rung, record.reason) if record.rungs > 1 else ()
    return record.session, record.rank, record.step, record.digests or record.ids, found, rung

"""A run's audits as they are kept: in a run folder, in a checkpoint's stamp, in the callback's state."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from heapq import nlargest
from pathlib import Path
from typing import Any

from torch import Tensor
from torchvision.utils import save_image

from lightning_gradaudit.audit import EngineCheck
from lightning_gradaudit.errors import InvalidInputError
from lightning_gradaudit.record import AuditRecord
from lightning_gradaudit.risk import RiskGate, Verdict

VERSION = 1
RECORDS_FILE = "records.jsonl"
SIDECAR_SUFFIX = ".gradaudit.json"
STAMP = "gradaudit"


@dataclass
class Evidence:
    """What a gate needs to judge a run, and what a report shows; never an image.

    Attributes:
        records: Audits, oldest first.
        faults: (step, message) of audits that failed.
        engine: The run's engine check; None while unknown.
        step: Where training stands (the logger's step).
        dropped: Samples given up because the queue was full or the gradient was not finite.
        thinned: Due samples that were not taken, to stay below the largest overhead.
        settings: The callback's settings as text, for the record.
    """

    records: list[AuditRecord] = field(default_factory=list)
    faults: list[tuple[int, str]] = field(default_factory=list)
    engine: EngineCheck | None = None
    step: int | None = None
    dropped: int = 0
    thinned: int = 0
    settings: dict[str, str] = field(default_factory=dict)

    def verdict(self, gate: RiskGate, *, engine_required: bool = True) -> Verdict:
        """Judge this evidence with a gate."""
        return gate.verdict(
            self.records,
            step=self.step,
            engine=self.engine,
            engine_required=engine_required,
            faults=self.faults,
        )

    def most_exposed(self, count: int = 10) -> list[dict[str, Any]]:
        """Return the most exposed images, worst first: step, index in the batch, the user's id and scores."""
        images = (
            (exposure, record, index)
            for record in self.records
            for index, exposure in enumerate(record.exposure.tolist())
            if math.isfinite(exposure)
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

    def to_dict(self, *, gate: RiskGate | None = None) -> dict[str, Any]:
        """Return plain JSON; with a gate, only the records inside its window."""
        records = self.records if gate is None else gate.recent(self.records)
        return {
            "version": VERSION,
            "records": [record.to_dict() for record in records],
            "faults": [list(fault) for fault in self.faults],
            "engine": None if self.engine is None else self.engine.to_dict(),
            "step": self.step,
            "dropped": self.dropped,
            "thinned": self.thinned,
            "settings": dict(self.settings),
        }

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Evidence:
        """Read what `to_dict` wrote.

        Raises:
            InvalidInputError: When it is of another version or shape.
        """
        if not isinstance(values, dict) or values.get("version") != VERSION:
            raise InvalidInputError(f"evidence: expected version {VERSION} of this format, got {str(values)[:80]!r}.")
        engine = values.get("engine")
        return cls(
            records=[AuditRecord.from_dict(record) for record in values.get("records", [])],
            faults=[(int(step), str(text)) for step, text in values.get("faults", [])],
            engine=None if engine is None else EngineCheck(**engine),
            step=values.get("step"),
            dropped=int(values.get("dropped", 0)),
            thinned=int(values.get("thinned", 0)),
            settings=dict(values.get("settings", {})),
        )


@dataclass
class Outbox:
    """What one process of several has found since they last met.

    Attributes:
        records, faults, dropped, engine: As in `Evidence`.
    """

    records: list[AuditRecord] = field(default_factory=list)
    faults: list[tuple[int, str]] = field(default_factory=list)
    dropped: int = 0
    engine: EngineCheck | None = None


class RunFolder:
    """An append-only log of one run: a JSON line per event, readable while training goes on.

    Kinds of line: "run" (settings), "engine", "record", "fault", "step" (where training stands), "verdict" (a gate's
    decision about a checkpoint).
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)

    @property
    def records_path(self) -> Path:
        """The log."""
        return self.path / RECORDS_FILE

    def create(self) -> None:
        """Make the folder and show that it can be written to.

        Raises:
            InvalidInputError: When it cannot.
        """
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            with self.records_path.open("a"):
                pass
        except OSError as error:
            raise InvalidInputError(
                f"dirpath: the audit's folder {self.path} cannot be written ({error}). Pass a writable dirpath=."
            ) from error

    def append(self, kind: str, values: dict[str, Any]) -> None:
        """Write one event."""
        with self.records_path.open("a") as file:
            file.write(json.dumps({"kind": kind, **values}, allow_nan=False) + "\n")

    def add_record(self, values: dict[str, Any], picture: Tensor | None) -> None:
        """Write a finished audit, and the picture of its pairs, (3, H, W) in [0, 1], where there is one."""
        if picture is not None:
            name = f"images/step_{values['step']:08d}.png"
            (self.path / name).parent.mkdir(exist_ok=True)
            save_image(picture, self.path / name)
            values = values | {"pairs": name}
        self.append("record", values)

    def events(self) -> Iterator[dict[str, Any]]:
        """Yield all events; a last line cut off by a crash is skipped.

        Raises:
            InvalidInputError: When there is no log, or a line inside it is not JSON.
        """
        if not self.records_path.is_file():
            raise InvalidInputError(f"path: no {RECORDS_FILE} in {self.path}; is it the folder of an audited run?")
        lines = self.records_path.read_text().splitlines()
        for number, line in enumerate(lines, 1):
            try:
                yield json.loads(line)
            except json.JSONDecodeError as error:
                if number == len(lines):
                    return
                raise InvalidInputError(f"path: line {number} of {self.records_path} is not JSON ({error}).") from error

    def evidence(self) -> Evidence:
        """Read the log back."""
        return evidence_from_events(self.events())


def evidence_from_events(events: Iterable[dict[str, Any]]) -> Evidence:
    """Rebuild evidence from the events of a run folder."""
    evidence = Evidence()
    for event in events:
        kind = event.get("kind")
        if kind == "run":
            evidence.settings = dict(event.get("settings", {}))
        elif kind == "record":
            evidence.records.append(AuditRecord.from_dict(event))
        elif kind == "fault":
            evidence.faults.append((int(event["step"]), str(event["message"])))
        elif kind == "engine":
            evidence.engine = EngineCheck(passed=bool(event["passed"]), psnr=dict(event["psnr"]))
        elif kind == "step":
            evidence.step, evidence.dropped = event["step"], int(event.get("dropped", 0))
            evidence.thinned = int(event.get("thinned", 0))
    return evidence

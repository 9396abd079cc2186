"""Which images of a run count, each once: evidence of presence and evidence of absence."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch

from lightning_gradaudit.record import AuditRecord

Independent = Literal["audits", "images"]


@dataclass(frozen=True)
class Found:
    """Evidence of presence: everything that any attack returned.

    Attributes:
        exposures: (N,) finite exposures, repeated images included.
        by_audit: The same, by audit.
        hits, trials: Identified images of those where identification was measured.
    """

    exposures: np.ndarray
    by_audit: list[np.ndarray]
    hits: int
    trials: int


@dataclass(frozen=True)
class Clean:
    """Evidence of absence: the distinct images of conclusive audits.

    An image that was audited repeatedly counts once, in the unit of its first audit, with the largest exposure it ever
    had. A unit is an audit (or, where the user says that images are independent, an image).

    Attributes:
        exposures: (N,) of distinct images.
        unit: (N,) which unit each belongs to, counted from 0 in the order of the audits.
        identified: (N,) 1, 0 or NaN.
        anonymous: Images that count for nothing, because they carry neither the user's name nor a digest.
    """

    exposures: np.ndarray
    unit: np.ndarray
    identified: np.ndarray
    anonymous: int

    @property
    def units(self) -> int:
        """Number of units."""
        return int(self.unit.max()) + 1 if len(self.unit) else 0

    def shares_above(self, exposure: float) -> np.ndarray:
        """Return the share of each unit's images that are exposed beyond this, (units,)."""
        return self._share(self.exposures > exposure, np.ones(len(self.unit)))

    def shares_identified(self) -> np.ndarray:
        """Return the share of identified images of each unit where it was measured."""
        measured = ~np.isnan(self.identified)
        return self._share(np.nan_to_num(self.identified), measured.astype(float))

    def _share(self, values: np.ndarray, weights: np.ndarray) -> np.ndarray:
        if not len(self.unit):
            return np.zeros(0)
        total = np.bincount(self.unit, weights=weights, minlength=self.units)
        part = np.bincount(self.unit, weights=values * weights, minlength=self.units)
        return part[total > 0] / total[total > 0]


def found(records: Sequence[AuditRecord]) -> Found:
    """Collect evidence of presence."""
    batches, identified = [], [torch.zeros(0)]
    for record in records:
        if record.attacked:
            values = record.exposure.double().numpy()
            batches.append(values[np.isfinite(values)])
            identified.append(record.identified.float())
    names = torch.cat(identified)
    measured = names[~names.isnan()]
    exposures = np.concatenate([np.zeros(0), *batches])
    return Found(exposures, [batch for batch in batches if len(batch)], int(measured.sum()), len(measured))


def clean(records: Sequence[AuditRecord], independent: Independent) -> Clean:
    """Collect evidence of absence.

    Images of different sessions cannot be told apart: the session with the most units counts.
    """
    sessions: dict[str, list[AuditRecord]] = {}
    anonymous = 0
    for record in records:
        if not record.conclusive:
            continue
        if record.ids:
            sessions.setdefault("", []).append(record)
        elif record.digests:
            sessions.setdefault(record.session or "?", []).append(record)
        else:
            anonymous += record.batch_size
    tallies = [_distinct(of_session, independent, anonymous) for of_session in sessions.values()]
    empty = Clean(np.zeros(0), np.zeros(0, dtype=int), np.zeros(0), anonymous)
    return max(tallies, key=lambda tally: tally.units, default=empty)


def _distinct(records: Sequence[AuditRecord], independent: Independent, anonymous: int) -> Clean:
    images: dict[str, int] = {}
    units: dict[Hashable, int] = {}
    exposures: list[float] = []
    identified: list[float] = []
    unit: list[int] = []
    for record in records:
        names = record.ids or record.digests
        rows = zip(names, record.exposure.tolist(), record.identified.tolist(), strict=True)
        for name, exposure, named in rows:
            known = images.get(name)
            if known is None:
                images[name] = len(exposures)
                key = (record.rank, record.step) if independent == "audits" else name
                unit.append(units.setdefault(key, len(units)))
                exposures.append(exposure)
                identified.append(named)
            else:
                exposures[known] = max(exposures[known], exposure)
                identified[known] = np.fmax(identified[known], named)
    return Clean(np.array(exposures), np.array(unit, dtype=int), np.array(identified, dtype=float), anonymous)

"""Which images of a run count, each once: evidence of presence and evidence of absence."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch

from lightning_gradaudit.audit.record import AuditRecord

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
    attacked = [record for record in records if record.attacked]
    exposures = torch.cat([torch.zeros(0), *(record.exposure for record in attacked)]).double().numpy()
    names = torch.cat([torch.zeros(0), *(record.identified for record in attacked)])
    measured = names[~names.isnan()]
    ends = np.cumsum([record.batch_size for record in attacked])[:-1]
    batches = [batch[np.isfinite(batch)] for batch in np.split(exposures, ends)] if attacked else []
    return Found(
        exposures=exposures[np.isfinite(exposures)],
        by_audit=[batch for batch in batches if len(batch)],
        hits=int(measured.sum()),
        trials=len(measured),
    )


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
    exposure = torch.cat([record.exposure for record in records]).double().numpy()
    identified = torch.cat([record.identified for record in records]).double().numpy()
    names = [name for record in records for name in (record.ids or record.digests)]
    where: dict[str, int] = {}
    image = np.fromiter((where.setdefault(name, len(where)) for name in names), int, len(names))
    largest = np.full(len(where), -np.inf)
    np.maximum.at(largest, image, exposure)
    named = np.full(len(where), np.nan)
    np.fmax.at(named, image, identified)
    if independent == "images":
        return Clean(largest, np.arange(len(where)), named, anonymous)
    # The unit of an image is the audit that had it first; micro-batches of one step are one unit.
    audits: dict[Hashable, int] = {}
    audit = np.repeat(
        [audits.setdefault((record.rank, record.step), len(audits)) for record in records],
        [record.batch_size for record in records],
    )
    first = np.full(len(where), len(audits))
    np.minimum.at(first, image, audit)
    return Clean(largest, np.unique(first, return_inverse=True)[1], named, anonymous)

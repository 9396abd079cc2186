"""What the audits of a run show: which images count, each once, and the risk with its bounds."""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch

from lightning_gradaudit.audit.record import AuditRecord
from lightning_gradaudit.metrics.functional.identification import excess_over_chance
from lightning_gradaudit.metrics.functional.summary import Statistic, summary
from lightning_gradaudit.risk.intervals import (
    bootstrap_by_audit,
    bounds_share,
    clopper_pearson,
    units_until,
    upper_share,
)

Independent = Literal["audits", "images"]
NOMINAL_CHANCE = 0.05
"""Chance of identification until it was measured: two statistics and an assignment among a hundred."""
MOST_UNITS = 10_000
"""Most further audits that are asked for; beyond, more audits are taken to settle nothing."""


@dataclass(frozen=True, kw_only=True)
class Criteria:
    """What a gate holds the audits of a run against; the arguments of `RiskGate` of these names."""

    max_risk: float
    statistic: Statistic
    tail: float
    confidence: float
    independent: Independent

    def bound(self, shares: np.ndarray, rate: float | None = None, *, tolerant: bool | None = None) -> bool:
        """Tell whether the mean share is below a rate with this confidence.

        Args:
            shares: (N,) in [0, 1], one for each unit.
            rate: None: the tail.
            tolerant: See `log_e_value`; None: not for the statistic "worst", which any finding exceeds.
        """
        rate = self.tail if rate is None else rate
        tolerant = self.statistic != "worst" if tolerant is None else tolerant
        return bounds_share(shares, rate, confidence=self.confidence, tolerant=tolerant)


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


@dataclass(frozen=True)
class Chance:
    """Identification by mismatched reconstructions: rate, and its bounds."""

    rate: float
    low: float
    high: float

    @classmethod
    def of(cls, records: Sequence[AuditRecord], confidence: float) -> Chance:
        """Estimate the chance from the trials of the records."""
        trials = sum(record.chance_trials for record in records)
        hits = sum(record.chance_hits for record in records)
        if not trials:
            tries = max((record.rung for record in records), default=1)  # each rung may name the image
            return cls(0.0, 0.0, min(1.0, tries * NOMINAL_CHANCE))
        # Mismatched reconstructions repeat images of few audits: with the lower bound their luck excuses nothing.
        return cls(hits / trials, *clopper_pearson(hits, trials, confidence=confidence))


@dataclass(frozen=True, kw_only=True)
class Measured:
    """What a set of records shows: point values, bounds, and how much evidence stands behind them.

    Attributes:
        exposure, exposure_low, exposure_high: The exposure statistic and its bounds.
        excess, excess_low, excess_high: Identification in excess of chance, and its bounds.
        significant: Whether identification is above chance with the gate's confidence.
        hits, trials: Identified images of those where identification was measured.
        chance: Of identification.
        clean: Evidence of absence.
    """

    exposure: float
    exposure_low: float
    exposure_high: float
    excess: float
    excess_low: float
    excess_high: float
    significant: bool
    hits: int
    trials: int
    chance: Chance
    clean: Clean

    @property
    def risk(self) -> float:
        """The larger of both; NaN where nothing was measured."""
        return float(np.fmax(self.exposure, self.excess))

    @property
    def low(self) -> float:
        """Lower bound of the risk."""
        return max(self.exposure_low, self.excess_low)

    @property
    def high(self) -> float:
        """Upper bound of the risk."""
        return max(self.exposure_high, self.excess_high)


def measure(records: Sequence[AuditRecord], criteria: Criteria) -> Measured:
    """Return the risk that records show, with its bounds."""
    confidence = criteria.confidence
    presence, absence = found(records), clean(records, criteria.independent)
    chance = Chance.of(records, confidence)
    exposure = float(summary(torch.from_numpy(presence.exposures), criteria.statistic))
    low, high = exposure_bounds(presence, absence, exposure, criteria)
    rate = presence.hits / presence.trials if presence.trials else math.nan
    hit_low = clopper_pearson(presence.hits, presence.trials, confidence=confidence)[0]
    hit_high = upper_share(absence.shares_identified(), confidence=confidence)
    return Measured(
        exposure=exposure,
        exposure_low=low,
        exposure_high=high,
        excess=excess_over_chance(rate, chance.rate) if presence.trials else math.nan,
        excess_low=excess_over_chance(hit_low, chance.rate),
        excess_high=excess_over_chance(max(hit_high, 0.0 if math.isnan(rate) else rate), chance.low),
        significant=hit_low > chance.high,
        hits=presence.hits,
        trials=presence.trials,
        chance=chance,
        clean=absence,
    )


def exposure_bounds(presence: Found, absence: Clean, exposure: float, criteria: Criteria) -> tuple[float, float]:
    """Return bounds of the exposure statistic; the upper one also bounds all but a tail of the images."""
    values = np.unique(np.append(absence.exposures, 0.0))

    def bounded(at: int) -> bool:
        value = float(values[at - 1])
        # Shares of audits weigh alike, so that audits of few images could outvote one of many: images count, too.
        few = float((absence.exposures > value).mean()) <= criteria.tail if len(absence.exposures) else False
        return few and criteria.bound(absence.shares_above(value))

    least = units_until(bounded, len(values))
    high = 1.0 if least is None else float(values[least - 1])
    if math.isnan(exposure):
        return 0.0, 1.0
    if criteria.statistic == "worst":
        return exposure, max(high, exposure)
    low, mean_high = bootstrap_by_audit(presence.by_audit, criteria.statistic, criteria.confidence)
    return low, max(high, mean_high)


def audits_needed(measured: Measured, criteria: Criteria) -> int | None:
    """Return how many more audits of new images without a finding would bring both bounds under the limit."""
    above = measured.clean.shares_above(criteria.max_risk)
    named = measured.clean.shares_identified()
    chance = measured.chance.low
    rate = chance + criteria.max_risk * (1 - chance)  # excess over chance equals the limit here

    def settled(more: int) -> bool:
        new = np.zeros(more)
        return criteria.bound(np.append(above, new)) and (
            rate >= 1 or criteria.bound(np.append(named, new), rate, tolerant=True)
        )

    return units_until(settled, MOST_UNITS) if rate > 0 else None

"""From audited images to a verdict: risk with bounds, and a gate that fails closed."""

from __future__ import annotations

import bisect
import enum
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import torch

from lightning_gradaudit.audit import EngineCheck
from lightning_gradaudit.errors import InvalidInputError
from lightning_gradaudit.intervals import bootstrap_by_audit, clopper_pearson
from lightning_gradaudit.metrics.functional.identification import MIN_GALLERY, excess_over_chance
from lightning_gradaudit.metrics.functional.summary import Statistic, check_statistic, summary
from lightning_gradaudit.record import AuditRecord

_GAPS, _LEAST_AGE = 10, 1000
_NOMINAL_CHANCE = 0.05  # two statistics and an assignment among a hundred, until chance has been measured


class Status(str, enum.Enum):
    """What the gate says."""

    PASS = "PASS"
    BLOCK = "BLOCK"
    UNKNOWN = "UNKNOWN"

    def __str__(self) -> str:
        return self.value

    @property
    def exit_code(self) -> int:
        """Exit status for release pipelines: 0 pass, 1 block, 2 unknown."""
        return {Status.PASS: 0, Status.BLOCK: 1, Status.UNKNOWN: 2}[self]


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """A decision and its evidence.

    Attributes:
        status: PASS, BLOCK or UNKNOWN.
        risk: max(exposure statistic, excess identification) over the window, in [0, 1]; NaN without valid audits.
        low, high: 95% bounds of the risk, in [0, 1]. A worst case that was demonstrated is its own lower bound;
            `high` bounds the exposure of all but a tail of the images, and the excess identification.
        limit: What the risk was compared with.
        spoke: "exposure" or "identification", whichever is larger.
        exposure: The exposure statistic.
        excess_identification: Identification rate beyond the measured chance; NaN when it was not measured.
        chance: Measured identification rate of mismatched reconstructions.
        images, audits: Valid ones in the window.
        newest_step: Step of the newest valid audit; None without one.
        more_images: How many more audited images without a finding would settle an UNKNOWN; None: more audits
            alone would not.
        reasons: Plain sentences.
    """

    status: Status
    risk: float
    low: float
    high: float
    limit: float
    spoke: str
    exposure: float
    excess_identification: float
    chance: float
    images: int
    audits: int
    newest_step: int | None
    more_images: int | None = None
    reasons: tuple[str, ...] = field(default=())

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON; NaN becomes None."""
        values = asdict(self) | {"status": str(self.status), "reasons": list(self.reasons)}
        return {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in values.items()}

    def __str__(self) -> str:
        return f"{self.status}: {' '.join(self.reasons)}"


@dataclass(frozen=True)
class _Evidence:
    """Numbers drawn from the valid audits of a window."""

    exposures: np.ndarray
    batches: list[np.ndarray]
    hits: int
    trials: int
    chance: float
    chance_low: float
    chance_high: float
    capacity: str


class RiskGate:
    """Decide whether a run's gradients expose the images behind them.

    BLOCK: the risk exceeds the limit. PASS: with 95% confidence at most a tail of the images is exposed beyond
    the limit *and* excess identification stays below it. UNKNOWN: everything in between, and whenever the audits
    cannot be trusted: none, too old, failed self-test or engine check, faults, an attack that did not even match
    the gradient, or an exact algebraic leak that the attacks did not turn into a copy.

    PASS means that valid audits show no exposure above the limit for an attacker of the stated capacity. It is
    demonstrated, not proven.

    Args:
        max_risk: Limit in [0, 1].
        statistic: Of the exposures: "worst" (default), "p90" or "mean".
        tail: Share of images a PASS may leave unbounded.
        confidence: Of every bound.
        window: Newest audited images that count, at least; whole audits are kept.
        max_ceiling: Largest `AuditRecord.ceiling` that may pass, in [0, 1]; above it, or without one, PASS becomes
            UNKNOWN. None: the ceiling does not count.
        max_age: Steps after which the newest valid audit is stale; None: ten times the usual distance between the
            window's audits, and at least 1000.

    Raises:
        InvalidInputError: When an argument is out of range.
    """

    def __init__(
        self,
        max_risk: float = 0.3,
        *,
        statistic: Statistic = "worst",
        tail: float = 0.1,
        confidence: float = 0.95,
        window: int = 128,
        max_age: int | None = None,
        max_ceiling: float | None = None,
    ) -> None:
        if max_ceiling is not None and not 0 <= max_ceiling <= 1:
            raise InvalidInputError(f"max_ceiling must lie in [0, 1] or be None, got {max_ceiling!r}.")
        if not 0 <= max_risk <= 1:
            raise InvalidInputError(
                f"max_risk must lie in [0, 1] (0: nothing may leak, 1: anything), got {max_risk!r}."
            )
        if not 0 < tail < 1 or not 0.5 <= confidence < 1 or window < 1 or (max_age is not None and max_age < 1):
            raise InvalidInputError(
                "RiskGate: expected tail in (0, 1), confidence in [0.5, 1), window >= 1 and max_age >= 1, got "
                f"{tail}, {confidence}, {window}, {max_age}."
            )
        if clopper_pearson(0, window, confidence=confidence)[1] > tail:
            raise InvalidInputError(
                f"window: {window} images can never bound a tail of {tail} with confidence {confidence}, so nothing "
                "would ever pass. Use a larger window (29 images suffice for the defaults)."
            )
        check_statistic(statistic)
        self.max_risk = max_risk
        self.statistic: Statistic = statistic
        self.tail = tail
        self.confidence = confidence
        self.window = window
        self.max_age = max_age
        self.max_ceiling = max_ceiling

    def __repr__(self) -> str:
        return (
            f"RiskGate({self.max_risk}, statistic={self.statistic!r}, tail={self.tail}, "
            f"confidence={self.confidence}, window={self.window}, max_age={self.max_age}, "
            f"max_ceiling={self.max_ceiling})"
        )

    def recent(self, records: Sequence[AuditRecord]) -> list[AuditRecord]:
        """Return the newest records that together hold at least `window` images."""
        kept: list[AuditRecord] = []
        for record in reversed(records):
            if sum(r.batch_size for r in kept) >= self.window:
                break
            kept.append(record)
        return kept[::-1]

    def verdict(
        self,
        records: Sequence[AuditRecord],
        *,
        step: int | None = None,
        engine: EngineCheck | None = None,
        engine_required: bool = False,
        faults: Sequence[tuple[int, str]] = (),
    ) -> Verdict:
        """Judge a run.

        Args:
            records: Its audits, oldest first.
            step: Where training stands, to judge the age of the newest audit.
            engine: The run's engine check.
            engine_required: UNKNOWN without a passed engine check.
            faults: (step, message) of audits that failed.
        """
        recent = self.recent(records)
        valid = [record for record in recent if record.valid]
        doubts = self._doubts(recent, valid, step, engine, engine_required, faults)
        if not valid:
            nan = math.nan
            return Verdict(
                status=Status.UNKNOWN, risk=nan, low=0.0, high=1.0, limit=self.max_risk, spoke="exposure",
                exposure=nan, excess_identification=nan, chance=nan, images=0, audits=0, newest_step=None,
                more_images=self._images_needed(None, 0), reasons=tuple(doubts),
            )  # fmt: skip
        evidence = _evidence(valid, self.confidence)
        exposure = float(summary(torch.from_numpy(evidence.exposures), self.statistic))
        rate = evidence.hits / evidence.trials if evidence.trials else math.nan
        excess = excess_over_chance(rate, evidence.chance) if evidence.trials else math.nan
        hit_low, hit_high = clopper_pearson(evidence.hits, evidence.trials, confidence=self.confidence)
        significant = hit_low > evidence.chance_high
        exposure_low, exposure_high = self._exposure_bounds(evidence, exposure)
        identified_high = excess_over_chance(hit_high, evidence.chance_low)
        risk = exposure if math.isnan(excess) else max(exposure, excess)
        spoke = "identification" if excess > exposure else "exposure"
        status, reasons, more = self._decide(
            evidence, exposure, excess, significant, max(exposure_high, identified_high), doubts
        )
        return Verdict(
            status=status,
            risk=risk,
            low=max(exposure_low, excess_over_chance(hit_low, evidence.chance)),
            high=max(exposure_high, identified_high),
            limit=self.max_risk,
            spoke=spoke,
            exposure=exposure,
            excess_identification=excess,
            chance=evidence.chance,
            images=len(evidence.exposures),
            audits=len(valid),
            newest_step=valid[-1].step,
            more_images=more,
            reasons=tuple(reasons),
        )

    def _decide(
        self,
        evidence: _Evidence,
        exposure: float,
        excess: float,
        significant: bool,
        high: float,
        doubts: list[str],
    ) -> tuple[Status, list[str], int | None]:
        limit, n = self.max_risk, len(evidence.exposures)
        found = []
        if exposure > limit:
            found.append(f"The {self.statistic} exposure of {n} audited images is {exposure:.2f} (limit {limit:.2f}).")
        if excess > limit and significant:
            found.append(
                f"{evidence.hits} of {evidence.trials} reconstructions name their image in a gallery, an excess of "
                f"{excess:.2f} over chance {evidence.chance:.2f} (limit {limit:.2f})."
            )
        if found:
            return Status.BLOCK, found + doubts, None
        if high <= limit and not doubts:
            excess_text = f"{excess:.2f}" if not math.isnan(excess) else "not measured"
            return (
                Status.PASS,
                [
                    f"With {self.confidence:.0%} confidence at most {self.tail:.0%} of images are exposed beyond "
                    f"{limit:.2f} ({n} audited, worst {evidence.exposures.max():.2f}, excess identification "
                    f"{excess_text}, upper bound of the risk {high:.2f}). Demonstrated, not proven: the attacker was "
                    f"{evidence.capacity}."
                ],
                None,
            )
        if high <= limit:
            return Status.UNKNOWN, doubts, None
        exceeding = int((evidence.exposures > limit).sum())
        more = self._images_needed(evidence, exceeding)
        hint = (
            f"{more} more audited images without a finding would settle it."
            if more
            else f"The window of {self.window} images cannot settle it at this limit."
        )
        bound = f"Nothing above {limit:.2f} is established, but {n} audited images bound the risk only by {high:.2f}."
        return Status.UNKNOWN, [*doubts, bound, hint], more

    def _doubts(
        self,
        recent: list[AuditRecord],
        valid: list[AuditRecord],
        step: int | None,
        engine: EngineCheck | None,
        engine_required: bool,
        faults: Sequence[tuple[int, str]],
    ) -> list[str]:
        """Return every reason not to trust the audits, as sentences."""
        doubts = []
        if not recent:
            doubts.append("No audit has finished.")
        broken = [record for record in recent if not record.valid]
        if broken:
            doubts.append(
                f"{len(broken)} of {len(recent)} audits are invalid (newest: step {broken[-1].step}, self-test error "
                f"{broken[-1].self_test:.1e}, outcome {broken[-1].outcome}): the simulator does not describe the step."
            )
        limit = self.max_age if self.max_age is not None else _usual_age(valid)
        if valid and step is not None and step - valid[-1].step > limit:
            doubts.append(f"The newest valid audit is {step - valid[-1].step} steps old (at most {limit}).")
        if engine is not None and not engine.passed:
            doubts.append(f"The {engine}.")
        if engine is None and engine_required:
            doubts.append("The engine check has not finished.")
        uncopied = sum(record.uncopied_leaks for record in valid)
        if uncopied:
            doubts.append(
                f"{uncopied} images are given away exactly by algebra, but the attacks did not copy them: "
                "the attacks failed, the information is there."
            )
        unmatched = sum(record.unmatched for record in valid)
        if unmatched > self.tail * len(valid):
            doubts.append(
                f"In {unmatched} of {len(valid)} audits the attack did not match the gradient half as well as the true "
                "images do: it failed, which says nothing about the images. Try a larger budget= or another attack=."
            )
        if valid and all(bool(record.identified.isnan().all()) for record in valid):
            gallery = max(record.gallery for record in valid)
            doubts.append(f"Identification was not measured: {gallery} of {MIN_GALLERY} gallery images.")
        doubts += self._above_ceiling(valid)
        inert = sum(bool(record.outcome.value == "not_applicable") for record in valid)
        if inert:
            doubts.append(f"No attack applied to {inert} of {len(valid)} audits ({valid[-1].reason}).")
        oldest = recent[0].step if recent else -1
        failed = [(at, text) for at, text in faults if at >= oldest]
        if failed:
            doubts.append(f"{len(failed)} audits failed (newest: step {failed[-1][0]}: {failed[-1][1]}).")
        return doubts

    def _above_ceiling(self, valid: list[AuditRecord]) -> list[str]:
        if self.max_ceiling is None:
            return []
        doubts = []
        missing = [record for record in valid if record.ceiling is None]
        if missing:
            why = f" ({missing[-1].reason})" if missing[-1].reason else ""
            doubts.append(f"{len(missing)} of {len(valid)} audits have no ceiling{why}; it needs analysis=True.")
        highest = max((float(record.ceiling.max()) for record in valid if record.ceiling is not None), default=0.0)
        if not highest <= self.max_ceiling:  # NaN is above every limit
            doubts.append(
                f"A better attacker could get up to {highest:.2f} of an image (max_ceiling {self.max_ceiling:.2f})."
            )
        return doubts

    def _exposure_bounds(self, evidence: _Evidence, exposure: float) -> tuple[float, float]:
        """Return bounds of the statistic; the upper one also bounds all but a tail of the images."""
        values = np.sort(evidence.exposures)
        n = len(values)
        # How many images may lie above a value that still bounds all but a tail; growing, so it can be bisected.
        allowed = bisect.bisect_right(
            range(n), self.tail, key=lambda k: clopper_pearson(k, n, confidence=self.confidence)[1]
        )
        high = float(values[n - allowed]) if allowed else 1.0
        if self.statistic == "worst":
            return exposure, max(high, exposure)
        low, mean_high = bootstrap_by_audit(evidence.batches, self.statistic, self.confidence)
        return low, max(high, mean_high)

    def _images_needed(self, evidence: _Evidence | None, exceeding: int) -> int | None:
        """Return how many more images without a finding would bring both bounds under the limit."""
        n, hits, trials, chance = 0, 0, 0, 0.0
        if evidence is not None:
            n, hits, trials, chance = len(evidence.exposures), evidence.hits, evidence.trials, evidence.chance_low

        def settled(more: int) -> bool:
            tail = clopper_pearson(exceeding, n + more, confidence=self.confidence)[1]
            named = clopper_pearson(hits, trials + more, confidence=self.confidence)[1]
            return tail <= self.tail and excess_over_chance(named, chance) <= self.max_risk

        candidates = range(1, max(1, self.window - n) + 1)
        first = bisect.bisect_left(candidates, True, key=settled)
        return candidates[first] if first < len(candidates) else None


def _usual_age(records: list[AuditRecord]) -> int:
    gaps = np.diff([record.step for record in records])
    return max(_LEAST_AGE, int(_GAPS * np.median(gaps))) if len(gaps) else _LEAST_AGE


def _evidence(records: list[AuditRecord], confidence: float) -> _Evidence:
    batches = [record.exposure.double().numpy() for record in records]
    identified = torch.cat([record.identified for record in records])
    measured = identified[~identified.isnan()]
    trials = sum(record.chance_trials for record in records)
    hits = sum(record.chance_hits for record in records)
    # Mismatched guesses repeat images of few audits; the lower bound keeps their luck from excusing anything.
    low, high = clopper_pearson(hits, trials, confidence=confidence) if trials else (0.0, _NOMINAL_CHANCE)
    return _Evidence(
        exposures=np.concatenate(batches),
        batches=batches,
        hits=int(measured.sum()),
        trials=len(measured),
        chance=hits / trials if trials else 0.0,
        chance_low=low,
        chance_high=high,
        capacity=f"{records[-1].attack}, {max(record.evaluations for record in records)} evaluations at most",
    )

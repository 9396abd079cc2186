"""From audited images to a verdict: risk with bounds, and a gate that fails closed."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import numpy as np
import torch

from lightning_gradaudit.audit.engine_check import EngineCheck
from lightning_gradaudit.audit.record import AuditRecord
from lightning_gradaudit.errors import InvalidInputError
from lightning_gradaudit.metrics.functional.identification import excess_over_chance
from lightning_gradaudit.metrics.functional.summary import Statistic, check_statistic, summary
from lightning_gradaudit.risk import checks
from lightning_gradaudit.risk.checks import Fault, Losses
from lightning_gradaudit.risk.intervals import (
    bootstrap_by_audit,
    bounds_share,
    clopper_pearson,
    units_until,
    upper_share,
)
from lightning_gradaudit.risk.statistics import Clean, Found, Independent, clean, found
from lightning_gradaudit.risk.verdict import Status, Verdict

Memory = Literal["run", "window"]
_NOMINAL_CHANCE = 0.05  # two statistics and an assignment among a hundred, until chance has been measured
_MOST_UNITS = 10_000


@dataclass(frozen=True)
class _Chance:
    """Identification by mismatched reconstructions: rate, and its bounds."""

    rate: float
    low: float
    high: float

    @classmethod
    def of(cls, records: Sequence[AuditRecord], confidence: float) -> _Chance:
        trials = sum(record.chance_trials for record in records)
        hits = sum(record.chance_hits for record in records)
        if not trials:
            return cls(0.0, 0.0, _NOMINAL_CHANCE)
        # Mismatched guesses repeat images of few audits; the lower bound keeps their luck from excusing anything.
        return cls(hits / trials, *clopper_pearson(hits, trials, confidence=confidence))


@dataclass(frozen=True)
class _Measured:
    """What a set of records shows: point values, bounds, and how much evidence stands behind them."""

    exposure: float
    exposure_low: float
    exposure_high: float
    excess: float
    excess_low: float
    excess_high: float
    significant: bool
    hits: int
    trials: int
    chance: _Chance
    clean: Clean

    @property
    def risk(self) -> float:
        """The larger of both; NaN where nothing was measured."""
        return float(np.fmax(self.exposure, self.excess))

    @property
    def high(self) -> float:
        return max(self.exposure_high, self.excess_high)


class RiskGate:
    """Decide whether a run's gradients expose the images behind them.

    BLOCK: the risk exceeds the limit; whatever any attack of the run found counts. PASS: with 95% confidence at most a
    tail of the images is exposed beyond the limit *and* excess identification stays below it. Only audits whose attack
    ran and matched the gradient count for that, each distinct image once. UNKNOWN: everything in between, and whenever
    the audits cannot be trusted: none, too old or of unknown age, failed self-test or engine check, faults, an attack
    that did not even match the gradient, or an exact algebraic leak that the attacks did not turn into a copy.

    PASS means that valid audits show no exposure above the limit for an attacker of the stated capacity. It is
    demonstrated, not proven. For a run whose true share of exposed images lies above the tail, the chance of a PASS at
    *any* look of the run is at most 1 - confidence, with `memory="run"` and whatever the correlation within audits.

    Args:
        max_risk: Limit in [0, 1].
        statistic: Of the exposures: "worst" (default), "p90" or "mean".
        tail: Share of images a PASS may leave unbounded.
        confidence: Of every bound.
        memory: "run" (default): the worst of the run counts for good, and its newest window too. "window": only the
            newest window counts, so that an exposure is forgotten after it; the verdict says so.
        window: Newest audited images that make up the window, at least; whole audits are kept, and never fewer than
            a PASS takes.
        independent: What is taken to be independent: "audits" (default), so that a PASS takes 29 audits, or "images",
            which is right only where images of one batch are exposed independently; the verdict says so.
        max_ceiling: Largest `AuditRecord.ceiling` that may pass, in [0, 1]; above it, or without one, PASS becomes
            UNKNOWN. None: the ceiling does not count.
        max_age: Steps after which the newest valid audit is stale; None: ten times the usual distance between the
            audits, and at least 1000.

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
        memory: Memory = "run",
        window: int = 128,
        independent: Independent = "audits",
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
        if memory not in get_args(Memory) or independent not in get_args(Independent):
            raise InvalidInputError(
                f"RiskGate: expected memory 'run' or 'window' and independent 'audits' or 'images', got {memory!r} and "
                f"{independent!r}."
            )
        check_statistic(statistic)
        self.max_risk = max_risk
        self.statistic: Statistic = statistic
        self.tail = tail
        self.confidence = confidence
        self.memory: Memory = memory
        self.window = window
        self.independent: Independent = independent
        self.max_age = max_age
        self.max_ceiling = max_ceiling
        least = units_until(self._bounds_tail, window)
        if least is None:
            raise InvalidInputError(
                f"window: {window} images can never bound a tail of {tail} with confidence {confidence}, so nothing "
                "would ever pass. Use a larger window (29 images suffice for the defaults)."
            )
        self._least_audits = least if independent == "audits" else 1

    def _bounds_tail(self, clean_units: int) -> bool:
        tolerant = self.statistic != "worst"
        return bounds_share(np.zeros(clean_units), self.tail, confidence=self.confidence, tolerant=tolerant)

    def settings(self) -> dict[str, Any]:
        """Return the arguments as plain JSON."""
        return {name: value for name, value in vars(self).items() if not name.startswith("_")}

    def __repr__(self) -> str:
        others = ", ".join(f"{name}={value!r}" for name, value in self.settings().items() if name != "max_risk")
        return f"RiskGate({self.max_risk}, {others})"

    def recent(self, records: Sequence[AuditRecord]) -> list[AuditRecord]:
        """Return the newest records that hold at least `window` images, and as many audits as a PASS takes."""
        kept: list[AuditRecord] = []
        images = audits = 0
        for record in reversed(records):
            if images >= self.window and audits >= self._least_audits:
                break
            kept.append(record)
            images, audits = images + record.batch_size, audits + record.conclusive
        return kept[::-1]

    def judged(self, records: Sequence[AuditRecord]) -> list[AuditRecord]:
        """Return the records that a verdict depends on: the run's, or the window's."""
        return list(records) if self.memory == "run" else self.recent(records)

    def verdict(
        self,
        records: Sequence[AuditRecord],
        *,
        step: int | None = None,
        engine: EngineCheck | None = None,
        engine_required: bool = False,
        faults: Sequence[Fault | tuple[int, str]] = (),
        lost: Losses | None = None,
        damage: Sequence[str] = (),
    ) -> Verdict:
        """Judge a run.

        Args:
            records: Its audits, oldest first.
            step: Where training stands, to judge the age of the newest audit; None: unknown, which cannot pass.
            engine: The run's engine check.
            engine_required: UNKNOWN without a passed engine check.
            faults: What failed in the run.
            lost: Samples that no audit tells of.
            damage: What is wrong with the records' storage.
        """
        lost = Losses() if lost is None else lost
        judged, broken = checks.sound(self.judged(records))
        conclusive = [record for record in judged if record.conclusive]
        since = 0 if self.memory == "run" or not judged else judged[0].step
        newest = max((record.step for record in conclusive), default=None)
        doubts = [
            *(() if judged or broken else ("No audit has finished.",)),
            *damage,
            *broken,
            *checks.self_tests(judged),
            *checks.unattacked(judged),
            *checks.unmatched(judged, self.tail),
            *checks.age(newest, step, checks.usual_age(conclusive) if self.max_age is None else self.max_age),
            *checks.engine_check(engine, required=engine_required),
            *checks.uncopied([record for record in judged if record.valid]),
            *checks.identification(conclusive),
            *checks.ceiling(conclusive, self.max_ceiling),
            *checks.faults([Fault(*each) for each in faults], since),
            *checks.losses(lost, judged),
        ]
        measured = self._measure(judged)
        parts = [measured] if self.memory == "window" else [measured, self._measure(self.recent(judged))]
        if not conclusive and not any(self._findings(part) for part in parts):
            return Verdict.unknown(*doubts, limit=self.max_risk, more_audits=self._audits_needed(measured))
        status, reasons, more = self._decide(parts, conclusive, doubts, lost.share(len(judged)))
        worst = max(parts, key=lambda part: part.risk)
        return Verdict(
            status=status,
            risk=worst.risk,
            low=max(max(part.exposure_low, part.excess_low) for part in parts),
            high=max(part.high for part in parts),
            limit=self.max_risk,
            driver="identification" if worst.excess > worst.exposure else "exposure",
            exposure=max(part.exposure for part in parts),
            excess_identification=worst.excess,
            chance=measured.chance.rate,
            images=len(measured.clean.exposures),
            audits=measured.clean.units if self.independent == "audits" else len(conclusive),
            newest_step=newest,
            dropped_share=lost.share(len(judged)),
            more_audits=more,
            reasons=tuple(reasons),
        )

    def _measure(self, records: Sequence[AuditRecord]) -> _Measured:
        presence, absence = found(records), clean(records, self.independent)
        chance = _Chance.of(records, self.confidence)
        exposure = float(summary(torch.from_numpy(presence.exposures), self.statistic))
        low, high = self._exposure_bounds(presence, absence, exposure)
        rate = presence.hits / presence.trials if presence.trials else math.nan
        hit_low = clopper_pearson(presence.hits, presence.trials, confidence=self.confidence)[0]
        hit_high = upper_share(absence.shares_identified(), confidence=self.confidence)
        return _Measured(
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

    def _decide(
        self, parts: list[_Measured], conclusive: list[AuditRecord], doubts: list[str], dropped: float
    ) -> tuple[Status, list[str], int | None]:
        run, limit = parts[0], self.max_risk
        blocking = [sentence for part in parts for sentence in self._findings(part)]
        if blocking:
            return Status.BLOCK, list(dict.fromkeys(blocking)) + doubts, None
        high = max(part.high for part in parts)
        if high <= limit:
            return (Status.UNKNOWN, doubts, None) if doubts else (
                Status.PASS, [self._pass_sentence(run, conclusive, high, dropped)], None
            )  # fmt: skip
        more = self._audits_needed(run)
        hint = (
            f"{more} more audits of new images without a finding would settle it."
            if more
            else "More audits cannot settle it at this limit."
        )
        n, units = len(run.clean.exposures), run.clean.units
        what = "audits" if self.independent == "audits" else "independent images"
        bound = (
            f"Nothing above {limit:.2f} is established, but {n} distinct images of {units} {what} bound the risk only "
            f"by {high:.2f}."
        )
        if run.clean.anonymous:
            doubts = [
                *doubts,
                f"{run.clean.anonymous} images count for nothing: their records do not tell them apart from others.",
            ]
        return Status.UNKNOWN, [*doubts, bound, hint], more

    def _findings(self, part: _Measured) -> list[str]:
        """Return what was demonstrated, as sentences."""
        limit, sentences = self.max_risk, []
        if part.exposure > limit:
            sentences.append(
                f"The {self.statistic} exposure of audited images is {part.exposure:.2f} (limit {limit:.2f})."
            )
        if part.excess > limit and part.significant:
            sentences.append(
                f"{part.hits} of {part.trials} reconstructions name their image in a gallery, an excess of "
                f"{part.excess:.2f} over chance {part.chance.rate:.2f} (limit {limit:.2f})."
            )
        return sentences

    def _pass_sentence(self, run: _Measured, conclusive: list[AuditRecord], high: float, dropped: float) -> str:
        capacity = f"{conclusive[-1].attack}, {max(record.evaluations for record in conclusive)} evaluations at most"
        images = run.clean
        text = (
            f"With {self.confidence:.0%} confidence at most {self.tail:.0%} of the images of a step are exposed beyond "
            f"{self.max_risk:.2f} ({len(images.exposures)} distinct images in {len(conclusive)} audits, worst "
            f"{run.exposure:.2f}, excess identification {checks.number(run.excess)}, upper bound of the risk "
            f"{high:.2f}). Demonstrated, not proven: the attacker was {capacity}."
        )
        if dropped:
            text += f" {dropped:.0%} of the due samples were dropped unseen."
        if self.memory == "window":
            text += f" Only the newest {self.window} images count: what was found before is forgotten."
        if self.independent == "images":
            text += " The images of an audit are taken to be exposed independently."
        return text

    def _exposure_bounds(self, presence: Found, absence: Clean, exposure: float) -> tuple[float, float]:
        """Return bounds of the statistic; the upper one also bounds all but a tail of the images."""
        values = np.unique(np.append(absence.exposures, 0.0))
        tolerant = self.statistic != "worst"

        def bounded(at: int) -> bool:
            value = float(values[at - 1])
            # Audits weigh alike: many images of few audits must not be outvoted by few images of many.
            few = float((absence.exposures > value).mean()) <= self.tail if len(absence.exposures) else False
            shares = absence.shares_above(value)
            return few and bounds_share(shares, self.tail, confidence=self.confidence, tolerant=tolerant)

        least = units_until(bounded, len(values))
        high = 1.0 if least is None else float(values[least - 1])
        if math.isnan(exposure):
            return 0.0, 1.0
        if self.statistic == "worst":
            return exposure, max(high, exposure)
        low, mean_high = bootstrap_by_audit(presence.by_audit, self.statistic, self.confidence)
        return low, max(high, mean_high)

    def _audits_needed(self, measured: _Measured) -> int | None:
        """Return how many more audits of new images without a finding would bring both bounds under the limit."""
        above = measured.clean.shares_above(self.max_risk)
        named = measured.clean.shares_identified()
        chance = measured.chance.low
        rate = chance + self.max_risk * (1 - chance)  # excess over chance equals the limit here
        tolerant = self.statistic != "worst"

        def settled(more: int) -> bool:
            new = np.zeros(more)
            tail = bounds_share(np.append(above, new), self.tail, confidence=self.confidence, tolerant=tolerant)
            return tail and (
                rate >= 1 or bounds_share(np.append(named, new), rate, confidence=self.confidence, tolerant=True)
            )

        return units_until(settled, _MOST_UNITS) if rate > 0 else None

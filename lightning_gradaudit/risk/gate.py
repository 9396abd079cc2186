"""From audited images to a verdict: risk with bounds, and a gate that fails closed."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Literal, get_args

import numpy as np

from lightning_gradaudit.audit.engine_check import EngineCheck
from lightning_gradaudit.audit.record import AuditRecord
from lightning_gradaudit.errors import InvalidInputError
from lightning_gradaudit.metrics.functional.summary import Statistic, check_statistic
from lightning_gradaudit.risk import actions, checks
from lightning_gradaudit.risk.actions import Doubt
from lightning_gradaudit.risk.checks import Fault, Losses
from lightning_gradaudit.risk.intervals import units_until
from lightning_gradaudit.risk.statistics import Criteria, Independent, Measured, audits_needed, measure
from lightning_gradaudit.risk.verdict import Status, Verdict
from lightning_gradaudit.utils.formatting import numbers_beside

Memory = Literal["run", "window"]


class RiskGate:
    """Decide whether a run's gradients expose the images behind them.

    BLOCK: the risk exceeds the limit; the findings of all attacks of the run count. PASS: with 95% confidence at most a
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
        least = units_until(lambda clean_units: self._criteria.bound(np.zeros(clean_units)), window)
        if least is None:
            raise InvalidInputError(
                f"window: {window} images can never bound a tail of {tail} with confidence {confidence}, so nothing "
                "would ever pass. Use a larger window (29 images suffice for the defaults)."
            )
        self._least_audits = least if independent == "audits" else 1

    @property
    def _criteria(self) -> Criteria:
        return Criteria(
            max_risk=self.max_risk,
            statistic=self.statistic,
            tail=self.tail,
            confidence=self.confidence,
            independent=self.independent,
        )

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
        newest = max((record.step for record in conclusive), default=None)
        failed = checks.faults(faults, 0 if self.memory == "run" or not judged else judged[0].step)
        wired_wrongly = any(Fault(*each).lasting for each in faults)
        nothing = () if judged or broken else checks.nothing_finished(lost, step, self._audits_needed([]))
        doubts = [  # what must be settled first stands first
            *map(Doubt, damage),
            *broken,
            *(failed if wired_wrongly else ()),
            *checks.self_tests(judged),
            *(() if wired_wrongly else failed),
            *nothing,
            *checks.unfinished(judged),
            *checks.engine_check(engine, required=engine_required, records=judged),
            *checks.unattacked(judged),
            *checks.unmatched(judged, self.tail),
            *checks.uncopied([record for record in judged if record.valid]),
            *checks.identification(conclusive),
            *checks.ceiling(conclusive, self.max_ceiling),
            *checks.losses(lost, judged),
            *checks.age(newest, step, checks.usual_age(conclusive) if self.max_age is None else self.max_age),
        ]
        return self._decide(judged, conclusive, doubts, step, lost)

    def _audits_needed(self, records: Sequence[AuditRecord]) -> int | None:
        return audits_needed(measure(records, self._criteria), self._criteria)

    def _decide(
        self,
        judged: list[AuditRecord],
        conclusive: list[AuditRecord],
        doubts: list[Doubt],
        step: int | None,
        lost: Losses,
    ) -> Verdict:
        run = measure(judged, self._criteria)
        parts = [run] if self.memory == "window" else [run, measure(self.recent(judged), self._criteria)]
        findings = list(dict.fromkeys(sentence for part in parts for sentence in self._findings(part)))
        if not conclusive and not findings:
            more = audits_needed(run, self._criteria)
            return Verdict.unknown(*map(str, doubts), limit=self.max_risk, more_audits=more, action=doubts[0].action)
        high, more, dropped = max(part.high for part in parts), None, lost.share(len(judged))
        reasons: Sequence[str]
        if findings:
            status, reasons = Status.BLOCK, [*findings, *doubts]
        elif high > self.max_risk:
            more = audits_needed(run, self._criteria)
            doubts = [*doubts, *self._unsettled(run, conclusive, high, more, step, lost)]
            status, reasons = Status.UNKNOWN, doubts
        elif doubts:
            status, reasons = Status.UNKNOWN, doubts
        else:
            status, reasons = Status.PASS, [self._pass_sentence(run, conclusive, high, dropped)]
        worst = max(parts, key=lambda part: part.risk)
        return Verdict(
            status=status,
            risk=worst.risk,
            low=max(part.low for part in parts),
            high=high,
            limit=self.max_risk,
            driver="identification" if worst.excess > worst.exposure else "exposure",
            exposure=max(part.exposure for part in parts),
            excess_identification=worst.excess,
            chance=run.chance.rate,
            images=len(run.clean.exposures),
            audits=run.clean.units if self.independent == "audits" else len(conclusive),
            newest_step=max((record.step for record in conclusive), default=None),
            dropped_share=dropped,
            more_audits=more,
            reasons=tuple(map(str, reasons)),
            action=doubts[0].action if status is Status.UNKNOWN else "",
            basis="" if status is Status.UNKNOWN else "demonstrated",
        )

    def _unsettled(
        self,
        run: Measured,
        conclusive: list[AuditRecord],
        high: float,
        more: int | None,
        step: int | None,
        lost: Losses,
    ) -> list[Doubt]:
        """Return why the bound is not below the limit, and what would settle it."""
        n, units = len(run.clean.exposures), run.clean.units
        what = "audits" if self.independent == "audits" else "independent images"
        limit, bound = numbers_beside(self.max_risk, high)
        action = f"max_risk={math.ceil(100 * high) / 100:g}" if high < 1 else "a max_risk above 0"
        if more:
            action = actions.for_too_few(more, run.clean.units, conclusive, step, lost)
        doubts = [
            Doubt(
                f"Nothing above {limit} is established, but {n} distinct images of {units} {what} bound the "
                f"risk only by {bound}.",
                action,
            ),
            Doubt(
                f"{more} more audits of new images without a finding would settle it."
                if more
                else "More audits cannot settle it at this limit."
            ),
        ]
        if run.clean.anonymous:
            said = f"{run.clean.anonymous} images do not count: their records do not tell them apart from others."
            doubts.insert(0, Doubt(said, "sample_id=, where the batch holds names of its images"))
        return doubts

    def _findings(self, part: Measured) -> list[str]:
        """Return what was demonstrated, as sentences."""
        sentences = []
        if part.exposure > self.max_risk:
            limit, exposure = numbers_beside(self.max_risk, part.exposure)
            sentences.append(f"The {self.statistic} exposure of audited images is {exposure} (limit {limit}).")
        if part.excess > self.max_risk and part.significant:
            limit, excess = numbers_beside(self.max_risk, part.excess)
            sentences.append(
                f"{part.hits} of {part.trials} reconstructions name their image in a gallery, an excess of "
                f"{excess} over chance {part.chance.rate:.2f} (limit {limit})."
            )
        return sentences

    def _pass_sentence(self, run: Measured, conclusive: list[AuditRecord], high: float, dropped: float) -> str:
        capacity = f"{conclusive[-1].attack}, {max(record.evaluations for record in conclusive)} evaluations at most"
        images = run.clean
        limit, worst, bound, excess = numbers_beside(self.max_risk, run.exposure, high, run.excess)
        excess = excess if run.trials else "not measured"
        text = (
            f"With {self.confidence:.0%} confidence at most {self.tail:.0%} of the images of a step are exposed beyond "
            f"{limit} ({len(images.exposures)} distinct images in {len(conclusive)} audits, worst {worst}, excess "
            f"identification {excess}, upper bound of the risk {bound}). Demonstrated, not proven: the attacker was "
            f"{capacity}."
        )
        if dropped:
            text += f" {dropped:.0%} of the due samples were dropped unseen."
        if self.memory == "window":
            text += f" Only the newest {self.window} images count: what was found before is forgotten."
        if self.independent == "images":
            text += " The images of an audit are taken to be exposed independently."
        return text

"""Reasons not to trust the audits of a run, each with what would settle it; none when nothing is wrong."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import numpy as np
from scipy.stats import mannwhitneyu

from lightning_gradaudit.attacks.reconstruction import Outcome
from lightning_gradaudit.audit.engine_check import REFERENCE_PSNR, EngineCheck
from lightning_gradaudit.audit.record import AuditRecord
from lightning_gradaudit.audit.record_checks import check_record
from lightning_gradaudit.errors import DishonestServerError, InvalidInputError
from lightning_gradaudit.metrics.functional.identification import MIN_GALLERY
from lightning_gradaudit.risk import actions
from lightning_gradaudit.risk.actions import Doubt
from lightning_gradaudit.utils.formatting import number, numbers_beside

USUAL_DISTANCES, LEAST_AGE = 10, 1000
"""Age in steps at which the newest audit is stale: so many usual distances between audits, and never less than that."""
DEPENDENCE_P_VALUE = 0.001
"""p-value below which drops are taken to depend on the step; small, because it is tested at every look."""
FEWEST_DROPS_TO_COMPARE = 5
_FAULTS: WeakKeyDictionary[AuditRecord, str] = WeakKeyDictionary()


class Fault(NamedTuple):
    """Something that went wrong in a run.

    Attributes:
        step: The logger's step.
        message: What happened.
        lasting: Whether it concerns the whole run (how the run is wired), and not one audit.
    """

    step: int
    message: str
    lasting: bool = False


@dataclass
class Losses:
    """Due samples without an audit.

    Attributes:
        dropped: Given up before they were looked at: the queue was full, or the gradient was not finite.
        runs: (first step, last step, count) of dropped samples in a row, oldest first.
        given_up: Audits that had begun and never ended.
        skipped: Not taken, to stay below the largest overhead.
        cut_short: Audits that ended with a record, but before their last rung.
    """

    dropped: int = 0
    runs: list[tuple[int, int, int]] = field(default_factory=list)
    given_up: int = 0
    skipped: int = 0
    cut_short: int = 0

    def drop(self, step: int, *, in_a_row: bool) -> None:
        """Count a dropped sample; `in_a_row` when none was taken since the last one."""
        self.dropped += 1
        if in_a_row and self.runs:
            first, last, count = self.runs[-1]
            self.runs[-1] = (first, max(last, step), count + 1)
        else:
            self.runs.append((step, step, 1))

    def add(self, other: Losses) -> None:
        """Count what another process lost, too."""
        self.dropped += other.dropped
        self.runs += other.runs
        self.given_up += other.given_up
        self.skipped += other.skipped
        self.cut_short += other.cut_short

    def share(self, audits: int) -> float:
        """Return the share of due samples that were dropped, in [0, 1]."""
        due = self.dropped + audits
        return self.dropped / due if due else 0.0

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON."""
        return {
            "dropped": self.dropped, "runs": [list(run) for run in self.runs], "given_up": self.given_up,
            "thinned": self.skipped, **({"cut_short": self.cut_short} if self.cut_short else {}),
        }  # fmt: skip

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Losses:
        """Read what `to_dict` wrote.

        Raises:
            InvalidInputError: When a count is no count.
        """
        keys = {name: name for name in ("dropped", "given_up", "cut_short")} | {"skipped": "thinned"}  # an older name
        counts = {name: values.get(key, 0) for name, key in keys.items()}
        runs = values.get("runs", [])
        shaped = isinstance(runs, list) and all(isinstance(run, (list, tuple)) and len(run) == 3 for run in runs)
        numbers = [*counts.values(), *(number for run in runs for number in run)] if shaped else []
        if not shaped or any(not isinstance(n, int) or isinstance(n, bool) or n < 0 for n in numbers):
            raise InvalidInputError(f"evidence: expected counts of lost samples, got {str(values)[:80]!r}.")
        return cls(**counts, runs=[(run[0], run[1], run[2]) for run in runs])


def sound(records: Sequence[AuditRecord]) -> tuple[list[AuditRecord], list[Doubt]]:
    """Return the records whose fields are within their ranges, and a sentence about the others."""
    kept, broken = [], []
    for record in records:
        fault = _fault_of(record)
        if fault:
            broken.append(fault)
        else:
            kept.append(record)
    said = f"{len(broken)} records hold numbers that no audit can have measured"
    return kept, [Doubt(f"{said} ({broken[0]})")] if broken else []


def nothing_finished(lost: Losses, step: int | None, needed: int | None) -> list[Doubt]:
    """Say that there is no audit; `needed` is how many a PASS takes."""
    return [Doubt("No audit has finished.", actions.for_nothing_finished(lost, step, needed))]


def _fault_of(record: AuditRecord) -> str:
    """Return what is wrong with a record, or nothing; checked once for each: a run is judged after every audit."""
    if not isinstance(record, AuditRecord):
        return f"expected a record, got {type(record).__name__}"
    if record not in _FAULTS:
        fault = ""
        try:
            check_record(record)
        except (InvalidInputError, TypeError, ValueError, AttributeError) as error:
            fault = str(error)
        _FAULTS[record] = fault
    return _FAULTS[record]


def self_tests(records: Sequence[AuditRecord]) -> list[Doubt]:
    """Audits whose simulated gradient is not the captured one, or whose attack did not return numbers."""
    broken = [record for record in records if not record.valid]
    if not broken:
        return []
    newest = broken[-1]
    self_test, tolerance = f"{newest.self_test:.1e}", f"{newest.self_test_tolerance:.0e}"
    return [
        Doubt(
            f"{len(broken)} of {len(records)} audits are invalid (newest: step {newest.step}, self-test error "
            f"{self_test}, at most {tolerance}, outcome {newest.outcome}): the simulator does not describe the step, "
            "or the attack broke.",
            actions.for_invalid(newest),
        )
    ]


def unfinished(records: Sequence[AuditRecord]) -> list[Doubt]:
    """Whether all audits are still at an early rung, so that none is evidence of absence; and what they found."""
    if not records or any(record.finished for record in records):
        return []
    furthest = max(record.evaluations for record in records)
    said = (
        f"{_what_they_found(records)}. None of {len(records)} audits has ended its last rung (the furthest: {furthest} "
        "evaluations): what they found counts, but that they found no more shows nothing yet."
    )
    return [Doubt(said, actions.WAIT_LONGER)]


def _what_they_found(records: Sequence[AuditRecord]) -> str:
    """Return what the images of audits came to, attacked with however few evaluations."""
    exposures = np.concatenate([record.exposure.numpy() for record in records])
    names = np.concatenate([record.identified.numpy() for record in records])
    ceilings = [float(record.ceiling.max()) for record in records if record.ceiling is not None]
    text = f"Of {len(exposures)} audited images the most exposed reached {number(float(np.fmax.reduce(exposures)))}"
    if not np.isnan(names).all():
        text += f", {int(np.nansum(names))} of {int((~np.isnan(names)).sum())} were named in a gallery"
    return text + (f", and any attacker could get up to {number(max(ceilings))}" if ceilings else "")


def unattacked(records: Sequence[AuditRecord]) -> list[Doubt]:
    """Audits in which no attack ran."""
    inert = [record for record in records if record.outcome is Outcome.NOT_APPLICABLE]
    why = f" ({inert[-1].reason})" if inert and inert[-1].reason else ""
    said = f"No attack applied to {len(inert)} of {len(records)} audits{why}."
    return [Doubt(said, actions.USE_DEFAULT_ATTACK)] if inert else []


def unmatched(records: Sequence[AuditRecord], tail: float) -> list[Doubt]:
    """Images of audits whose attack did not match the gradient, when they are more than the tail."""
    attacked = [record for record in records if record.valid and record.attacked and record.finished]
    failed = [record for record in attacked if record.unmatched]
    images, lost = sum(r.batch_size for r in attacked), sum(r.batch_size for r in failed)
    if lost <= tail * images:
        return []
    return [
        Doubt(
            f"In {len(failed)} of {len(attacked)} audits ({lost} of {images} images) the attack did not match the "
            "gradient half as well as the true images do: it failed, so its scores say nothing about the images.",
            actions.for_unmatched(failed),
        )
    ]


def age(newest: int | None, step: int | None, limit: int) -> list[Doubt]:
    """Whether the newest audit that counts is too old; an unknown age is a doubt."""
    if newest is None:
        return []
    if step is None:
        said = "The age of the newest audit is unknown: the step at which training stood was not recorded."
        return [Doubt(said, "judge the checkpoint, or the run folder after the run has ended: both hold the step")]
    if step < newest:
        return [
            Doubt(f"The newest audit is of step {newest}, but training stood at step {step}: one of them is wrong.")
        ]
    if step - newest > limit:
        often = f"audit to the end of training (every_n_steps={max(1, limit // 2)}), once after step {step - limit - 1}"
        return [Doubt(f"The newest valid audit is {step - newest} steps old (at most {limit}).", often)]
    return []


def usual_age(records: Sequence[AuditRecord]) -> int:
    """Return ten times the usual distance between audits, at least 1000 steps."""
    gaps = np.diff(sorted({record.step for record in records}))
    return max(LEAST_AGE, int(USUAL_DISTANCES * np.median(gaps))) if len(gaps) else LEAST_AGE


def engine_check(engine: EngineCheck | None, *, required: bool, records: Sequence[AuditRecord] = ()) -> list[Doubt]:
    """Whether the attacks recover the built-in reference."""
    if engine is None:
        return [Doubt("The engine check has not finished.", actions.WAIT_LONGER)] if required else []
    reached = engine.psnr.values()
    if engine.passed is True and reached and all(value >= REFERENCE_PSNR for value in reached):
        return []
    if engine.passed is True:
        return [Doubt(f"The engine check contradicts itself: {engine}.")]
    return [Doubt(f"The {engine}.", actions.larger_budget(records))]


def uncopied(records: Sequence[AuditRecord]) -> list[Doubt]:
    """Images that a closed form recovers exactly but no attack copied."""
    count = sum(record.uncopied_leaks for record in records)
    if not count:
        return []
    return [
        Doubt(
            f"{count} images are given away exactly, as closed forms show, but the attacks did not copy them: "
            "the attacks failed, and the gradient holds the images.",
            actions.for_uncopied([record for record in records if record.uncopied_leaks]),
        )
    ]


def identification(records: Sequence[AuditRecord]) -> list[Doubt]:
    """Whether identification was measured at all."""
    if not records or not all(bool(record.identified.isnan().all()) for record in records):
        return []
    gallery = max(record.gallery for record in records)
    said = f"Identification was not measured: {gallery} of {MIN_GALLERY} gallery images."
    return [Doubt(said, actions.for_unidentified(gallery))]


def ceiling(records: Sequence[AuditRecord], limit: float | None) -> list[Doubt]:
    """Whether any attacker could get more than allowed, by the analysis' local estimate."""
    if limit is None:
        return []
    doubts = []
    missing = [record for record in records if record.ceiling is None]
    if missing:
        why = f" ({missing[-1].reason})" if missing[-1].reason else ""
        said = f"{len(missing)} of {len(records)} audits have no ceiling{why}; it needs analysis=True."
        doubts.append(Doubt(said, "settings=AuditSettings(analysis=True), or max_ceiling=None"))
    highest = max((float(record.ceiling.max()) for record in records if record.ceiling is not None), default=0.0)
    if not highest <= limit:  # NaN is above every limit
        most, could = numbers_beside(limit, highest)
        doubts.append(
            Doubt(
                f"A better attacker could get up to {could} of an image (max_ceiling {most}).",
                "a larger batch or noise (DP-SGD), which lower the ceiling; more audits do not",
            )
        )
    return doubts


def faults(failed: Sequence[Fault | tuple[int, str]], since: int) -> list[Doubt]:
    """Audits that failed since a step, and faults that concern the whole run, which always count."""
    counted = [Fault(*each) for each in failed]
    counted = [fault for fault in counted if fault.lasting or fault.step >= since]
    signs = [fault for fault in counted if DishonestServerError.SIGN in fault.message]
    counted = [fault for fault in counted if fault not in signs]
    doubts = [Doubt(f"{each.message.rstrip('.')} (step {each.step}).", actions.ASK_THE_SERVER) for each in signs[-1:]]
    if not counted:
        return doubts
    shown = next((fault for fault in reversed(counted) if fault.lasting), counted[-1])
    said = f"{len(counted)} audits failed or could not be trusted (step {shown.step}: {shown.message.rstrip('.')})."
    return [*doubts, Doubt(said, actions.for_fault(shown.step, shown.message))]


def losses(lost: Losses, records: Sequence[AuditRecord]) -> list[Doubt]:
    """Samples without an audit, where they may differ from those that were audited.

    A full queue drops a sample before it is looked at. That is no doubt as long as the dropped samples lie at the same
    steps of training as the audited ones (Mann-Whitney's test).
    """
    doubts = []
    if lost.given_up:
        said = (
            f"{lost.given_up} audits were given up before they ended: those that take long may differ from the others."
        )
        doubts.append(Doubt(said, actions.WAIT_LONGER))
    if lost.cut_short:
        said = (
            f"{lost.cut_short} audits ended before their last rung because time was up: those that take long may "
            "differ from the others."
        )
        doubts.append(Doubt(said, actions.WAIT_LONGER))
    if lost.dropped != sum(count for *_, count in lost.runs):
        doubts.append(Doubt(f"{lost.dropped} samples were dropped, and it is not on record at which steps."))
    elif min(lost.dropped, len(records)) >= FEWEST_DROPS_TO_COMPARE:
        steps = np.concatenate([np.linspace(first, last, count) for first, last, count in lost.runs])
        audited = np.array([record.step for record in records], dtype=float)
        if float(mannwhitneyu(steps, audited).pvalue) < DEPENDENCE_P_VALUE:
            where = "later" if np.median(steps) > np.median(audited) else "earlier"
            said = (
                f"{lost.dropped} samples were dropped, and they lie {where} in training than the audited ones, which "
                "do not represent them."
            )
            doubts.append(Doubt(said, actions.for_losses(lost, records)))
    return doubts

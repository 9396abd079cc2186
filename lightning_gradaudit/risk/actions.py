"""What would settle a doubt: for each the one change of an argument, with its value, that removes it soonest."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Protocol

import numpy as np

from lightning_gradaudit.attacks.reconstruction import Outcome
from lightning_gradaudit.audit.record import AuditRecord
from lightning_gradaudit.audit.self_test import PROCESS_RANDOMNESS
from lightning_gradaudit.metrics.functional.identification import MIN_GALLERY

if TYPE_CHECKING:
    from typing_extensions import Self

WAIT_LONGER = "limits=Limits(final_wait_seconds=600), so that audits under way end before the run does"
TRAIN_AGAIN = "train again with GradAudit in a new folder (dirpath=), and judge its files as they were written"
ASK_THE_SERVER = "do not train on these weights; compare them with those of other clients, and ask who sent them"
USE_DEFAULT_ATTACK = "attack=None, the default, which tries several attacks"
LEAST_BUDGET, BUDGET_FACTOR = 1600, 4
"""Evaluations that are proposed at least, and relative to those that were spent in vain."""
FAULT_ACTIONS = (  # (what the fault's message says, what to do)
    ("out of memory", "settings=AuditSettings(device='cpu'), so that audits run in main memory"),
    ("executor cancelled", "executor='thread', which loses no worker"),
    ("ended with", "executor='thread', which loses no worker"),
    ("WITHOUT differential privacy", "give the Trainer the optimizer that Opacus' make_private returns"),
    ("Opacus declares a noise multiplier", "give the Trainer the optimizer that Opacus' make_private returns"),
    ("no second derivative", "use an operation with a second derivative in its place, and train again"),
)


class Lost(Protocol):
    """Counts of due samples without an audit; see `checks.Losses`."""

    dropped: int
    given_up: int
    skipped: int


class Doubt(str):
    """A sentence about why a run cannot be judged.

    Attributes:
        action: What would settle it, as a phrase without a full stop.
    """

    __slots__ = ("action",)
    action: str

    def __new__(cls, sentence: str, action: str = TRAIN_AGAIN) -> Self:
        doubt = super().__new__(cls, sentence)
        doubt.action = action
        return doubt


def for_unnamed(more: int | None) -> str:
    """Return what would settle an UNKNOWN whose gate does not say; `more` audits, where they alone would."""
    return f"make {more} more audit{'s' * (more > 1)} of new images" if more else TRAIN_AGAIN


def larger_budget(records: Sequence[AuditRecord]) -> str:
    """Return a budget larger than what was spent in vain."""
    spent = max((record.evaluations for record in records), default=0)
    return f"budget=Budget(evaluations={max(LEAST_BUDGET, BUDGET_FACTOR * spent)})"


def for_invalid(record: AuditRecord) -> str:
    """Return what would make an invalid audit valid."""
    if record.self_test <= record.self_test_tolerance:  # what broke is the attack
        return USE_DEFAULT_ATTACK
    if PROCESS_RANDOMNESS in record.reason:
        return "executor='process', whose workers replay numpy's and Python's random numbers"
    return (
        "loss=, a function of (outputs, labels), in place of the training step; or move whatever differs between two "
        "calls of the step into the data set"
    )


def for_unmatched(records: Sequence[AuditRecord]) -> str:
    """Return what would make attacks match that did not."""
    newest = records[-1]
    if math.isnan(newest.gradient_similarity):
        return "threat_model=ThreatModel(labels_known=True), for the attack found no labels"
    return larger_budget(records) if newest.outcome is Outcome.BUDGET_SPENT else USE_DEFAULT_ATTACK


def for_uncopied(records: Sequence[AuditRecord]) -> str:
    """Return what would copy the images that closed forms recover."""
    tried = all("LinearLayerInversion" in record.attack for record in records)
    return larger_budget(records) if tried else "settings=AuditSettings(closed_forms=True), which copies these images"


def for_unidentified(gallery: int) -> str:
    """Return what would let identification be measured."""
    return f"gallery=, a tensor of {MIN_GALLERY} or more images of the kind that is trained on ({gallery} were found)"


def for_fault(step: int, message: str) -> str:
    """Return what would avoid a fault."""
    known = (action for said, action in FAULT_ACTIONS if said in message)
    return next(known, f"do what the message of step {step} says, and train again")


def for_losses(lost: Lost, records: Sequence[AuditRecord]) -> str:
    """Return what would keep samples from being dropped."""
    spent = max((record.evaluations for record in records), default=0)
    affordable = int(spent * len(records) / max(1, len(records) + lost.dropped))
    if not affordable:
        return f"limits=Limits(queue_size={len(records) + lost.dropped}), which drops no sample"
    return f"budget=Budget(evaluations={affordable}), which drops no sample"


def for_nothing_finished(lost: Lost, step: int | None, needed: int | None) -> str:
    """Return what would make the first audits."""
    if lost.given_up or lost.dropped:
        return WAIT_LONGER
    if lost.skipped:
        return "limits=Limits(max_overhead=None), which skips no audit"
    needed = 1 if needed is None else needed
    if step is not None and step >= needed:
        return f"every_n_steps={step // needed}, which would have made {needed} audits in this run"
    return f"train for {needed} steps or more with every_n_steps=1"


def for_too_few(more: int, units: int, records: Sequence[AuditRecord], step: int | None, lost: Lost) -> str:
    """Return what would make as many further audits.

    Args:
        more: Audits that are missing.
        units: Audits that count already.
        records: All that were made.
        step: Where training stands.
        lost: Samples without an audit.
    """
    steps = sorted({record.step for record in records})
    usual = int(np.median(np.diff(steps))) if len(steps) > 1 else None
    every = (step or 0) // (units + more)
    text = for_unnamed(more)
    if every and (usual is None or every < usual):
        return f"{text} (every_n_steps={every} would have made them in this run)"
    if lost.skipped >= more:
        return f"{text} (limits=Limits(max_overhead=None) would not have skipped {lost.skipped})"
    if lost.dropped >= more:
        return f"{text} ({for_losses(lost, records)})"
    return text if usual is None else f"{text} (train {more * usual} steps longer)"

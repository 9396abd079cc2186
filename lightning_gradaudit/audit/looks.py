"""What further looks at the same images add to an audit."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from lightning_gradaudit.attacks.sequence import SequentialAttack
from lightning_gradaudit.audit.engine import audit_snapshot
from lightning_gradaudit.audit.record import AuditRecord
from lightning_gradaudit.audit.settings import AuditSettings, SettingsChanges, changed_settings
from lightning_gradaudit.errors import InvalidInputError
from lightning_gradaudit.metrics.baseline import Baseline
from lightning_gradaudit.simulation.looks import SnapshotOfLooks
from lightning_gradaudit.simulation.snapshot import Snapshot

if TYPE_CHECKING:
    from typing_extensions import Unpack


def audit_looks(
    snapshots: Sequence[Snapshot],
    settings: AuditSettings | None = None,
    *,
    counts: Sequence[int] | None = None,
    baseline: Baseline | None = None,
    **changes: Unpack[SettingsChanges],
) -> list[AuditRecord]:
    """Audit what an adversary gets who sees the same images in several rounds, at different weights.

    A candidate is matched to all looks together: the objective is over the gradients of all of them, one evaluation
    simulates each once. Closed forms and labels use the first look, and batch statistics from buffers are left out.

    Args:
        snapshots: Steps on the same images in the same order, for instance of a client with one fixed batch.
        settings: How to audit; None: `AuditSettings()`. The attack must be one by gradient matching; None:
            `SequentialAttack()`. Analysis and confirmation are for single looks.
        counts: Numbers of looks to audit, the first ones of `snapshots`; None: 1, 2 and 5 as far as there are so many,
            and all.
        baseline: As for `audit_snapshot`.
        changes: Fields of `AuditSettings` by name.

    Returns:
        A record for each count; its `threat_model["looks"]` says how many.

    Raises:
        InvalidInputError: When the images differ, or a count is out of range.
    """
    settings = changed_settings(settings, changes, caller="audit_looks()")
    if settings.analysis or settings.confirm:
        raise InvalidInputError("analysis, confirm: these are measured on single looks; use audit_snapshot for them.")
    attack = SequentialAttack() if settings.attack is None else settings.attack
    total = len(snapshots)
    wanted = sorted({k for k in (1, 2, 5) if k <= total} | {total}) if counts is None else list(counts)
    if not total or any(not 1 <= k <= total for k in wanted):
        raise InvalidInputError(f"counts: expected numbers of looks in 1..{total}, got {wanted}.")
    SnapshotOfLooks.of(snapshots)  # refuse other images before the first audit
    found = []
    for count in wanted:
        joint = SnapshotOfLooks.of(snapshots[:count])
        record = audit_snapshot(joint, replace(settings, attack=attack), baseline=baseline)
        found.append(replace(record, threat_model=record.threat_model | {"looks": count}))
    return found

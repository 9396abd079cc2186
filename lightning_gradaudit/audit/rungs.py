"""An audit in rungs: a short attack first, then longer ones. Each result updates the record of the same audit."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from lightning_gradaudit.attacks.budget import Budget
from lightning_gradaudit.attacks.reconstruction import Outcome
from lightning_gradaudit.audit.record import AuditRecord
from lightning_gradaudit.audit.settings import AuditSettings

SHORT_RUNGS = (20, 100)
"""Evaluations of the rungs before the last one, which has what the budget says."""
LEAST_GROWTH = 4
"""Evaluations of the last rung over those of a short one: with less between them, the short one is left out."""
UNUSED = 2
"""Evaluations that an attack may leave of its budget, because its next step would take more."""
MEASURED_ONCE = 1
"""Index of the rung that also makes the analysis and the confirmation; the first one is to be quick."""
_MISSING = ("no ceiling:", "not confirmed:")


def rungs_of(settings: AuditSettings) -> list[AuditSettings]:
    """Return the settings of each rung of an audit; one rung where the budget is small or has no count."""
    total = settings.budget.evaluations
    if not settings.rungs or total is None or total <= max(SHORT_RUNGS):
        return [settings]
    counts = [*(count for count in SHORT_RUNGS if count * LEAST_GROWTH <= total), total]
    return [
        replace(
            settings,
            budget=replace(settings.budget, evaluations=count),
            analysis=settings.analysis if index == MEASURED_ONCE else False,
            confirm=settings.confirm if index == MEASURED_ONCE else 0,
        )
        for index, count in enumerate(counts)
    ]


def combined(before: AuditRecord | None, after: AuditRecord) -> AuditRecord:
    """Return what an audit has found after a further rung: of each image the better of both reconstructions.

    `evaluations` remains the capacity of the longest attack, and not the sum of all; what an earlier rung measured and
    the later one did not is kept. Naming an image had several tries, so the chances of a hit at random add up.

    Args:
        before: The record of the rungs so far; None: there is none.
        after: The record of the new rung alone.
    """
    if before is None:
        return after
    better = before.exposure > after.exposure.nan_to_num(-1.0)  # False where the earlier one was not measured
    leaks = before.exact_leaks.bool() | after.exact_leaks.bool()
    exposure = torch.where(better, before.exposure, after.exposure)
    measured: dict[str, Any] = {
        name: torch.where(better, getattr(before, name), getattr(after, name)) for name in ("psnr", "ssim", "mse")
    }
    kept = [part for part in before.reason.split("; ") if part.startswith(_MISSING)]
    return replace(
        after,
        exposure=exposure,
        exact_leaks=leaks,
        **measured,
        copied=before.copied.bool() | after.copied.bool(),
        identified=torch.fmax(before.identified, after.identified),
        chance_hits=_added_chance(before, after),
        effort=_least(before.effort, after.effort),
        evaluations=max(before.evaluations, after.evaluations),
        seconds=before.seconds + after.seconds,
        reason="; ".join(dict.fromkeys(filter(None, (after.reason, *kept)))),
        ceiling=_raised(before.ceiling if after.ceiling is None else after.ceiling, exposure, leaks),
        leakage=before.leakage if after.leakage is None else after.leakage,
        **(_confirmation(before) if after.confirmed is None else {}),
        pixels=_images(before, after, better),
    )


def ended_early(record: AuditRecord, settings: AuditSettings) -> AuditRecord:
    """Return the record of an audit that will not go on, which says so.

    Args:
        record: Of the rungs that ended.
        settings: Of the last rung.
    """
    most = settings.budget.evaluations
    ended = f"ended after {record.evaluations}{'' if most is None else f' of {most}'} evaluations because time was up"
    return replace(record, reason="; ".join(dict.fromkeys(filter(None, (record.reason, ended)))))


def is_cut(record: AuditRecord, budget: Budget, seconds: float) -> bool:
    """Whether a rung was ended by a limit of time that is not the user's own.

    Args:
        record: Of the rung alone.
        budget: What the user gave it.
        seconds: What it was given; infinite without a limit.
    """
    if math.isinf(seconds) or record.outcome is not Outcome.BUDGET_SPENT:
        return False
    if budget.seconds is not None and budget.seconds <= seconds:
        return False
    return budget.evaluations is None or record.evaluations < budget.evaluations - UNUSED


def _added_chance(before: AuditRecord, after: AuditRecord) -> float:
    if not before.chance_trials or not after.chance_trials:
        return after.chance_hits
    earlier = before.chance_hits * after.chance_trials / before.chance_trials
    return min(float(after.chance_trials), after.chance_hits + earlier)


def _least(before: Tensor | None, after: Tensor | None) -> Tensor | None:
    if before is None or after is None:
        return before if after is None else after
    return torch.fmin(before, after)


def _raised(ceiling: Tensor | None, exposure: Tensor, leaks: Tensor) -> Tensor | None:
    """Return a ceiling that is not below what was reached, and 1 where an image is given away exactly."""
    if ceiling is None:
        return None
    return torch.where(leaks.cpu(), torch.ones_like(ceiling), torch.fmax(ceiling, exposure.to(ceiling))).clamp(0, 1)


def _confirmation(record: AuditRecord) -> dict[str, Any]:
    return {"confirmed": record.confirmed, "confirmed_chance": record.confirmed_chance}


def _images(before: AuditRecord, after: AuditRecord, better: Tensor) -> Tensor | None:
    if before.pixels is None or after.pixels is None:
        return after.pixels
    return torch.where(better[:, None, None, None], before.pixels, after.pixels)

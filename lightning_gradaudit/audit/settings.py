"""The settings of an audit that travel to its worker."""

from __future__ import annotations

from dataclasses import dataclass

from lightning_gradaudit.analysis.ceiling import Analysis
from lightning_gradaudit.attacks.base import Attack
from lightning_gradaudit.attacks.budget import Budget
from lightning_gradaudit.utils.digests import ImageKey


@dataclass(frozen=True, kw_only=True)
class AuditSettings:
    """What every job of one auditor shares; travels to the worker."""

    attack: Attack | None
    budget: Budget
    closed_forms: bool
    analysis: bool | Analysis
    confirm: int
    compile: bool
    seed: int
    device: str | None
    image_key: ImageKey

"""How a step is audited: one object for `GradAudit`, `Auditor` and `audit_snapshot`, which travels to the worker."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Any, TypedDict

import torch

from lightning_gradaudit.analysis.ceiling import Analysis
from lightning_gradaudit.attacks.base import Attack
from lightning_gradaudit.attacks.budget import Budget
from lightning_gradaudit.attacks.defaults import full_attack
from lightning_gradaudit.errors import InvalidInputError


@dataclass(frozen=True, kw_only=True)
class AuditSettings:
    """How each step is audited.

    Args:
        attack: Matching attack; None: `attacks.Auto`, which picks by what is known and by a race.
        budget: Largest effort of all attacks of one audit together.
        closed_forms: Try exact solutions first. Turning them off is for studies, not for audits.
        analysis: Also estimate what any attacker could get of each image (`AuditRecord.ceiling` and `leakage`), and
            which layer gives it away: True, False or settings. None: `GradAudit` does, `Auditor` and `audit_snapshot`
            do not. It costs at most two products with the gradient's Jacobian for each of `Analysis.steps` and a few
            more (83 by default), 28 to 129 training steps' time on the small networks it was measured on;
            `AuditRecord.leakage` says how much it was. Where it fails the ceiling is None and `AuditRecord.reason`
            says why.
        confirm: Also ask, with this many candidate photographs (the batch's own among images of the gallery), whether
            gradients alone name the batch (`AuditRecord.confirmed`, the curve `confirmed`); no part of the risk. 0: do
            not ask. None: 100 in `GradAudit`, 0 elsewhere. It costs one gradient of a single image for each candidate,
            or two of a whole batch under train-mode BatchNorm: for 100, 1 to 6 % of an audit of 400 evaluations, 11 to
            17 % under train-mode BatchNorm (small networks on one core, batches of 4 and 32). It needs a gallery of
            that many images, as large as the model's and no larger than 32 pixels a side, with labels or for classes
            that can be recovered. Where it fails `AuditRecord.reason` says why.
        compile: Compile gradient matching in the background, once per architecture, shapes and attack, while the
            first evaluations run eagerly: an evaluation then costs a half to a third. A compiler takes a core for 10 to
            90 seconds for each attack of a race, so that it pays over a run with many audits and not over a few. Where
            it is impossible the attack goes on eagerly and `AuditRecord.reason` says why.
        rungs: Work in rungs where the budget has more than 100 evaluations: an attack of 20, from 400 on one of 100,
            and then the whole one, each from the start. Each result updates the audit's record at once, with the better
            reconstruction of each image, so that long audits say something early; the analysis comes with the second.
            Only an audit whose last rung ended can show that nothing leaks. It costs up to 120 evaluations more. None:
            `GradAudit` does, `Auditor` does not; `audit_snapshot` returns one record and ignores it.
        seed: Of attacks and defences, together with the step.
        device: Where to attack, e.g. a spare "cuda:1"; None: where the snapshot lies, or the CPU for a process.

    Raises:
        InvalidInputError: When an argument is of the wrong type or out of range.

    Example:
        >>> AuditSettings(budget=Budget(evaluations=50), seed=1).budget
        Budget(evaluations=50, seconds=None)
    """

    attack: Attack | None = None
    budget: Budget = Budget(evaluations=800)
    closed_forms: bool = True
    analysis: bool | Analysis | None = None
    confirm: int | None = None
    compile: bool = False
    rungs: bool | None = None
    seed: int = 0
    device: str | None = None

    def __post_init__(self) -> None:
        full_attack(self.attack, closed_forms=self.closed_forms)
        if not isinstance(self.budget, Budget):
            raise InvalidInputError(f"budget: expected a Budget such as Budget(evaluations=800), got {self.budget!r}.")
        if not isinstance(self.analysis, (bool, Analysis, type(None))):
            raise InvalidInputError(f"analysis: expected True, False, None or an Analysis, got {self.analysis!r}.")
        if self.confirm is not None and (isinstance(self.confirm, bool) or self.confirm < 0):
            raise InvalidInputError(f"confirm: expected a number of candidates >= 0, got {self.confirm!r}.")
        if self.rungs not in (True, False, None):
            raise InvalidInputError(f"rungs: expected True, False or None, got {self.rungs!r}.")
        if isinstance(self.seed, bool) or not isinstance(self.seed, int):
            raise InvalidInputError(f"seed: expected an integer, got {self.seed!r}.")
        try:
            torch.device("cpu" if self.device is None else self.device)
        except RuntimeError as error:
            raise InvalidInputError(f"device: expected a name such as 'cuda:1', got {self.device!r}.") from error

    def with_defaults(self, *, analysis: bool, confirm: int, rungs: bool = False) -> AuditSettings:
        """Return these settings with what was left to the caller (None) filled in."""
        return replace(
            self,
            analysis=analysis if self.analysis is None else self.analysis,
            confirm=confirm if self.confirm is None else self.confirm,
            rungs=rungs if self.rungs is None else self.rungs,
        )


class SettingsChanges(TypedDict, total=False):
    """Fields of `AuditSettings` that a call gives by name."""

    attack: Attack | None
    budget: Budget
    closed_forms: bool
    analysis: bool | Analysis | None
    confirm: int | None
    compile: bool
    rungs: bool | None
    seed: int
    device: str | None


def changed_settings(settings: AuditSettings | None, changes: Mapping[str, Any], *, caller: str) -> AuditSettings:
    """Return settings, or the default ones, with some fields changed.

    Args:
        settings: None: the default ones.
        changes: Values by the names of fields.
        caller: Whose keywords these are, for the message.

    Raises:
        TypeError: When a name is no field, naming it.
    """
    known = [field.name for field in fields(AuditSettings)]
    unknown = ", ".join(repr(name) for name in changes if name not in known)
    if unknown:
        raise TypeError(f"{caller} got an unexpected keyword argument {unknown}; settings are {', '.join(known)}.")
    return replace(AuditSettings() if settings is None else settings, **changes)

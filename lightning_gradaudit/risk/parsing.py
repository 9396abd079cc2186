"""Reading the parts of stored evidence; a part of another type or range raises `InvalidInputError`."""

from __future__ import annotations

import math
from typing import Any

from lightning_gradaudit.audit.engine_check import EngineCheck
from lightning_gradaudit.errors import InvalidInputError
from lightning_gradaudit.risk.checks import Fault, Losses

MOST_DROPPED = 10_000_000
"""Most dropped samples that are believed: judging spreads them over their steps, which takes memory for each."""


def read_fault(step: Any, message: Any, lasting: Any = False) -> Fault:
    """Read a fault."""
    if not isinstance(lasting, bool):
        raise InvalidInputError(f"evidence: expected a fault to last or not, got {lasting!r}.")
    known = read_step(step)
    if known is None:
        raise InvalidInputError("evidence: a fault has no step.")
    return Fault(known, read_text(message), lasting)


def read_engine_check(values: Any) -> EngineCheck:
    """Read the result of an engine check."""
    passed, psnr = values["passed"], values["psnr"]
    numbers = isinstance(psnr, dict) and all(
        isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
        for value in psnr.values()
    )
    if not isinstance(passed, bool) or not numbers or set(values) - {"passed", "psnr"}:
        raise InvalidInputError(f"evidence: not the result of an engine check: {str(values)[:80]!r}.")
    return EngineCheck(passed=passed, psnr={read_text(name): float(value) for name, value in psnr.items()})


def read_step(value: Any) -> int | None:
    """Read a step, or None where it is unknown."""
    if value is not None and (not isinstance(value, int) or isinstance(value, bool) or value < 0):
        raise InvalidInputError(f"evidence: expected a step >= 0, got {value!r}.")
    return value


def read_text(value: Any) -> str:
    """Read a text."""
    if not isinstance(value, str):
        raise InvalidInputError(f"evidence: expected text, got {value!r}.")
    return value


def read_run_id(value: Any) -> str:
    """Read a run's identity."""
    if not read_text(value):
        raise InvalidInputError("evidence: expected the identity of a run, got an empty text.")
    return str(value)


def read_losses(values: Any) -> Losses:
    """Read what was lost; judging spreads the dropped samples over their steps, which takes memory for each."""
    lost = Losses.from_dict(values)
    counted = sum(count for *_, count in lost.runs)
    if counted > MOST_DROPPED or any(last < first for first, last, _ in lost.runs):
        raise InvalidInputError(
            f"evidence: expected at most {MOST_DROPPED} dropped samples, each from a first step to a last, got "
            f"{str(lost.runs)[:80]}."
        )
    return lost


def read_texts(values: Any) -> dict[str, str]:
    """Read settings as texts by name."""
    if not isinstance(values, dict):
        raise InvalidInputError(f"evidence: expected settings, got {values!r}.")
    return {read_text(key): read_text(value) for key, value in values.items()}

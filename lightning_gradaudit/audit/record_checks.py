"""What each field of an audit record may hold."""

from __future__ import annotations

import math
from typing import Any, NamedTuple, get_args

from torch import Tensor

from lightning_gradaudit.attacks.reconstruction import Outcome
from lightning_gradaudit.errors import InvalidInputError
from lightning_gradaudit.metrics.functional.similarity import Similarity

LARGEST_TOLERANCE = 5e-2
"""Largest error of the simulated gradient that any precision may call rounding."""
SLACK = 1e-4
"""What rounding may add to a bound of float32 scores."""


class Rule(NamedTuple):
    """What a numeric field may hold.

    Attributes:
        low, high: Least and largest value.
        nan: Whether NaN says "not measured".
        images: One value for each image, (B,), and not one for the batch.
        optional: Whether None says "not tried".
        whole: Whole numbers only.
        flag: 0 or 1 only.
    """

    low: float
    high: float = math.inf
    nan: bool = False
    images: bool = False
    optional: bool = False
    whole: bool = False
    flag: bool = False


RULES = {
    "exposure": Rule(0, 1, nan=True, images=True),
    "psnr": Rule(0, 200, nan=True, images=True),
    "ssim": Rule(-1, 1, nan=True, images=True),
    "mse": Rule(0, 1, nan=True, images=True),
    "identified": Rule(0, 1, nan=True, images=True, flag=True),
    "null": Rule(0, 1, nan=True, images=True),
    "null_exposure": Rule(0, 1, nan=True, images=True, optional=True),
    "exact_leaks": Rule(0, 1, images=True, flag=True),
    "copied": Rule(0, 1, images=True, flag=True),
    "ceiling": Rule(0, 1, nan=True, images=True, optional=True),
    "effort": Rule(0, nan=True, images=True, optional=True),
    "confirmed": Rule(0, 1, nan=True, images=True, optional=True, flag=True),
    "step": Rule(0, whole=True),
    "rank": Rule(0, whole=True),
    "rung": Rule(1, whole=True),
    "rungs": Rule(1, whole=True),
    "audit": Rule(0, whole=True),
    "gallery": Rule(0, whole=True),
    "evaluations": Rule(0, whole=True),
    "chance_trials": Rule(0, whole=True),
    "chance_hits": Rule(0, 1e18),
    "seconds": Rule(0, nan=True),
    "label_accuracy": Rule(0, 1, nan=True),
    "matching_loss": Rule(0, nan=True),
    "gradient_similarity": Rule(-1, 1, nan=True),
    "truth_similarity": Rule(-1, 1, nan=True),
    "self_test": Rule(0, nan=True),
    "self_test_tolerance": Rule(0, LARGEST_TOLERANCE),
    "defence_gap": Rule(0, nan=True),
    "noise": Rule(0, nan=True),
    "declared_noise": Rule(0, nan=True),
    "effort_exposure": Rule(0, 1, nan=True),
    "confirmed_chance": Rule(0, 1, nan=True),
}
"""The numeric fields of `AuditRecord`, in the order in which they are checked."""


def check_record(record: Any) -> None:
    """Make sure that every field of a record is of its type, length and range.

    Raises:
        InvalidInputError: Naming the first that is not.
    """
    _check_types(record)
    for name, share in record.features.items():
        if not isinstance(name, str) or not _is_number(share) or not -SLACK <= share <= 1 + SLACK:
            raise InvalidInputError(f"record: features must be shares in [0, 1] by layer, got {name!r}: {share!r}.")
    for name, rule in RULES.items():
        value = getattr(record, name)
        if not (rule.optional and value is None):
            _check_values(name, rule, value, record.exposure)
    for name in ("ids", "digests"):
        entries = getattr(record, name)
        texts = isinstance(entries, tuple) and all(isinstance(each, str) for each in entries)
        if not texts or len(entries) not in (0, record.batch_size):
            raise InvalidInputError(f"record: {name} must hold {record.batch_size} texts or none, got {entries!r}.")
    if record.rung > record.rungs:
        raise InvalidInputError(f"record: rung must be at most rungs, got {record.rung} of {record.rungs}.")
    if record.chance_hits > record.chance_trials:
        raise InvalidInputError(
            f"record: chance_hits must be at most chance_trials, got {record.chance_hits} of {record.chance_trials}."
        )


def _check_types(record: Any) -> None:
    if not isinstance(record.outcome, Outcome):
        raise InvalidInputError(f"record: outcome must be an Outcome, got {record.outcome!r}.")
    for kind, what, names in (
        (str, "text", ("attack", "measure", "reason", "details", "session")),
        (dict, "a dictionary", ("threat_model", "features")),
        (bool, "True or False", ("null_complete",)),
    ):
        for name in names:
            if not isinstance(getattr(record, name), kind):
                raise InvalidInputError(f"record: {name} must be {what}, got {getattr(record, name)!r}.")
    if record.measure not in get_args(Similarity):
        raise InvalidInputError(f"record: measure must be one of {get_args(Similarity)}, got {record.measure!r}.")


def _check_values(name: str, rule: Rule, value: Any, exposure: Tensor) -> None:
    if rule.images:
        if not isinstance(value, Tensor) or value.ndim != 1 or not 0 < len(value) == len(exposure):
            raise InvalidInputError(
                f"record: {name} must be a tensor of one value for each image of a batch, got {value!r}."
            )
    elif not _is_number(value) or (rule.whole and not isinstance(value, int)):
        raise InvalidInputError(f"record: {name} must be a {'whole ' if rule.whole else ''}number, got {value!r}.")
    values = value.tolist() if rule.images else [value]
    if not all(rule.low - SLACK <= v <= rule.high + SLACK or (rule.nan and math.isnan(v)) for v in values):
        raise InvalidInputError(
            f"record: {name} must lie between {rule.low:g} and {rule.high:g}{' or be NaN' if rule.nan else ''}, got "
            f"{values if len(values) > 1 else values[0]}."
        )
    if rule.flag and not all(v in (0, 1) or math.isnan(v) for v in values):
        raise InvalidInputError(f"record: {name} must be 0 or 1, got {values}.")


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)

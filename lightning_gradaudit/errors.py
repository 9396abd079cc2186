"""Errors that tell the user which argument was wrong, what was expected, what came and what to do."""

from __future__ import annotations

import re

_NUMBER = r"[-+]?(?:\d+(?:\.\d*)?|\.\d+|nan|inf)(?:[eE][-+]?\d+)?"
_NUMBERS = re.compile(rf"{_NUMBER}(?:[\s,;\[\]()]+{_NUMBER})+")
_MOST_INTEGERS = 5
_LONGEST = 300


class GradAuditError(Exception):
    """Base of every error this package raises on purpose."""


class InvalidInputError(GradAuditError, ValueError):
    """An argument has the wrong type, shape, range or content."""


class EmptyBatchError(InvalidInputError):
    """A batch without images (Poisson sampling draws some): there is nothing to audit in it."""


class NonFiniteGradientError(InvalidInputError):
    """A gradient holds NaN or infinity: there is nothing to audit in it."""


class ReplayError(GradAuditError, RuntimeError):
    """The user's training step could not be re-run on a replica of the module."""


class DoubleBackwardError(GradAuditError, RuntimeError):
    """An operation of the model has no second derivative, which every matching attack needs."""


class AuditLostError(GradAuditError, RuntimeError):
    """An audit was given up by its executor."""


class DishonestServerError(GradAuditError, RuntimeError):
    """The weights that a client received look manipulated."""

    SIGN = "The received weights look manipulated"


class UnsupportedError(GradAuditError, RuntimeError):
    """The training set-up cannot be audited as configured."""


def described(error: BaseException) -> str:
    """Return type and message of an error as they may be written down and shown: one short line without tensors.

    Code of the user's, and validations of torch, print the tensors they complain of. Those may be private images,
    their labels, or gradients that give them away. Shapes, which have up to five numbers, stay.
    """
    text = _NUMBERS.sub(_unless_few, " ".join(str(error)[: 10 * _LONGEST].split()))
    text = text if len(text) <= _LONGEST else f"{text[:_LONGEST]}…"
    return text if isinstance(error, GradAuditError) else f"{type(error).__name__}: {text}"


def _unless_few(numbers: re.Match[str]) -> str:
    found = re.findall(_NUMBER, numbers[0])
    return numbers[0] if len(found) <= _MOST_INTEGERS and all(each.isdecimal() for each in found) else "…"

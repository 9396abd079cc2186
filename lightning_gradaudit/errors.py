"""Errors that tell the user which argument was wrong, what was expected, what came and what to do."""

from __future__ import annotations


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


class UnsupportedError(GradAuditError, RuntimeError):
    """The training set-up cannot be audited as configured."""

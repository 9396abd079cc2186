"""How much of training's time an audit takes on its thread, and the limit that thins the schedule."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from types import TracebackType

from lightning_gradaudit.errors import InvalidInputError


@dataclass(frozen=True)
class Spent:
    """What one process has spent so far, in seconds of its training thread.

    Attributes:
        training: In training steps, the audit's own time left out.
        audit: In the audit.
    """

    training: float
    audit: float


class Overhead:
    """Time the training thread, split between training and audit, and say whether another audit fits the limit.

    Used as a context around whatever the audit does on that thread; contexts may lie within each other.

    Args:
        limit: Largest time of the audit over training's own; None: no limit.
        clock: Seconds.

    Attributes:
        thinned: Due audits that were given up.

    Raises:
        InvalidInputError: When the limit is no positive finite number.
    """

    def __init__(self, limit: float | None = None, clock: Callable[[], float] = time.perf_counter) -> None:
        if limit is not None and (isinstance(limit, bool) or not (limit > 0 and math.isfinite(limit))):
            raise InvalidInputError(
                f"max_overhead must be a positive share of training's time such as 0.05, or None, got {limit!r}."
            )
        self.limit, self._clock = limit, clock
        self.skipped = 0
        self._training = self._audit = 0.0
        self._audits = self._depth = 0
        self._entered = 0.0
        self._step: tuple[float, float] | None = None  # when it began, and the audit's time until then

    def step_begins(self) -> None:
        """Start the clock of a training step."""
        self._step = self._clock(), self._audit

    def step_ends(self) -> None:
        """Count a training step, without what the audit took of it. Validation and loading lie between steps."""
        if self._step is not None:
            began, audit = self._step
            self._training += self._clock() - began - (self._audit - audit)
            self._step = None

    def __enter__(self) -> None:
        if self._depth == 0:
            self._entered = self._clock()
        self._depth += 1

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._depth -= 1
        if self._depth == 0:
            self.add(self._clock() - self._entered)

    def add(self, seconds: float) -> None:
        """Count time of the audit that was measured elsewhere on the thread."""
        self._audit += seconds

    def spent(self) -> Spent:
        """Return what this process has spent."""
        return Spent(self._training, self._audit)

    def allows(self, everybody: list[Spent]) -> bool:
        """Decide about a due audit; the same in every process that is given the same.

        The audit to come is expected to cost what the earlier ones did on average, and the slowest process decides:
        the others wait for it. The very first audit is always allowed: nothing is known of its cost.

        Args:
            everybody: What each process has spent.
        """
        expected = 1 + 1 / self._audits if self._audits else 0.0
        fits = all(each.audit * expected <= (self.limit or math.inf) * each.training for each in everybody)
        if fits:
            self._audits += 1
        else:
            self.skipped += 1
        return fits

"""What an audit may cost training: limits, and the time it takes of the training thread."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from types import TracebackType

from lightning_gradaudit.errors import InvalidInputError


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What the audits of a run may cost.

    Args:
        max_overhead: Largest time that the audit may take of the training thread, over the time of the training steps
            themselves (0.05: 5 %): with an executor elsewhere the copying and logging, inline the audits too. Due
            samples that would exceed it are not taken, in all processes alike; they are counted and logged as
            `skipped`. Contention for shared cores is not counted. None: no limit.
        queue_size: Most unfinished audits; further samples are dropped and counted.
        final_wait_seconds: How long to wait for unfinished audits when training ends.

    Raises:
        InvalidInputError: When an argument is out of range.
    """

    max_overhead: float | None = None
    queue_size: int = 4
    final_wait_seconds: float = 120.0

    def __post_init__(self) -> None:
        limit = self.max_overhead
        if limit is not None and (isinstance(limit, bool) or not (limit > 0 and math.isfinite(limit))):
            raise InvalidInputError(
                f"max_overhead must be a positive share of training's time such as 0.05, or None, got {limit!r}."
            )
        if isinstance(self.queue_size, bool) or self.queue_size < 1:
            raise InvalidInputError(f"queue_size must be >= 1, got {self.queue_size!r}.")
        if not self.final_wait_seconds >= 0:
            raise InvalidInputError(f"final_wait_seconds must be >= 0, got {self.final_wait_seconds!r}.")


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
        skipped: Due audits that were not made.
    """

    def __init__(self, limit: float | None = None, clock: Callable[[], float] = time.perf_counter) -> None:
        self.limit, self._clock = limit, clock
        self.skipped = 0
        self._training = self._audit = 0.0
        self._audits = self._depth = 0
        self._entered = 0.0
        self._step: tuple[float, float] | None = None  # when it began, and the audit's time until then

    def step_begins(self) -> None:
        """Note when a training step begins."""
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

"""How much work an attack may do, and the meter that counts it."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass

from lightning_gradaudit.errors import InvalidInputError
from lightning_gradaudit.utils.time_limit import time_left


@dataclass(frozen=True, kw_only=True)
class Budget:
    """Limit an attack by gradient evaluations, by seconds, or by both (whichever comes first).

    Args:
        evaluations: Largest number of simulated gradients (one L-BFGS step may spend up to 25 of them).
        seconds: Wall-clock limit. Results under it depend on the machine's speed.

    Raises:
        InvalidInputError: When neither limit is given, or one is not positive.

    Example:
        >>> Budget(evaluations=400)
        Budget(evaluations=400, seconds=None)
    """

    evaluations: int | None = None
    seconds: float | None = None

    def __post_init__(self) -> None:
        if self.evaluations is None and self.seconds is None:
            raise InvalidInputError("Budget needs evaluations= or seconds=, or an attack would never end; got neither.")
        counts = isinstance(self.evaluations, int) and not isinstance(self.evaluations, bool) and self.evaluations >= 1
        if self.evaluations is not None and not counts:
            raise InvalidInputError(f"Budget(evaluations=) must be an integer >= 1, got {self.evaluations!r}.")
        if self.seconds is not None and not (self.seconds > 0 and math.isfinite(self.seconds)):
            raise InvalidInputError(f"Budget(seconds=) must be a positive finite number, got {self.seconds!r}.")


class Meter:
    """Count evaluations against a budget; `exhausted` is read before each new one."""

    def __init__(self, budget: Budget) -> None:
        self.budget = budget
        self.evaluations = 0
        self._start = time.monotonic()

    def spend(self, evaluations: int = 1) -> None:
        """Record that this many gradients were simulated."""
        self.evaluations += evaluations

    @property
    def remaining(self) -> float:
        """Evaluations left; infinite when only seconds are limited."""
        return math.inf if self.budget.evaluations is None else self.budget.evaluations - self.evaluations

    @property
    def exhausted(self) -> bool:
        """Whether one more evaluation would exceed the budget, or the time of the work around it."""
        out_of_time = self.budget.seconds is not None and self.seconds >= self.budget.seconds
        return self.remaining < 1 or out_of_time or time_left() <= 0

    @property
    def seconds(self) -> float:
        """Seconds since the meter was started."""
        return time.monotonic() - self._start

    @property
    def left(self) -> Budget:
        """The budget that remains; check `exhausted` first."""
        evaluations = None if self.budget.evaluations is None else max(1, int(self.remaining))
        seconds = None if self.budget.seconds is None else max(1e-3, self.budget.seconds - self.seconds)
        return Budget(evaluations=evaluations, seconds=seconds)

"""Which steps are audited: pure functions of the step.

Nothing else may decide, neither the queue nor the clock: all ranks must sample the same steps, or a collective would
wait forever.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

from lightning_gradaudit.errors import InvalidInputError

Schedule = Callable[[int], bool]
"""Maps the index of a training batch since the start of the run (0, 1, ...) to "audit this one"."""


@dataclass(frozen=True)
class EveryNSteps:
    """Audit steps `offset`, `offset + n`, `offset + 2n`, ...

    Example:
        >>> [step for step in range(10) if EveryNSteps(4)(step)]
        [0, 4, 8]
    """

    n: int
    offset: int = 0

    def __post_init__(self) -> None:
        if isinstance(self.n, bool) or not isinstance(self.n, int) or self.n < 1:
            raise InvalidInputError(
                f"every_n_steps must be an integer >= 1, got {self.n!r}. Use 1 to audit every step, "
                "or leave the callback out to audit none."
            )

    def __call__(self, step: int) -> bool:
        return step >= self.offset and (step - self.offset) % self.n == 0


class AtSteps:
    """Audit exactly the listed steps.

    Example:
        >>> [step for step in range(10) if AtSteps([1, 7])(step)]
        [1, 7]
    """

    def __init__(self, steps: Iterable[int]) -> None:
        self.steps = frozenset(steps)

    def __call__(self, step: int) -> bool:
        return step in self.steps

    def __repr__(self) -> str:
        return f"AtSteps({sorted(self.steps)})"

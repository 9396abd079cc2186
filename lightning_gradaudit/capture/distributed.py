"""Exchange between the processes of a data-parallel run, on its own process group.

Every call is a collective, so that all processes must make it at the same points: these may depend on the step, never
on a queue or a clock.
"""

from __future__ import annotations

from typing import Any

from torch import distributed


class ProcessGroup:
    """The processes of a run.

    Training's own process group is not used: objects are sent over a gloo group, on the CPU.

    Args:
        world_size: Number of processes.
        rank: This one.
    """

    def __init__(self, world_size: int = 1, rank: int = 0) -> None:
        self.world_size, self.rank = world_size, rank
        self._group: Any = None

    @property
    def is_single(self) -> bool:
        """Whether there is only this process."""
        return self.world_size == 1

    @property
    def is_global_zero(self) -> bool:
        """Whether this process writes logs."""
        return self.rank == 0

    def open(self) -> None:
        """Make the group; a collective."""
        if not self.is_single and self._group is None:
            self._group = distributed.new_group(backend="gloo")

    def close(self) -> None:
        """Drop the group; not a collective, because other processes may have ended."""
        self._group = None

    def gather(self, item: Any) -> list[Any]:
        """Return every process' item, in the order of ranks, in every process; a collective."""
        if self.is_single:
            return [item]
        items: list[Any] = [None] * self.world_size
        distributed.all_gather_object(items, item, group=self._group)
        return items

"""Which weights a replay starts from: those before a batch, or those that its gradient was computed at."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from lightning_gradaudit.simulation.snapshot import Snapshot
from lightning_gradaudit.simulation.training_step import weights_differ


class StartingWeights:
    """Choose, once for a run, between two sets of weights.

    Weights may change between the start of a batch and its gradient: in the training step, as weight clipping does,
    which the replay does again; in a hook or by another optimizer, which it does not. The self-test of the first batch
    where they change decides.

    Attributes:
        are_kept: Whether recorders must keep trained weights from before the first forward pass.
    """

    def __init__(self) -> None:
        self._before: bool | None = None

    @property
    def are_kept(self) -> bool:
        return self._before is not False

    def snapshot(
        self,
        make: Callable[[dict[str, Tensor]], Snapshot],
        after: dict[str, Tensor],
        before: dict[str, Tensor],
        *,
        repeats: bool,
    ) -> Snapshot:
        """Make a snapshot at the weights that the replay starts from.

        Args:
            make: Makes it of all weights.
            after, before: All weights when the gradient was there, and trained ones at the start of the batch.
            repeats: Whether weights that do not change in one batch change in none.
        """
        if before and self._before is None:
            if weights_differ(before, after):
                self._before = make(after | before).self_test().error < make(after).self_test().error
            elif repeats:
                self._before = False
        return make(after | before if before and self._before else after)

"""Several looks at the same images: what a server sees that asks one client round after round."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor

from lightning_gradaudit.errors import InvalidInputError
from lightning_gradaudit.simulation.batch_statistics import LayerStatistics
from lightning_gradaudit.simulation.observation import Observation
from lightning_gradaudit.simulation.snapshot import SelfTest, Snapshot
from lightning_gradaudit.utils.tensors import Tensors


@dataclass(frozen=True, kw_only=True, eq=False)
class Looks(Observation):
    """Observations of the same images at different weights, as one observation for attacks by gradient matching.

    What is shared is the gradients of all looks, those of further looks under names with "look K:" before them; one
    simulation gives them all. Whatever reads one training step (labels, closed forms, layers) reads the first look.

    Attributes:
        looks: All of them, the first included; each with its own weights, buffers and protocol.
    """

    looks: tuple[Observation, ...]

    @classmethod
    def of(cls, looks: Sequence[Observation]) -> Looks:
        """Join observations of the same images in the same order.

        Raises:
            InvalidInputError: When there is none, or their batches differ in shape.
        """
        if not looks or any(each.shape != looks[0].shape for each in looks):
            raise InvalidInputError(
                f"looks: expected at least one observation, all of one shape of batch, got {[o.shape for o in looks]}."
            )
        first = {field.name: getattr(looks[0], field.name) for field in fields(Observation)}
        joined = {
            name: {named(at, key): t for at, look in enumerate(looks) for key, t in getattr(look, name).items()}
            for name in ("gradients", "parameters")
        }
        return cls(**{**first, **joined, "looks": tuple(looks)})

    @property
    def statistics(self) -> dict[str, LayerStatistics]:  # type: ignore[override]
        """None: batch statistics are used for single looks only."""
        return {}

    def leaves(self) -> dict[str, Tensor]:
        return {named(at, key): leaf for at, look in enumerate(self.looks) for key, leaf in look.leaves().items()}

    def loss(self, inputs: Tensor, labels: Tensor, leaves: Tensors | None = None) -> Tensor:
        """Return the loss of the first look."""
        return self.looks[0].loss(inputs, labels, None if leaves is None else self._of_look(0, leaves))

    def simulate(
        self,
        inputs: Tensor,
        labels: Tensor,
        leaves: Tensors | None = None,
        *,
        buffers_after: dict[str, Tensor] | None = None,
    ) -> dict[str, Tensor]:
        weights = self.leaves() if leaves is None else leaves
        found = {}
        for at, look in enumerate(self.looks):
            after = buffers_after if at == 0 else None
            shared = look.simulate(inputs, labels, self._of_look(at, weights), buffers_after=after)
            found.update({named(at, key): t for key, t in shared.items()})
        return found

    def _of_look(self, at: int, leaves: Tensors) -> dict[str, Tensor]:
        return {key: leaves[named(at, key)] for key in self.looks[at].parameters}

    def to(self, device: torch.device | str) -> Looks:
        return replace(Looks.of([look.to(device) for look in self.looks]), labels=_moved(self.labels, device))


def _moved(tensor: Tensor | None, device: torch.device | str) -> Tensor | None:
    return None if tensor is None else tensor.to(device)


def named(at: int, key: str) -> str:
    """Return the name of a parameter in a look."""
    return f"look {at + 1}: {key}" if at else key


@dataclass(frozen=True, eq=False)
class SnapshotOfLooks(Snapshot):
    """Snapshots of the same images, as one; see `Looks`.

    Attributes:
        snapshots: All of them; the fields of a snapshot are those of the first.
    """

    snapshots: tuple[Snapshot, ...] = ()

    @classmethod
    def of(cls, snapshots: Sequence[Snapshot]) -> SnapshotOfLooks:
        """Join snapshots.

        Raises:
            InvalidInputError: When there is none, or their images are not the same in the same order.
        """
        looks = Looks.of([each.observation for each in snapshots])
        first = snapshots[0]
        for each in snapshots[1:]:
            same = torch.equal(each.truth.inputs, first.truth.inputs)
            if not same or not torch.equal(each.truth.labels, first.truth.labels):
                raise InvalidInputError(
                    f"snapshots: expected the same images and labels in the same order, but step {each.step} has "
                    f"others than step {first.step}. Several looks are a client's fixed batch, seen in several rounds."
                )
        return cls(first.step, looks, first.truth, first.protocol, first.seed, first.noiseless, tuple(snapshots))

    def self_test(self) -> SelfTest:
        """Return the worst self-test of all looks."""
        tests = [each.self_test() for each in self.snapshots]
        return max(tests, key=lambda test: max(test.error, test.statistics if test.statistics > 0 else 0.0))

    def to(self, device: torch.device | str) -> SnapshotOfLooks:
        return SnapshotOfLooks.of([each.to(device) for each in self.snapshots])

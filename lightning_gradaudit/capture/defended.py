"""Defences that act in training: which callback applies them, and what leaves afterwards."""

from __future__ import annotations

import logging
from typing import Any, Protocol, runtime_checkable

from lightning_gradaudit.capture.recorders import UpdateRecorder
from lightning_gradaudit.errors import InvalidInputError, UnsupportedError
from lightning_gradaudit.simulation.defences import Defence
from lightning_gradaudit.simulation.threat_model import ThreatModel

log = logging.getLogger(__name__)


@runtime_checkable
class ActingDefences(Protocol):
    """A callback that replaces the gradient of the training step by a defended one."""

    defences: tuple[Defence, ...]

    def seed_at(self, step: int) -> int:
        """Return the seed of the random numbers drawn at a step, the logger's."""
        ...


class DefendedUpdateRecorder(UpdateRecorder):
    """What the optimizer is given after `ApplyDefences`, whichever callback comes first; no clipping is inferred."""

    infers_clip = False


def find_acting_defences(trainer: Any, threat_model: ThreatModel, *, choose_view: bool) -> ActingDefences | None:
    """Return the callback whose defended gradient the adversary sees; None where no defence acts on that view.

    Raises:
        InvalidInputError: When the threat model imagines defences beside those that act.
        UnsupportedError: When the view contains defended gradients in a way that is not simulated.
    """
    found = next((each for each in trainer.callbacks if isinstance(each, ActingDefences)), None)
    if found is None or not found.defences:
        return None
    if threat_model.defences:
        raise InvalidInputError(
            "threat_model: defences= imagines defences, but an ApplyDefences of this Trainer acts in training; "
            "leave defences= out, the acting ones are declared by themselves."
        )
    view = "update" if choose_view else threat_model.view
    if view in ("reduced", "delta"):
        raise UnsupportedError(f"view={view!r} is not defined under ApplyDefences; use view='update', what leaves.")
    if view != "update":
        log.warning("GradAudit: view=%r is the gradient before ApplyDefences; view='update' is what leaves.", view)
        return None
    return found

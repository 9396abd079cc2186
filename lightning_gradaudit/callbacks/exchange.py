"""What the processes of a distributed run tell each other."""

from __future__ import annotations

from dataclasses import dataclass, field

from lightning_gradaudit.audit.engine_check import EngineCheck
from lightning_gradaudit.audit.record import AuditRecord
from lightning_gradaudit.capture.distributed import ProcessGroup
from lightning_gradaudit.risk.checks import Fault, Losses
from lightning_gradaudit.risk.history import AuditHistory


@dataclass
class RankResults:
    """What one process of several has found since they last met.

    Attributes:
        records, faults, lost, engine: As in `AuditHistory`.
    """

    records: list[AuditRecord] = field(default_factory=list)
    faults: list[Fault] = field(default_factory=list)
    lost: Losses = field(default_factory=Losses)
    engine: EngineCheck | None = None


class RankExchange:
    """Hold the history of a run's audits, the same in all processes.

    A single process counts into the history directly. One of several puts its results into an outbox; they enter the
    history of every process when the processes meet.

    Args:
        history: What is known of the run so far.
        ranks: The processes; None: this one alone.
    """

    def __init__(self, history: AuditHistory, ranks: ProcessGroup | None = None) -> None:
        self.history = history
        self.ranks = ProcessGroup() if ranks is None else ranks
        self.outbox = RankResults()
        self._dropping = False

    @property
    def lost(self) -> Losses:
        """Where this process counts lost samples."""
        return self.history.lost if self.ranks.is_single else self.outbox.lost

    def count_sample(self, step: int, *, due: bool, dropped: bool) -> None:
        """Count a dropped sample.

        Args:
            step: The logger's step of the sample.
            due: Whether the schedule samples the present batch; drops of due samples in a row are counted together.
            dropped: Whether the sample was dropped.
        """
        if dropped:
            self.lost.drop(step, in_a_row=self._dropping)
        if due:
            self._dropping = dropped

    def meet(self, engine: EngineCheck | None) -> RankResults:
        """Return what all processes have found since they last met; a collective.

        Args:
            engine: This process' engine check; None while unknown.

        Returns:
            Records in the order of steps and ranks, all faults, and the worst engine check; the same in every process.
        """
        self.outbox.engine = engine
        boxes = self.ranks.gather(self.outbox)
        self.outbox = RankResults()
        for box in boxes:
            self.history.lost.add(box.lost)
        engines = sorted((box.engine for box in boxes if box.engine is not None), key=lambda engine: engine.passed)
        return RankResults(
            records=sorted((r for box in boxes for r in box.records), key=lambda r: (r.step, r.rank)),
            faults=[fault for box in boxes for fault in box.faults],
            engine=engines[0] if engines else None,
        )

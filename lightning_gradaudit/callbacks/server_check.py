"""`ServerCheck`: test received weights before a step is made on them."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any, Literal

from pytorch_lightning import LightningModule, Trainer

from lightning_gradaudit.analysis.round_statistics import RoundStatistics
from lightning_gradaudit.analysis.server_check import MOST_ROUNDS, ServerReport, check_server
from lightning_gradaudit.callbacks.grad_audit import GradAudit
from lightning_gradaudit.callbacks.lightning_compat import resolve_base
from lightning_gradaudit.capture.trainer_state import batch_index, logged_step, weights_version
from lightning_gradaudit.errors import DishonestServerError, InvalidInputError, described
from lightning_gradaudit.simulation.training_step import Loss

if TYPE_CHECKING:
    from pytorch_lightning import Callback
else:
    Callback = resolve_base("callbacks.Callback")

log = logging.getLogger(__name__)

MOST_IN_A_ROW = 3
"""Batches in a row before which the weights changed; beyond them a callback that writes weights is assumed."""


class ServerCheck(Callback):
    """Test the weights that a federated client was sent, before it makes a step on them (see `check_server`).

    Checks are made at the first batch of every fit, at the first batch after a change of weights that no training batch
    made (a new round loaded within a fit), and every n steps. Keep one object for all rounds: its history is what later
    rounds are compared with, and is saved with checkpoints. Where nothing is found, and with "warn", training is
    bit-equal with and without it. A check costs about four training steps. Writes through `.data` within a fit are
    seen at the checks every n steps alone, and so are changes before each of more than three batches in a row.

    A finding makes the verdict of the Trainer's `GradAudit` UNKNOWN, in stamps and run folders too; so does a check
    that fails.

    Args:
        on_suspicion: "warn" (default): log it, and train. "skip": make no step on these weights, and end the fit.
            "raise": raise `DishonestServerError` from `trainer.fit`.
        every_n_steps: Check every n-th training batch as well; None: not.
        false_alarm_rate: Of one check, in (0, 1).
        loss: `loss(module(images), labels)`; None: the module's own `training_step` is replayed.

    Attributes:
        history: Statistics of the rounds in which nothing was found, oldest first.
        reports: Step and report of each check of the last fit.

    Raises:
        InvalidInputError: When an argument is out of range.
    """

    def __init__(
        self,
        *,
        on_suspicion: Literal["warn", "skip", "raise"] = "warn",
        every_n_steps: int | None = None,
        false_alarm_rate: float = 1e-3,
        loss: Loss | None = None,
    ) -> None:
        if on_suspicion not in ("warn", "skip", "raise"):
            raise InvalidInputError(f"on_suspicion: expected 'warn', 'skip' or 'raise', got {on_suspicion!r}.")
        if (every_n_steps is not None and every_n_steps < 1) or not 0 < false_alarm_rate < 1:
            raise InvalidInputError(
                "ServerCheck: expected every_n_steps >= 1 or None and false_alarm_rate in (0, 1), got "
                f"{every_n_steps!r} and {false_alarm_rate!r}."
            )
        self.on_suspicion, self.every_n_steps = on_suspicion, every_n_steps
        self.false_alarm_rate, self.loss = false_alarm_rate, loss
        self.history: list[RoundStatistics] = []
        self.reports: list[tuple[int, ServerReport]] = []
        self._left: tuple[tuple[int, int], ...] | None = None
        self._in_a_row = 0

    def state_dict(self) -> dict[str, Any]:
        """Return the history as plain JSON; it holds no image."""
        return {"history": [each.to_dict() for each in self.history]}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Resume the history; one that cannot be read is begun anew."""
        try:
            self.history = [RoundStatistics.from_dict(each) for each in state_dict.get("history", [])]
        except InvalidInputError as error:
            log.warning("ServerCheck: the history of the resumed run cannot be read: %s", error)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._left, self._in_a_row, self.reports = None, 0, []

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        if self._is_due(trainer, pl_module):
            report = self._check(trainer, pl_module, batch)
            found = report is not None and bool(report.findings)
            if self.on_suspicion != "warn" and trainer.world_size > 1:
                found = trainer.strategy.reduce_boolean_decision(found, all=False)
            if found:
                self._act(trainer, report)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self._left = weights_version(pl_module)

    def _is_due(self, trainer: Trainer, module: LightningModule) -> bool:
        if self._left is None:
            return True
        changed = weights_version(module) != self._left
        self._in_a_row = self._in_a_row + 1 if changed else 0
        scheduled = self.every_n_steps is not None and batch_index(trainer) % self.every_n_steps == 0
        return scheduled or (changed and self._in_a_row <= MOST_IN_A_ROW)

    def _check(self, trainer: Trainer, module: LightningModule, batch: Any) -> ServerReport | None:
        """Make one check, and keep what it found; None where it failed."""
        try:
            report = check_server(
                module, batch, loss=self.loss, history=self.history, false_alarm_rate=self.false_alarm_rate
            )
        except Exception as error:
            log.warning("ServerCheck: the received weights could not be checked: %s", described(error))
            for audit in _audits(trainer):
                audit.faults.add(error, "checking the received weights", lasting=True)
            return None
        self.reports.append((logged_step(trainer), report))
        if report.findings:
            finding = DishonestServerError(f"{DishonestServerError.SIGN}: {report}.")
            log.warning("ServerCheck: %s", finding)
            for audit in _audits(trainer):
                audit.faults.add(finding, lasting=True)
        else:
            self.history = [*self.history, report.statistics][-MOST_ROUNDS:]
        return report

    def _act(self, trainer: Trainer, report: ServerReport | None) -> None:
        """Do what the client wants done on suspicion, in all processes alike."""
        if self.on_suspicion == "raise":
            raise DishonestServerError(f"{DishonestServerError.SIGN}: {report or 'another process says so'}.")
        if self.on_suspicion == "skip":
            trainer.should_stop = True
            raise StopIteration  # Lightning's training loop ends its epoch on it, before the step


def _audits(trainer: Trainer) -> list[GradAudit]:
    return [callback for callback in trainer.callbacks if isinstance(callback, GradAudit)]  # type: ignore[attr-defined]

"""Failures of the audit: kept out of training, counted, and reported once."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from lightning_gradaudit.callbacks.exchange import RankExchange
from lightning_gradaudit.errors import described
from lightning_gradaudit.risk.checks import Fault
from lightning_gradaudit.risk.run_log import RunLog

log = logging.getLogger(__name__)


class FaultLog:
    """Keep failures of the audit out of training, count them, and warn of each once.

    Args:
        exchange: Where faults are counted.
        strict: Raise failures into training as well.
        run_log: Where faults are written as they come; None: nowhere.
        on_failure: Called first at every failure, to remove the hooks of a gradient that is being recorded.
    """

    def __init__(
        self, exchange: RankExchange, *, strict: bool, run_log: RunLog | None, on_failure: Callable[[], None] | None
    ) -> None:
        self.exchange, self.strict, self.run_log, self.on_failure = exchange, strict, run_log, on_failure
        self._warned: set[str] = set()

    @contextmanager
    def guard(self, what: str = "auditing", *, fault: bool = True, lasting: bool = False) -> Iterator[None]:
        """Keep a failure of the block out of training.

        Args:
            what: What the block does, for the message.
            fault: Count the failure, so that the verdict is UNKNOWN. A logger that fails says nothing about the audits.
            lasting: Whether the failure concerns the whole run, and not one audit.

        Raises:
            Exception: The failure, when `strict`.
        """
        try:
            yield
        except Exception as error:
            if self.on_failure is not None:
                self.on_failure()
            if fault:
                self.add(error, what, lasting=lasting)
            else:
                self.warn(f"{what} failed: {described(error)}")
            if self.strict:
                raise

    def add(self, error: Exception, what: str = "", *, lasting: bool = False) -> None:
        """Count an error as a fault; in several processes the others learn of it when they meet."""
        text = described(error)
        fault = Fault(self.exchange.history.step or 0, text, lasting)
        self.warn(f"{what} failed; training goes on and the verdict is UNKNOWN. {text}" if what else text)
        if self.exchange.ranks.is_single:
            self.record(fault)
        else:
            self.exchange.outbox.faults.append(fault)

    def record(self, fault: Fault) -> None:
        """Put a fault into history and run log; one of the whole run once, for a schedule may fail at every step."""
        history = self.exchange.history
        if fault.lasting and any(known.lasting and known.message == fault.message for known in history.faults):
            return
        history.faults.append(fault)
        if self.run_log is not None and self.run_log.path.is_dir():
            try:
                self.run_log.append("fault", {"step": fault.step, "message": fault.message, "lasting": fault.lasting})
            except Exception as problem:
                self.warn(f"the run folder cannot be written: {problem}")

    def warn(self, message: str) -> None:
        """Log a warning, once."""
        if message not in self._warned:
            self._warned.add(message)
            log.warning("GradAudit: %s", message)

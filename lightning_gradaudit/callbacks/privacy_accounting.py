"""`PrivacyAccounting`: count a run's private steps, log ε, and stop before it is spent."""

from __future__ import annotations

import logging
import math
import warnings
from collections.abc import Sequence
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from pytorch_lightning import LightningModule, Trainer
from torch.utils.hooks import RemovableHandle

from lightning_gradaudit.callbacks.grad_audit import GradAudit
from lightning_gradaudit.callbacks.lightning_compat import resolve_base
from lightning_gradaudit.callbacks.loggers import sink
from lightning_gradaudit.capture.opacus import mechanism_faults, poisson_rate
from lightning_gradaudit.capture.trainer_state import buffer_versions, live_callback_metrics, logged_step
from lightning_gradaudit.errors import InvalidInputError, UnsupportedError, described
from lightning_gradaudit.risk.privacy_bounds import Looks, epsilon
from lightning_gradaudit.risk.privacy_ledger import DEFAULT_DELTA, PrivacyLedger

if TYPE_CHECKING:
    from pytorch_lightning import Callback
else:
    Callback = resolve_base("callbacks.Callback")

log = logging.getLogger(__name__)


class PrivacyAccounting(Callback):
    """Account for a run that trains with Opacus, and let the verdict of its `GradAudit` rest on the theorem too.

    It counts the steps that Opacus' optimizer really takes, with the noise and the Poisson sample rate of each, and
    checks the wiring: per-sample clipping, Poisson batches, one step for each batch, buffers that no batch writes to.
    What it finds wrong does not stop training; nothing is proven of such a run. Training is not changed otherwise.

    Curves: `<name>/epsilon_rdp` by Opacus' Rényi accountant every `every_n_steps`, and `<name>/epsilon`, tighter, by
    privacy loss distributions (extra `privacy`) at the end of every epoch.

    Args:
        delta: δ in (0, 1) at which ε is told; below one over the number of images.
        stop_at_epsilon: Stop training before the next step would bring the Rényi accountant's ε above it. None: never.
        every_n_steps: Steps between two points of the curve.
        name: Prefix of the curves.

    Attributes:
        ledger: The steps so far, and what is wrong with the wiring.

    Raises:
        InvalidInputError: When an argument is out of range.

    Example:
        >>> PrivacyAccounting(delta=1e-5, stop_at_epsilon=8.0).ledger.steps
        0
    """

    def __init__(
        self,
        *,
        delta: float = DEFAULT_DELTA,
        stop_at_epsilon: float | None = None,
        every_n_steps: int = 50,
        name: str = "gradaudit",
    ) -> None:
        if not 0 < delta < 1 or (stop_at_epsilon is not None and not stop_at_epsilon > 0) or every_n_steps < 1:
            raise InvalidInputError(
                "PrivacyAccounting: expected delta in (0, 1), stop_at_epsilon > 0 or None and every_n_steps >= 1, got "
                f"{delta!r}, {stop_at_epsilon!r} and {every_n_steps!r}."
            )
        self.stop_at_epsilon, self.every_n_steps, self.name = stop_at_epsilon, every_n_steps, name
        self.ledger = PrivacyLedger(delta=delta)
        self._handle: RemovableHandle | None = None
        self._buffers: dict[str, tuple[int, int]] = {}
        self._batches = self._first = 0

    # State

    def state_dict(self) -> dict[str, Any]:
        return self.ledger.to_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        try:
            self.ledger = PrivacyLedger.from_dict(state_dict)
        except InvalidInputError as error:
            self._note(f"The private steps of the resumed run cannot be read: {error}")

    # Training

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage == "fit":  # when the run resumes, Lightning loads the state after this hook
            self.ledger = PrivacyLedger(delta=self.ledger.delta)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        for callback in trainer.callbacks:  # type: ignore[attr-defined]
            if isinstance(callback, GradAudit):
                callback.evidence.privacy = self.ledger
        if self.ledger.steps != trainer.global_step:
            self._note(f"{trainer.global_step - self.ledger.steps} steps before this session are not accounted for.")
        for sentence in mechanism_faults(trainer, pl_module):
            self._note(sentence)
        self._batches, self._first, self._buffers = 0, self.ledger.steps, buffer_versions(pl_module)
        inner = getattr(trainer.optimizers[0], "original_optimizer", None) if trainer.optimizers else None
        if inner is not None:
            self._handle = inner.register_step_post_hook(lambda *_: self._count(trainer))
        self._stop_in_time(trainer)

    def _count(self, trainer: Trainer) -> None:
        optimizer: Any = trainer.optimizers[0]
        try:
            self.ledger.add_step(float(optimizer.noise_multiplier), poisson_rate(trainer) or 0.0)
            if optimizer.accumulated_iterations != 1:
                self._note("Several batches were put together into one step, which may draw an image more than once.")
        except Exception as error:
            self._note(f"A step could not be accounted for: {described(error)}")

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        self._batches += 1

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if self.ledger.steps - self._first != self._batches:
            self._note(
                "Batches and private steps do not pair off: a batch was split into steps, or several became one "
                "(virtual steps), so that the accounted sample rate is not the run's."
            )
        if buffer_versions(pl_module) != self._buffers:
            self._note("Buffers were written to in training: they carry what the batches hold past the mechanism.")
        if self.ledger.steps % self.every_n_steps == 0:
            self._publish(trainer, "epsilon_rdp", self._renyi())
        self._stop_in_time(trainer)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        for sentence in mechanism_faults(trainer, pl_module):
            self._note(sentence)
        self._publish(trainer, "epsilon_rdp", self._renyi())
        try:
            self._publish(trainer, "epsilon", epsilon(self.ledger.looks, self.ledger.delta))
        except (UnsupportedError, InvalidInputError) as error:
            log.info("PrivacyAccounting: no tight ε: %s", error)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._close()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._close()

    def _close(self) -> None:
        if self._handle is not None:
            self._handle.remove()
            self._handle = None

    # ε

    def _renyi(self, *further: Looks) -> float:
        """Return the Rényi accountant's ε so far, or after further steps; infinite where there is none."""
        return renyi_epsilon([*self.ledger.looks, *further], self.ledger.delta)

    def _stop_in_time(self, trainer: Trainer) -> None:
        if self.stop_at_epsilon is None:
            return
        noise = float(getattr(trainer.optimizers[0], "noise_multiplier", 0.0))
        if not self._renyi(Looks(noise, poisson_rate(trainer) or 0.0, 1)) <= self.stop_at_epsilon:
            trainer.should_stop = True
            log.warning("PrivacyAccounting: training stops at ε = %.3g; a further step exceeds it.", self._renyi())

    def _publish(self, trainer: Trainer, key: str, value: float) -> None:
        live_callback_metrics(trainer)[f"{self.name}/{key}"] = torch.tensor(value)
        for logger in trainer.loggers if trainer.is_global_zero else ():
            try:
                sink(logger).scalars({f"{self.name}/{key}": value}, step=logged_step(trainer))
            except Exception as error:
                log.warning("PrivacyAccounting: logging failed: %s", described(error))

    def _note(self, sentence: str) -> None:
        if self.ledger.add_fault(sentence):
            log.warning("PrivacyAccounting: nothing is proven of this run: %s", sentence)


def renyi_epsilon(looks: Sequence[Looks], delta: float) -> float:
    """Return ε at δ by Opacus' Rényi accountant; infinite for steps without noise or of unknown sample rate."""
    if any(noise <= 0 or rate <= 0 for noise, rate, _ in looks):
        return math.inf
    if not looks:
        return 0.0
    from opacus.accountants import RDPAccountant
    from opacus.accountants.analysis.rdp import get_privacy_spent

    orders = tuple(RDPAccountant.DEFAULT_ALPHAS)
    spent: Any = sum(steps * np.array(_renyi_divergences(noise, rate, orders)) for noise, rate, steps in looks)
    with warnings.catch_warnings():  # that the best order is the last of the list makes ε larger, not smaller
        warnings.simplefilter("ignore")
        return float(get_privacy_spent(orders=list(orders), rdp=spent.tolist(), delta=delta)[0])


@lru_cache(maxsize=64)
def _renyi_divergences(noise: float, rate: float, orders: tuple[float, ...]) -> list[float]:
    """Return the Rényi divergences of one step, (orders,); they add up over steps."""
    from opacus.accountants.analysis.rdp import compute_rdp

    return [float(each) for each in compute_rdp(q=rate, noise_multiplier=noise, steps=1, orders=list(orders))]

"""`RiskGatedCheckpoint`: release a checkpoint only when the audits allow it."""

from __future__ import annotations

import json
import logging
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pytorch_lightning import LightningModule, Trainer
from torch import Tensor

from lightning_gradaudit.callbacks.grad_audit import GradAudit
from lightning_gradaudit.callbacks.lightning_compat import resolve_base
from lightning_gradaudit.callbacks.stamps import bound_weights
from lightning_gradaudit.errors import InvalidInputError, described
from lightning_gradaudit.metrics.functional.summary import Statistic
from lightning_gradaudit.risk.gate import RiskGate
from lightning_gradaudit.risk.history import SIDECAR_SUFFIX, STAMP
from lightning_gradaudit.risk.verdict import Status, Verdict
from lightning_gradaudit.utils.digests import file_digest

if TYPE_CHECKING:
    from pytorch_lightning.callbacks import ModelCheckpoint
else:
    ModelCheckpoint = resolve_base("callbacks.ModelCheckpoint")

log = logging.getLogger(__name__)

QUARANTINE = "quarantine"


class RiskGatedCheckpoint(ModelCheckpoint):
    """A `ModelCheckpoint` that asks the run's `GradAudit` before it saves.

    The verdict comes before any bookkeeping, so a refused checkpoint leaves the previous best in place and no path to
    a file that does not exist. Every checkpoint carries verdict and evidence under the key "gradaudit" (weights-only
    ones in a JSON file beside them). `trainer.save_checkpoint()` does not pass this gate; its files carry the stamp
    only.

    Args:
        max_risk: Limit in [0, 1].
        statistic: Of the exposures (see `RiskGate`).
        on_unknown: What to do without a clear verdict: "block" (default) or "allow".
        policy: Refused checkpoints are not written ("block"), or written to `quarantine/` beside the others
            ("quarantine", the newest only).
        wait: Seconds to give unfinished audits before each decision.
        gate: A configured `RiskGate` in place of `max_risk` and `statistic`.
        dirpath, filename, monitor, mode, save_last, save_top_k, save_weights_only, every_n_train_steps,
            train_time_interval, every_n_epochs, save_on_train_epoch_end, verbose: As in `ModelCheckpoint`.

    Raises:
        InvalidInputError: When an argument is out of range, or the Trainer has no `GradAudit` (at setup).
    """

    def __init__(
        self,
        max_risk: float = 0.3,
        *,
        statistic: Statistic = "worst",
        on_unknown: Literal["block", "allow"] = "block",
        policy: Literal["block", "quarantine"] = "block",
        wait: float = 60.0,
        gate: RiskGate | None = None,
        dirpath: str | Path | None = None,
        filename: str | None = None,
        monitor: str | None = None,
        mode: str = "min",
        save_last: bool | Literal["link"] | None = None,
        save_top_k: int = 1,
        save_weights_only: bool = False,
        every_n_train_steps: int | None = None,
        train_time_interval: timedelta | None = None,
        every_n_epochs: int | None = None,
        save_on_train_epoch_end: bool | None = None,
        verbose: bool = False,
    ) -> None:
        if on_unknown not in ("block", "allow") or policy not in ("block", "quarantine") or not wait >= 0:
            raise InvalidInputError(
                "RiskGatedCheckpoint: expected on_unknown 'block' or 'allow', policy 'block' or 'quarantine' and "
                f"wait >= 0, got {on_unknown!r}, {policy!r} and {wait!r}."
            )
        self.gate = RiskGate(max_risk, statistic=statistic) if gate is None else gate
        self.on_unknown, self.policy, self.wait = on_unknown, policy, wait
        self.last_verdict: Verdict | None = None
        self._asked_at: tuple[int, bool] | None = None
        super().__init__(
            dirpath=dirpath,
            filename=filename,
            monitor=monitor,
            mode=mode,
            save_last=save_last,
            save_top_k=save_top_k,
            save_weights_only=save_weights_only,
            every_n_train_steps=every_n_train_steps,
            train_time_interval=train_time_interval,
            every_n_epochs=every_n_epochs,
            save_on_train_epoch_end=save_on_train_epoch_end,
            verbose=verbose,
        )

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage == "fit":
            _audits(trainer)
            self._asked_at = None  # another run may end at the same step
        super().setup(trainer, pl_module, stage)

    # Every save of ModelCheckpoint calls one of these (tests assert it); the decision comes before its bookkeeping.

    def _save_topk_checkpoint(self, trainer: Trainer, monitor_candidates: dict[str, Tensor]) -> None:
        if self.save_top_k != 0 and self._allowed(trainer, monitor_candidates):
            super()._save_topk_checkpoint(trainer, monitor_candidates)

    def _save_last_checkpoint(self, trainer: Trainer, monitor_candidates: dict[str, Tensor]) -> None:
        if self.save_last and self._allowed(trainer, monitor_candidates):
            super()._save_last_checkpoint(trainer, monitor_candidates)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        # Lightning's own handler may save without the two methods above.
        saves = getattr(self, "_should_save_on_exception", None)
        if saves is not None and saves(trainer) and self._allowed(trainer, self._monitor_candidates(trainer)):
            super().on_exception(trainer, pl_module, exception)

    def _save_checkpoint(self, trainer: Trainer, filepath: str) -> None:
        super()._save_checkpoint(trainer, filepath)
        self._write_sidecar(trainer, filepath)

    def _remove_checkpoint(self, trainer: Trainer, filepath: str) -> None:
        super()._remove_checkpoint(trainer, filepath)
        if trainer.is_global_zero:
            Path(filepath + SIDECAR_SUFFIX).unlink(missing_ok=True)

    def _write_sidecar(self, trainer: Trainer, filepath: str) -> None:
        """Put the stamp beside a file of weights only, bound to the file's bytes; Lightning puts none into it."""
        if not self.save_weights_only or not trainer.is_global_zero:
            return
        try:
            stamp = self._stamp(trainer) | {"file": file_digest(Path(filepath))}
            Path(filepath + SIDECAR_SUFFIX).write_text(json.dumps(stamp, allow_nan=False))
        except Exception as error:  # also where the file is written later; a file without a sidecar cannot pass
            log.warning("Checkpoint %s has no stamp beside it: %s", Path(filepath).name, error)

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        other = checkpoint.get(STAMP)
        checkpoint[STAMP] = {}  # if this fails, another audit's stamp must not count for it
        try:
            checkpoint[STAMP] = self._stamp(trainer, weights=bound_weights(checkpoint, other))
        except Exception as error:
            log.warning("The checkpoint's stamp cannot be made, so that it cannot pass: %s", error)

    def _stamp(self, trainer: Trainer, *, weights: str | None = None) -> dict[str, Any]:
        strictest = max(_audits(trainer), key=lambda audit: audit.verdict(self.gate).status.strictness)
        return strictest.stamp(self.gate, trainer, weights=weights)

    def _allowed(self, trainer: Trainer, monitor_candidates: dict[str, Tensor]) -> bool:
        """Ask for a verdict, note it, and put a refused checkpoint where the policy wants it."""
        if self._asked_at is not None and self._asked_at[0] == trainer.global_step:
            return self._asked_at[1]  # one decision for the best and the last checkpoint of a step
        try:
            verdict = self.ask(trainer)
        except Exception as error:
            reason = f"The audits could not be judged: {described(error)}"
            action = "GradAudit(strict=True), which raises the error where it arises"
            verdict = Verdict.unknown(reason, limit=self.gate.max_risk, action=action)
        self.last_verdict = verdict
        released = verdict.status is Status.PASS or (verdict.status is Status.UNKNOWN and self.on_unknown == "allow")
        self._asked_at = (trainer.global_step, released)
        name = self.format_checkpoint_name(monitor_candidates)
        _audits(trainer)[0].log_verdict(verdict, checkpoint=Path(name).name, released=released)
        if not released:
            log.warning("Checkpoint %s is not released. %s", Path(name).name, verdict)
            if self.policy == "quarantine":
                self._quarantine(trainer, Path(name))
        return released

    def ask(self, trainer: Trainer) -> Verdict:
        """Return the strictest verdict of the Trainer's audits, waiting for unfinished ones where they matter."""
        verdicts = []
        for audit in _audits(trainer):
            audit.drain(trainer)
            verdict = audit.verdict(self.gate)
            if verdict.status is not Status.BLOCK:  # unfinished audits cannot undo a demonstrated exposure
                audit.drain(trainer, wait=self.wait)
                verdict = audit.verdict(self.gate)
            verdicts.append(verdict)
        return max(verdicts, key=lambda verdict: verdict.status.strictness)

    def _quarantine(self, trainer: Trainer, path: Path) -> None:
        folder = path.parent / QUARANTINE
        kept = folder / path.name
        if trainer.is_global_zero:
            for old in folder.glob("*.ckpt*"):
                if old.name != kept.name:
                    old.unlink()
        trainer.save_checkpoint(kept, self.save_weights_only)
        self._write_sidecar(trainer, str(kept))


def _audits(trainer: Trainer) -> list[GradAudit]:
    audits = [callback for callback in trainer.callbacks if isinstance(callback, GradAudit)]  # type: ignore[attr-defined]
    if not audits:
        raise InvalidInputError(
            "RiskGatedCheckpoint needs the run to be audited: add GradAudit() to Trainer(callbacks=[...])."
        )
    return audits

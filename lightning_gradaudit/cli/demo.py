"""The demo: train a face detector on real photographs, audit it, gate its checkpoints."""

from __future__ import annotations

import json
import logging
import warnings
from collections.abc import Callable, Sequence
from concurrent.futures import Executor, Future
from pathlib import Path
from typing import Any

import torch
from pytorch_lightning import Callback, LightningModule, Trainer, seed_everything
from pytorch_lightning.callbacks import TQDMProgressBar
from pytorch_lightning.loggers import CSVLogger, Logger
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset
from torchvision.utils import save_image

from lightning_gradaudit.attacks.budget import Budget
from lightning_gradaudit.audit.record import AuditRecord
from lightning_gradaudit.audit.settings import AuditSettings
from lightning_gradaudit.callbacks.apply_defences import ApplyDefences
from lightning_gradaudit.callbacks.grad_audit import GradAudit
from lightning_gradaudit.callbacks.loggers import sink
from lightning_gradaudit.callbacks.overhead import Limits
from lightning_gradaudit.callbacks.risk_gated_checkpoint import RiskGatedCheckpoint
from lightning_gradaudit.cli.settings import DemoSettings
from lightning_gradaudit.errors import InvalidInputError
from lightning_gradaudit.execution.executors import ProcessExecutor
from lightning_gradaudit.report.run import Run, load_run
from lightning_gradaudit.simulation.defences import Defence, GaussianNoise

BATCH_SIZE = 2
DEFENCE = GaussianNoise(relative=30.0)
"""Noise thirty times the gradient's norm: below it, a face can still be picked out among a hundred."""


class FaceDetector(LightningModule):
    """Two strided ReLU convolutions and a linear head: face or not, from 25x25 grey pixels."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(
            nn.Conv2d(1, 16, 5, stride=2, padding=2),
            nn.ReLU(),
            nn.Conv2d(16, 32, 5, stride=2, padding=2),
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(32 * 7 * 7, 2),
        )

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        """Return the cross-entropy and log it with the accuracy."""
        images, labels = batch
        logits = self.net(images)
        loss = nn.functional.cross_entropy(logits, labels)
        self.log_dict({"train/loss": loss, "train/accuracy": (logits.argmax(1) == labels).float().mean()})
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Plain SGD; at ten times this learning rate, training with the defended gradient diverges."""
        return torch.optim.SGD(self.parameters(), lr=0.001, weight_decay=1e-3)


def faces() -> tuple[Tensor, Tensor]:
    """Return the LFW subset: (200, 1, 25, 25) in [0, 1], the first hundred are faces (label 0).

    Raises:
        InvalidInputError: When scikit-image, which carries the photographs, is missing.
    """
    try:
        from skimage.data import lfw_subset
    except ImportError as error:
        raise InvalidInputError(
            "The demo's photographs come with scikit-image: pip install 'lightning-gradaudit[demo]'."
        ) from error
    images = torch.as_tensor(lfw_subset(), dtype=torch.float32)[:, None]
    return images, (torch.arange(len(images)) >= len(images) // 2).long()


class FirstFace:
    """Show the first face that an audit recovers, as soon as its audit is done.

    Args:
        path: Picture to write: the photograph, and beside it what came back.
        show: Is given the audit's record, the index of the face in its batch and the path.
        limit: Exposure from which a face counts as recovered.
    """

    def __init__(self, path: Path, show: Callable[[AuditRecord, int, Path], None], limit: float = 0.3) -> None:
        self.path, self.limit, self._show, self._shown = path, limit, show, False
        images, labels = faces()
        self._faces = images[labels == 0]

    def watch(self, done: Future[Any]) -> None:
        """Take the result of an audit that ended."""
        if self._shown or done.cancelled() or done.exception() is not None:
            return
        record = done.result()
        face = self._find(record) if isinstance(record, AuditRecord) else None
        if face is not None:
            self._shown = True
            self.path.parent.mkdir(parents=True, exist_ok=True)
            save_image(torch.stack([record.truth[face], record.pixels[face]]), self.path, pad_value=1.0)
            self._show(record, face, self.path)

    def _find(self, record: AuditRecord) -> int | None:
        """Return the index of the most exposed face in a batch, if it was recovered."""
        if record.truth is None or record.pixels is None:
            return None
        for index in record.exposure.argsort(descending=True).tolist():
            distance = (self._faces - record.truth[index]).abs().flatten(1).amax(1).min()
            if distance < 1e-3 and record.exposure[index] >= self.limit:
                return int(index)
        return None


class WatchedExecutor(ProcessExecutor):
    """Worker processes for both runs, each on one core, whose results somebody watches."""

    def __init__(self, watch: Callable[[Future[Any]], None]) -> None:
        super().__init__(workers=2, threads=1)
        self._watch = watch

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        future = super().submit(fn, *args, **kwargs)
        future.add_done_callback(self._watch)
        return future


def run_demo(
    out: str | Path,
    settings: DemoSettings,
    *,
    first_face: FirstFace,
    loggers: Sequence[Callable[..., Logger]] = (),
    progress: bool = True,
) -> list[Run]:
    """Train twice, with the gradient as it is and with a defended one, and return both audited runs.

    The accuracy of each trained detector on the photographs is in its folder, `accuracy.json`.

    Args:
        out: Folder for logs, checkpoints and audits; one folder a run inside.
        settings: How much work.
        first_face: Shows the first recovered face.
        loggers: Further loggers beside the CSV one, built for each run with `save_dir` and `name`.
        progress: Show progress bars.
    """
    executor = WatchedExecutor(first_face.watch)
    runs = []
    plan: tuple[tuple[str, tuple[Defence, ...], int], ...] = (
        ("undefended", (), 3),
        ("defended", (DEFENCE,), 1),
    )
    try:
        for name, defences, sparser in plan:
            folder = Path(out) / name
            audit = _make_audit(folder, settings, executor, sparser)
            defend = ApplyDefences(defences, seed=settings.seed)
            accuracy = _train(folder, [defend, audit], settings, loggers, progress=progress)
            (folder / "accuracy.json").write_text(json.dumps({"accuracy": accuracy}))
            runs.append(load_run(Path(out) / name / "gradaudit", name=name))
    finally:
        executor.shutdown(wait=False, cancel_futures=True)
    return runs


def _make_audit(folder: Path, settings: DemoSettings, executor: Executor, sparser: int) -> GradAudit:
    images, labels = faces()
    steps = settings.epochs * len(images) // BATCH_SIZE
    return GradAudit(
        every_n_steps=max(1, steps // settings.audits) * sparser,
        budget=Budget(evaluations=settings.evaluations),
        executor=executor,
        settings=AuditSettings(seed=settings.seed),
        gallery=(images, labels),
        log_images=BATCH_SIZE,
        limits=Limits(queue_size=settings.audits, final_wait_seconds=300.0),
        dirpath=folder / "gradaudit",
    )


def _train(
    folder: Path,
    callbacks: list[Callback],
    settings: DemoSettings,
    loggers: Sequence[Callable[..., Logger]],
    *,
    progress: bool,
) -> float:
    """Train a detector, and return the share of the photographs that it then classifies correctly."""
    seed_everything(settings.seed, verbose=False)
    gate = RiskGatedCheckpoint(
        max_risk=0.3,
        dirpath=folder / "checkpoints",
        filename="{step}",
        wait=300.0,
        every_n_epochs=max(1, settings.epochs // 2),
        save_on_train_epoch_end=True,
    )
    callbacks = [*callbacks, gate]
    if progress:
        callbacks.append(TQDMProgressBar(refresh_rate=10))
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*does not have many workers.*")
        warnings.filterwarnings("ignore", message=".*LeafSpec.*")
        _quiet_lightning()
        trainer = Trainer(
            max_epochs=settings.epochs,
            accelerator="cpu",
            logger=[CSVLogger(folder, name="", version=""), *(make(save_dir=folder, name="demo") for make in loggers)],
            callbacks=callbacks,
            log_every_n_steps=10,
            enable_progress_bar=progress,
            enable_model_summary=False,
        )
        loader = DataLoader(TensorDataset(*faces()), batch_size=BATCH_SIZE, shuffle=True)
        detector = FaceDetector()
        trainer.fit(detector, loader)
        for logger in trainer.loggers:
            sink(logger).finish()
    images, labels = faces()
    with torch.no_grad():
        return float((detector.net(images).argmax(1) == labels).float().mean())


def _quiet_lightning() -> None:
    for name in ("pytorch_lightning.utilities.rank_zero", "lightning.pytorch.utilities.rank_zero"):
        logging.getLogger(name).setLevel(logging.WARNING)

"""The main job, embedded: train a face detector on real photographs, audit it, gate its checkpoints."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from pytorch_lightning import Callback, LightningModule, Trainer, seed_everything
from pytorch_lightning.callbacks import TQDMProgressBar
from pytorch_lightning.loggers import CSVLogger, Logger
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_gradaudit.attacks.budget import Budget
from lightning_gradaudit.callbacks.grad_audit import GradAudit
from lightning_gradaudit.callbacks.loggers import sink
from lightning_gradaudit.callbacks.risk_gated_checkpoint import RiskGatedCheckpoint
from lightning_gradaudit.errors import InvalidInputError
from lightning_gradaudit.execution.executors import ExecutorName
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
        """Plain SGD."""
        return torch.optim.SGD(self.parameters(), lr=0.01, weight_decay=1e-3)


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


@dataclass(frozen=True, kw_only=True)
class DemoSettings:
    """How long the demo takes.

    Attributes:
        epochs: Of 100 steps each.
        audits: Audited steps per run.
        evaluations: Budget of an audit.
        executor: Where audits run.
        seed: Of everything.
    """

    epochs: int = 10
    audits: int = 40
    evaluations: int = 300
    executor: ExecutorName = "auto"
    seed: int = 1


def run_demo(
    out: str | Path,
    settings: DemoSettings,
    *,
    loggers: Sequence[Callable[..., Logger]] = (),
    progress: bool = True,
) -> list[Run]:
    """Train twice, undefended and with a defended gradient, and return both audited runs.

    Args:
        out: Folder for logs, checkpoints and audits; one folder a run inside.
        settings: How much work.
        loggers: Further loggers beside the CSV one, built for each run with `save_dir` and `name`.
        progress: Show progress bars.
    """
    runs = []
    defended: tuple[tuple[str, tuple[Defence, ...]], ...] = (("undefended", ()), ("defended", (DEFENCE,)))
    for name, defences in defended:
        folder = Path(out) / name
        _train(folder, defences, settings, loggers, progress=progress)
        runs.append(load_run(folder / "gradaudit", name=name))
    return runs


def _train(
    folder: Path,
    defences: tuple[Defence, ...],
    settings: DemoSettings,
    loggers: Sequence[Callable[..., Logger]],
    *,
    progress: bool,
) -> None:
    seed_everything(settings.seed, verbose=False)
    images, labels = faces()
    steps = settings.epochs * len(images) // BATCH_SIZE
    audit = GradAudit(
        every_n_steps=max(1, steps // settings.audits),
        budget=Budget(evaluations=settings.evaluations),
        executor=settings.executor,
        defences=defences,
        gallery=images,
        gallery_labels=labels,
        images=BATCH_SIZE,
        log_images=True,
        queue_size=settings.audits,
        final_wait_seconds=300.0,
        dirpath=folder / "gradaudit",
        seed=settings.seed,
    )
    gate = RiskGatedCheckpoint(
        max_risk=0.3,
        dirpath=folder / "checkpoints",
        filename="{step}",
        wait=300.0,
        every_n_epochs=max(1, settings.epochs // 2),
        save_on_train_epoch_end=True,
    )
    callbacks: list[Callback] = [audit, gate]
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
        loader = DataLoader(TensorDataset(images, labels), batch_size=BATCH_SIZE, shuffle=True)
        trainer.fit(FaceDetector(), loader)
        for logger in trainer.loggers:
            sink(logger).finish()


def _quiet_lightning() -> None:
    for name in ("pytorch_lightning.utilities.rank_zero", "lightning.pytorch.utilities.rank_zero"):
        logging.getLogger(name).setLevel(logging.WARNING)

"""LightningModules, executors and records that several test files share; importable by worker processes."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from concurrent.futures import Executor, Future
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.loggers.logger import Logger
from torch import nn
from torch.nn import functional as F  # noqa: N812
from torch.utils.data import DataLoader, TensorDataset

from lightning_gradaudit import RiskGate
from lightning_gradaudit.attacks.reconstruction import Outcome
from lightning_gradaudit.audit.engine_check import EngineCheck
from lightning_gradaudit.audit.record import AuditRecord
from lightning_gradaudit.risk.checks import Losses
from lightning_gradaudit.risk.history import AuditHistory
from lightning_gradaudit.risk.run_log import RunLog


class Classifier(pl.LightningModule):
    """A small network with BatchNorm and dropout that logs from its training step."""

    def __init__(self, *, channels: int = 1, side: int = 12, lr: float = 0.05, dropout: float = 0.2) -> None:
        super().__init__()
        self.net = nn.Sequential(
            nn.Conv2d(channels, 6, 3, stride=2, padding=1),
            nn.BatchNorm2d(6),
            nn.ReLU(),
            nn.Dropout(dropout),
            nn.Flatten(),
            nn.Linear(6 * ((side + 1) // 2) ** 2, 3),
        )
        self.lr = lr

    def forward(self, images):
        return self.net(images)

    def training_step(self, batch, batch_idx):
        images, labels = batch
        logits = self(images)
        loss = F.cross_entropy(logits, labels)
        self.log("train/loss", loss)
        self.log("train/accuracy", (logits.argmax(1) == labels).float().mean())
        return loss

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), lr=self.lr)


class MeanSquares(Classifier):
    """A module whose training step asks for the Trainer."""

    def training_step(self, batch, batch_idx):
        return super().training_step(batch, batch_idx) / self.trainer.max_epochs


def images_and_labels(count: int = 64, *, side: int = 12, classes: int = 3, seed: int = 0):
    """Smooth random images in [0, 1] and random labels."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.rand((count, 1, 4, 4), generator=generator)
    images = F.interpolate(coarse, (side, side), mode="bilinear").clamp(0, 1)
    return images, torch.randint(classes, (count,), generator=generator)


def loader(count: int = 64, *, batch_size: int = 4, side: int = 12, shuffle: bool = True) -> DataLoader:
    return DataLoader(TensorDataset(*images_and_labels(count, side=side)), batch_size=batch_size, shuffle=shuffle)


class RecordingLogger(Logger):
    """Keep every row that was logged."""

    def __init__(self) -> None:
        super().__init__()
        self.rows: list[tuple[int | None, dict[str, float]]] = []

    @property
    def name(self) -> str:
        return "recording"

    @property
    def version(self) -> int:
        return 0

    def log_hyperparams(self, params: Any, *args: Any, **kwargs: Any) -> None:
        pass

    def log_metrics(self, metrics, step=None) -> None:
        self.rows.append((step, dict(metrics)))

    def of_the_user(self) -> list[tuple[int | None, dict[str, float]]]:
        kept = [(s, {k: v for k, v in m.items() if not k.startswith("gradaudit/")}) for s, m in self.rows]
        return [(s, m) for s, m in kept if m]

    def of_the_audit(self) -> list[tuple[int | None, dict[str, float]]]:
        return [(s, m) for s, m in self.rows if any(k.startswith("gradaudit/") for k in m)]


class HoldingExecutor(Executor):
    """Keep what is submitted; nothing ever finishes unless the test says so."""

    def __init__(self) -> None:
        self.jobs: list[tuple[Any, tuple[Any, ...]]] = []
        self.futures: list[Future[Any]] = []

    def submit(self, fn, /, *args, **kwargs):
        future: Future[Any] = Future()
        self.jobs.append((fn, args))
        self.futures.append(future)
        return future

    @property
    def snapshots(self) -> list[Any]:
        return [args[0] for fn, args in self.jobs if fn.__name__ == "_run_job"]


class HandDriven(Executor):
    """Keep submitted work until the test runs, fails or cancels it."""

    def __init__(self) -> None:
        self.work: list[tuple[Future[Any], Callable[[], Any]]] = []

    def submit(self, fn, /, *args, **kwargs):
        future: Future[Any] = Future()
        self.work.append((future, lambda: fn(*args, **kwargs)))
        return future

    def run(self, index):
        future, job = self.work[index]
        future.set_result(job())

    def fail(self, index, error):
        self.work[index][0].set_exception(error)


class FakeClock:
    """Seconds that a test moves."""

    now = 0.0

    def __call__(self) -> float:
        return self.now


class CostlyExecutor(HoldingExecutor):
    """Take snapshots, and time for each."""

    def __init__(self, clock: FakeClock, seconds: float) -> None:
        super().__init__()
        self.clock, self.seconds = clock, seconds

    def submit(self, fn, /, *args, **kwargs):
        self.clock.now += self.seconds * (fn.__name__ == "_run_job")
        return super().submit(fn, *args, **kwargs)


def trainer(*callbacks: pl.Callback, **options: Any) -> pl.Trainer:
    """A quiet Trainer on the CPU."""
    defaults: dict[str, Any] = {
        "accelerator": "cpu",
        "logger": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "enable_checkpointing": any(isinstance(c, pl.callbacks.Checkpoint) for c in callbacks),
        "max_epochs": 1,
        "log_every_n_steps": 1,
        "default_root_dir": tempfile.mkdtemp(prefix="gradaudit-test-"),
    }
    return pl.Trainer(callbacks=list(callbacks), **(defaults | options))


def record(step: int = 0, exposure=(0.0,) * 4, **changes: Any) -> AuditRecord:
    """A valid audit record whose images were not identified among a hundred."""
    values = torch.tensor(exposure, dtype=torch.float)
    n = len(values)
    fields: dict[str, Any] = {
        "step": step,
        "attack": "InvertingGradients",
        "outcome": Outcome.BUDGET_SPENT,
        "exposure": values,
        "psnr": torch.full((n,), 10.0),
        "ssim": values,
        "mse": torch.full((n,), 0.1),
        "identified": torch.zeros(n),
        "null": torch.full((n,), 0.3),
        "exact_leaks": torch.zeros(n, dtype=torch.bool),
        "copied": torch.zeros(n, dtype=torch.bool),
        "gallery": 128,
        "chance_hits": 1.0,
        "chance_trials": 100,
        "null_complete": True,
        "label_accuracy": 1.0,
        "matching_loss": 0.1,
        "gradient_similarity": 0.9,
        "truth_similarity": 1.0,
        "self_test": 1e-7,
        "self_test_tolerance": 1e-3,
        "defence_gap": 1e-7,
        "evaluations": 100,
        "seconds": 1.0,
        "threat_model": {"view": "local"},
        "measure": "ssim",
        "digests": tuple(f"step {step}, image {i}" for i in range(n)),  # every image another one
        "session": "test",
    }
    return AuditRecord(**(fields | changes))


class Data(pl.LightningDataModule):
    """The same smooth images, for LightningCLI."""

    def train_dataloader(self):
        return loader(16)


def run_folder(path, records, *, engine=True, **changes):
    """Write a run folder as the callback would."""
    folder = RunLog(path)
    folder.create()
    evidence = AuditHistory(
        engine=EngineCheck(engine, {"attack": 40.0}), settings={"attack": "InvertingGradients()"}, step=100
    )
    folder.begin(evidence)
    folder.append("engine", {"passed": engine, "psnr": {"attack": 40.0}})
    for each in records:
        evidence.records.append(each)
        verdict = evidence.verdict(RiskGate())
        folder.append("record", each.to_dict() | {"risk": verdict.to_dict(), "lag_steps": 3.0})
    folder.append("step", {"step": 100, "lost": Losses().to_dict()} | changes)
    return path

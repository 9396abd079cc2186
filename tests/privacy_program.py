"""A run with recognisable images and labels, for the test that searches what it leaves behind."""

from __future__ import annotations

import logging
import math
import os
import sys
import threading
import time
from pathlib import Path

import pytorch_lightning as pl
import torch
from pytorch_lightning.loggers import CSVLogger, TensorBoardLogger
from torch import nn
from torch.nn import functional
from torch.utils.data import DataLoader, TensorDataset

from lightning_gradaudit import Budget, GradAudit, Limits, RiskGatedCheckpoint, Snapshot
from lightning_gradaudit.attacks import Attack
from lightning_gradaudit.execution import shared_memory

BATCH, BATCHES, CLASSES = 8, 4, 200
SHAPE = 3, 32, 32  # a batch of them is large enough to travel by shared memory
TRAINER = os.getpid()

log = logging.getLogger(__name__)


def secret() -> tuple[torch.Tensor, torch.Tensor]:
    """Images (N, C, H, W) uint8 and their labels, from 10 upwards."""
    generator = torch.Generator().manual_seed(20)
    count = BATCH * BATCHES
    images = torch.randint(256, (count, *SHAPE), generator=generator, dtype=torch.uint8)
    return images, torch.randint(10, CLASSES, (count,), generator=generator)


class Module(pl.LightningModule):
    """A network whose first layer gives images of small batches away."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Flatten(), nn.Linear(math.prod(SHAPE), 64), nn.ReLU(), nn.Linear(64, CLASSES))

    def forward(self, images):
        return self.net(images)

    def training_step(self, batch, batch_idx):
        images, labels = batch
        loss = functional.cross_entropy(self(images), labels)
        self.log("loss", loss)
        return loss

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.01)


class Raises(Attack):
    """Break in the worker, and say what the attacker was given."""

    def run(self, observation, *, budget, generator):
        raise ValueError(f"no idea what to do with {observation}")


class Refuses(Module):
    """Break in the worker at the true images, and print them, as some validations of torch do."""

    def forward(self, images):
        if os.getpid() != TRAINER:
            raise ValueError(f"unexpected values: {images[0, 0].tolist()}")
        return super().forward(images)


class Waits(Attack):
    """Never end."""

    def run(self, observation, *, budget, generator):
        time.sleep(600)


def fit(root: Path, module: Module, **options) -> GradAudit:
    """Train for one epoch with default settings but for speed."""
    images, labels = secret()
    data = DataLoader(TensorDataset(images.float() / 255, labels), batch_size=BATCH)
    audit = GradAudit(every_n_steps=2, budget=Budget(evaluations=5), **options)
    trainer = pl.Trainer(
        default_root_dir=root,
        accelerator="cpu",
        max_epochs=1,
        log_every_n_steps=1,
        enable_progress_bar=False,
        logger=[TensorBoardLogger(root), CSVLogger(root)],
        callbacks=[audit, RiskGatedCheckpoint(dirpath=root / "gated", monitor=None)],
    )
    trainer.fit(module, data)
    return audit


def tell_when_laid_out() -> None:
    """Say where the snapshot lies as soon as a worker reads it."""
    while not (shared_memory.open_folders and len(list(shared_memory.open_folders[0].path.iterdir())) > 1):
        time.sleep(0.05)
    time.sleep(1)
    print("WRITTEN IN", shared_memory.open_folders[0].path, flush=True)


def main(root: Path, kinds: list[str]) -> None:
    """Do the runs of these kinds, each in a folder of its own."""
    logging.basicConfig(level=logging.DEBUG)
    for kind in kinds:
        folder = root / kind
        print("BEGIN", kind, flush=True)
        if kind == "killed":
            threading.Thread(target=tell_when_laid_out, daemon=True).start()
            fit(folder, Module(), attack=Waits(), limits=Limits(final_wait_seconds=600))
        elif kind == "strict":
            try:
                fit(folder, Module(), attack=Raises(), strict=True)
            except ValueError:
                log.exception("as the user would see it")
        elif kind == "logged":
            fit(folder, Module(), log_images=True)
        elif kind == "saved":
            images, labels = secret()
            batch = images[:BATCH].float() / 255, labels[:BATCH]
            folder.mkdir()
            Snapshot.from_batch(Module(), batch, loss=functional.cross_entropy).save(folder / "snapshot.pt")
        else:
            module = Refuses() if kind == "refused" else Module()
            audit = fit(folder, module, **({"attack": Raises()} if kind == "failed" else {}))
            print(kind, len(audit.evidence.records), len(audit.evidence.faults), flush=True)
    for made in shared_memory.open_folders:
        print("WRITTEN IN", made.path)


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])

"""Real images and small networks that the tests share."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from skimage.data import lfw_subset
from torch import Tensor, nn
from torch._inductor import config as inductor
from torchvision.models import VisionTransformer

from lightning_gradaudit import Snapshot

QUICK_WORKERS = Path(__file__).parent / "quick_workers"


def pytest_configure() -> None:
    """Let worker processes, and programs that tests start, run at the priority of the tests, and compile here."""
    inductor.compile_threads = 1  # a pool of compilers would import torch once for each
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(QUICK_WORKERS), os.environ.get("PYTHONPATH")]))
    os.environ["RAY_worker_niceness"] = "0"  # noqa: SIM112 - Ray's name


@pytest.fixture(scope="session")
def faces() -> tuple[Tensor, Tensor]:
    """200 real photographs (200, 1, 25, 25) in [0, 1]; label 1 for the 100 faces, 0 for the 100 others."""
    images = torch.from_numpy(lfw_subset()).float()[:, None]
    return images, torch.cat([torch.ones(100, dtype=torch.long), torch.zeros(100, dtype=torch.long)])


@pytest.fixture
def generator() -> torch.Generator:
    """A fresh generator with a fixed seed."""
    return torch.Generator().manual_seed(0)


def _mlp(channels: int, side: int, classes: int) -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(channels * side * side, 64), nn.ReLU(), nn.Linear(64, classes))


def _conv(channels: int, side: int, classes: int) -> nn.Module:
    """Two strided convolutions and a linear head, with ReLU."""
    half = (side + 1) // 2
    quarter = (half + 1) // 2
    return nn.Sequential(
        nn.Conv2d(channels, 12, 5, stride=2, padding=2),
        nn.ReLU(),
        nn.Conv2d(12, 24, 5, stride=2, padding=2),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(24 * quarter * quarter, classes),
    )


def _sigmoid(channels: int, side: int, classes: int) -> nn.Module:
    """The smooth network of deep leakage from gradients, with its wide initialisation."""
    half = (side + 1) // 2
    model = nn.Sequential(
        nn.Conv2d(channels, 12, 5, stride=2, padding=2),
        nn.Sigmoid(),
        nn.Conv2d(12, 12, 5, padding=2),
        nn.Sigmoid(),
        nn.Flatten(),
        nn.Linear(12 * half * half, classes),
    )
    for parameter in model.parameters():
        nn.init.uniform_(parameter, -0.5, 0.5)
    return model


def _batchnorm(channels: int, side: int, classes: int) -> nn.Module:
    half = (side + 1) // 2
    return nn.Sequential(
        nn.Conv2d(channels, 6, 3, stride=2, padding=1),
        nn.BatchNorm2d(6),
        nn.Tanh(),
        nn.Flatten(),
        nn.Linear(6 * half * half, classes),
    )


def _dropout(channels: int, side: int, classes: int) -> nn.Module:
    return nn.Sequential(
        nn.Flatten(), nn.Linear(channels * side * side, 32), nn.Tanh(), nn.Dropout(0.5), nn.Linear(32, classes)
    )


def _vit(channels: int, side: int, classes: int) -> nn.Module:
    """Torchvision's vision transformer, whose head, zero at its start, is drawn at random."""
    assert channels == 3
    model = VisionTransformer(side, 4, num_layers=1, num_heads=2, hidden_dim=16, mlp_dim=16, num_classes=classes)
    nn.init.normal_(model.heads.head.weight)
    return model


class _Tied(nn.Module):
    """One weight used twice, as in an autoencoder with a head."""

    def __init__(self, channels: int, side: int, classes: int) -> None:
        super().__init__()
        width = channels * side * side
        self.first = nn.Linear(width, width)
        self.second = nn.Linear(width, width)
        self.second.weight = self.first.weight
        self.head = nn.Linear(width, classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.second(torch.tanh(self.first(x.flatten(1)))))


_KINDS = {
    "mlp": _mlp,
    "conv": _conv,
    "sigmoid": _sigmoid,
    "batchnorm": _batchnorm,
    "dropout": _dropout,
    "tied": _Tied,
    "vit": _vit,
}

Build = Callable[..., nn.Module]


@pytest.fixture(scope="session")
def build() -> Build:
    """Build a small network by name, from a seed of its own."""

    def make(kind: str, *, channels: int = 1, side: int = 25, classes: int = 2, seed: int = 0) -> nn.Module:
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            return _KINDS[kind](channels, side, classes)

    return make


@pytest.fixture(scope="session")
def snap(build: Build) -> Callable[..., Snapshot]:
    """Snapshot a small network on random images: `snap("conv", batch=2, channels=3, side=16)`."""

    def make(kind: str, *, batch: int = 1, channels: int = 1, side: int = 8, classes: int = 2, **kwargs) -> Snapshot:
        model = build(kind, channels=channels, side=side, classes=classes)
        random = torch.Generator().manual_seed(11)
        images = torch.rand((batch, channels, side, side), generator=random)
        labels = torch.arange(batch) % classes
        kwargs.setdefault("loss", nn.functional.cross_entropy)
        return Snapshot.from_batch(model, (images, labels), **kwargs)

    return make

"""Small image classifiers of the usual kinds, to see at a glance which of them give images away.

They span what decides: a linear layer that sees the image, the smooth network of the first published attacks,
convolutions with and without BatchNorm, a residual network that pools its features away, and patches.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence

import torch
from torch import Tensor, nn

from lightning_gradaudit.errors import InvalidInputError

Architecture = Callable[[int, int, int], nn.Module]
"""Builds a classifier from the number of channels, the side of the images in pixels and the number of classes."""


def mlp(channels: int, side: int, classes: int) -> nn.Module:
    """Two linear layers with ReLU: the first is fed by the image itself."""
    return nn.Sequential(nn.Flatten(), nn.Linear(channels * side**2, 256), nn.ReLU(), nn.Linear(256, classes))


def lenet(channels: int, side: int, classes: int) -> nn.Module:
    """The sigmoid LeNet of deep leakage from gradients (Zhu et al., arXiv:1906.08935), initialised by torch."""
    layers: list[nn.Module] = []
    for inputs, stride in ((channels, 2), (12, 2), (12, 1)):
        layers += [nn.Conv2d(inputs, 12, 5, stride=stride, padding=2), nn.Sigmoid()]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(12 * _strided(side, 2) ** 2, classes))


def convnet(channels: int, side: int, classes: int) -> nn.Module:
    """Four 3 x 3 convolutions with ReLU, two of them strided, and a linear head."""
    return _convnet(channels, side, classes, norm=False)


def convnet_bn(channels: int, side: int, classes: int) -> nn.Module:
    """`convnet` with BatchNorm."""
    return _convnet(channels, side, classes, norm=True)


def _convnet(channels: int, side: int, classes: int, *, norm: bool) -> nn.Module:
    layers: list[nn.Module] = []
    inputs, width = channels, 24
    for stride in (1, 2, 1, 2):
        layers.append(nn.Conv2d(inputs, width, 3, stride=stride, padding=1))
        layers += [nn.BatchNorm2d(width), nn.ReLU()] if norm else [nn.ReLU()]
        inputs = width
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(width * _strided(side, 2) ** 2, classes))


class _Residual(nn.Module):
    """Two 3 x 3 convolutions with BatchNorm beside a shortcut."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(inputs, outputs, 3, stride=stride, padding=1, bias=False),
            nn.BatchNorm2d(outputs),
            nn.ReLU(),
            nn.Conv2d(outputs, outputs, 3, padding=1, bias=False),
            nn.BatchNorm2d(outputs),
        )
        self.shortcut = nn.Conv2d(inputs, outputs, 1, stride=stride, bias=False) if stride > 1 else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.body(x) + self.shortcut(x))


def resnet(channels: int, side: int, classes: int) -> nn.Module:  # noqa: ARG001 - pooling makes any side fit
    """Three residual blocks with BatchNorm, then the mean over all positions."""
    return nn.Sequential(
        nn.Conv2d(channels, 16, 3, padding=1, bias=False),
        nn.BatchNorm2d(16),
        nn.ReLU(),
        _Residual(16, 16, 1),
        _Residual(16, 32, 2),
        _Residual(32, 64, 2),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(64, classes),
    )


class _ViT(nn.Module):
    """Patches of a sixth of the side at least, learned positions, two transformer blocks, the mean over patches."""

    def __init__(self, channels: int, side: int, classes: int, width: int = 48) -> None:
        super().__init__()
        patch = max(1, side // 6)
        self.embed = nn.Conv2d(channels, width, patch, stride=patch)
        self.position = nn.Parameter(torch.randn(1, (side // patch) ** 2, width) * 0.02)
        self.blocks = nn.Sequential(
            *(
                nn.TransformerEncoderLayer(width, 4, 2 * width, dropout=0.0, batch_first=True, norm_first=True)
                for _ in range(2)
            )
        )
        self.head = nn.Linear(width, classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.blocks(self.embed(x).flatten(2).transpose(1, 2) + self.position).mean(1))


def vit(channels: int, side: int, classes: int) -> nn.Module:
    """A small vision transformer."""
    return _ViT(channels, side, classes)


BUILT_IN: Mapping[str, Architecture] = {each.__name__: each for each in (mlp, lenet, convnet, convnet_bn, resnet, vit)}
"""All of them by name, for the command line."""


def train(model: nn.Module, images: Tensor, labels: Tensor, *, epochs: int, seed: int = 0) -> None:
    """Train in place: Adam, learning rate 1e-3, batches of 20, cross-entropy."""
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    model.train()
    for _ in range(epochs):
        for chosen in torch.randperm(len(images), generator=generator).split(20):
            if len(chosen) > 1:  # BatchNorm needs more than one
                optimizer.zero_grad()
                nn.functional.cross_entropy(model(images[chosen]), labels[chosen]).backward()
                optimizer.step()


def training_states(
    architectures: Mapping[str, Architecture],
    images: Tensor,
    labels: Tensor,
    *,
    epochs: Sequence[int] = (0, 1, 5),
    seed: int = 0,
) -> Iterator[tuple[str, nn.Module]]:
    """Train each architecture and yield it, by name, after each of the epochs.

    Args:
        images: (N, C, S, S) square, in the model's input space.
        labels: (N,) class indices.
        epochs: Increasing; 0 is the untrained model.

    Raises:
        InvalidInputError: When images are not square, or epochs do not increase.
    """
    if images.ndim != 4 or images.shape[2] != images.shape[3]:
        raise InvalidInputError(f"images: expected square ones (N, C, S, S), got {tuple(images.shape)}.")
    if list(epochs) != sorted(set(epochs)) or not epochs or min(epochs) < 0:
        raise InvalidInputError(f"epochs: expected increasing numbers >= 0, got {tuple(epochs)}.")
    for name, build in architectures.items():
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            model = build(images.shape[1], images.shape[2], int(labels.max()) + 1)
        done = 0
        for until in epochs:
            train(model, images, labels, epochs=until - done, seed=seed + done)
            done = until
            yield f"{name}, {until} epoch{'' if until == 1 else 's'}", copy.deepcopy(model)


def _strided(side: int, times: int) -> int:
    for _ in range(times):
        side = (side + 1) // 2
    return side

"""Small networks for 32 x 32 RGB images and 10 classes, at the initialisation their papers or torch give them.

They span what decides whether a gradient gives an image away: a linear layer that sees the image (`mlp`), strided
ReLU convolutions that keep it (`conv2`), the smooth network of the first published attacks (`lenet`), and deep
networks with BatchNorm (`convnet8`, and `resnet8`, which only the overhead benchmark trains).
"""

from __future__ import annotations

from torch import Tensor, nn

CLASSES = 10
SIDE = 32


def mlp() -> nn.Module:
    """Three linear layers, 3072-512-512-10: the first is fed by the image itself."""
    return nn.Sequential(
        nn.Flatten(),
        nn.Linear(3 * SIDE * SIDE, 512),
        nn.ReLU(),
        nn.Linear(512, 512),
        nn.ReLU(),
        nn.Linear(512, CLASSES),
    )


def conv2() -> nn.Module:
    """Two strided ReLU convolutions and a linear head."""
    return nn.Sequential(
        nn.Conv2d(3, 32, 3, stride=2, padding=1),
        nn.ReLU(),
        nn.Conv2d(32, 64, 3, stride=2, padding=1),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(64 * 8 * 8, CLASSES),
    )


def lenet() -> nn.Module:
    """The sigmoid LeNet of deep leakage from gradients (Zhu et al., arXiv:1906.08935), weights U(-0.5, 0.5)."""
    layers: list[nn.Module] = []
    for channels, stride in ((3, 2), (12, 2), (12, 1)):
        layers += [nn.Conv2d(channels, 12, 5, stride=stride, padding=2), nn.Sigmoid()]
    model = nn.Sequential(*layers, nn.Flatten(), nn.Linear(12 * 8 * 8, CLASSES))
    for parameter in model.parameters():
        nn.init.uniform_(parameter, -0.5, 0.5)
    return model


def convnet8(width: int = 32) -> nn.Module:
    """Eight 3 x 3 convolutions of one width with BatchNorm and ReLU, three of them strided, and a linear head."""
    layers: list[nn.Module] = []
    channels = 3
    for stride in (1, 1, 2, 1, 2, 1, 2, 1):
        layers += [nn.Conv2d(channels, width, 3, stride=stride, padding=1), nn.BatchNorm2d(width), nn.ReLU()]
        channels = width
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(width * 4 * 4, CLASSES))


class ResidualBlock(nn.Module):
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
        self.activation = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        return self.activation(self.body(x) + self.shortcut(x))


def resnet8(width: int = 16) -> nn.Module:
    """A small residual network with BatchNorm and global average pooling."""
    return nn.Sequential(
        nn.Conv2d(3, width, 3, padding=1, bias=False),
        nn.BatchNorm2d(width),
        nn.ReLU(),
        ResidualBlock(width, width, 1),
        ResidualBlock(width, 2 * width, 2),
        ResidualBlock(2 * width, 4 * width, 2),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(4 * width, CLASSES),
    )

"""Small networks for 32 x 32 RGB images and 10 classes, at the initialisation their papers or torch give them.

They span what decides whether a gradient gives an image away: a linear layer that sees the image (`mlp`), strided
ReLU convolutions that keep it (`conv2`), the smooth network of the first published attacks (`lenet`), deep networks
with BatchNorm (`convnet8`, and `resnet8`, which only the overhead benchmark trains), and a vision transformer (`vit`).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torchvision.models import VisionTransformer
from torchvision.models import resnet18 as torchvision_resnet18

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
    """`lenet_default` with weights U(-0.5, 0.5), as in the first published attacks."""
    model = lenet_default()
    for parameter in model.parameters():
        nn.init.uniform_(parameter, -0.5, 0.5)
    return model


def lenet_default() -> nn.Module:
    """The sigmoid LeNet of deep leakage from gradients (Zhu et al., arXiv:1906.08935), initialised by torch."""
    layers: list[nn.Module] = []
    for channels, stride in ((3, 2), (12, 2), (12, 1)):
        layers += [nn.Conv2d(channels, 12, 5, stride=stride, padding=2), nn.Sigmoid()]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(12 * 8 * 8, CLASSES))


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


def resnet18() -> nn.Module:
    """ResNet-18 with a 3 x 3 stem and no pooling after it, as is usual for 32 x 32 images."""
    model = torchvision_resnet18(num_classes=CLASSES)
    model.conv1 = nn.Conv2d(3, 64, 3, padding=1, bias=False)
    model.maxpool = nn.Identity()
    return model


def vit(width: int = 96) -> nn.Module:
    """A vision transformer on patches of 4 x 4: three pre-norm blocks, a class token, learned positions."""
    model = VisionTransformer(
        image_size=SIDE,
        patch_size=4,
        num_layers=3,
        num_heads=4,
        hidden_dim=width,
        mlp_dim=2 * width,
        num_classes=CLASSES,
    )
    # torchvision starts the head at zero, so that nothing before it has a gradient in the very first step.
    model.heads.head.reset_parameters()
    return model


def train(model: nn.Module, pixels: Tensor, labels: Tensor, *, epochs: int, seed: int) -> None:
    """Train on images in the model's input space: Adam, learning rate 1e-3, batches of 50, random mirroring."""
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    model.train()
    for _ in range(epochs):
        for chosen in torch.randperm(len(pixels), generator=generator).split(50):
            mirrored = torch.rand((len(chosen), 1, 1, 1), generator=generator) < 0.5
            images = torch.where(mirrored, pixels[chosen].flip(-1), pixels[chosen])
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(images), labels[chosen]).backward()
            optimizer.step()

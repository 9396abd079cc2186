"""Small networks for 32 x 32 RGB images and 10 classes, at the initialisation their papers or torch give them.

They span what decides whether a gradient gives an image away: a linear layer that sees the image (`mlp`), strided
ReLU convolutions that keep it (`conv2`), the smooth network of the first published attacks (`lenet`), deep networks
with BatchNorm (`convnet8`, and `resnet8`, which only the overhead benchmark trains), and a vision transformer (`vit`).

Ten more span what is used at 32 x 32: pooling, growing width, other norms, depthwise convolutions, projections and
concatenation. `FIRST_HALF` serves to choose the default attack, `OTHER_HALF` to report on it.
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


def pool_convnet(width: int = 16) -> nn.Module:
    """Eight 3 x 3 convolutions with BatchNorm and ReLU, widths w to 4w, and two overlapping 3 x 3 max-pools."""
    layers: list[nn.Module] = []
    channels = 3
    for factor in (1, 2, 2, 4, 4, 4, 0, 4, 4, 0):
        if factor:
            layers += [nn.Conv2d(channels, factor * width, 3, padding=1), nn.BatchNorm2d(factor * width), nn.ReLU()]
            channels = factor * width
        else:
            layers.append(nn.MaxPool2d(3))
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(channels * 3 * 3, CLASSES))


def projection_resnet(width: int = 16) -> nn.Module:
    """A residual network for CIFAR: three stages of two blocks, BatchNorm, 1 x 1 projections at the strides."""
    blocks: list[nn.Module] = []
    for inputs, outputs, stride in ((1, 1, 1), (1, 1, 1), (1, 2, 2), (2, 2, 1), (2, 4, 2), (4, 4, 1)):
        blocks.append(ResidualBlock(inputs * width, outputs * width, stride))
    stem = (nn.Conv2d(3, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU())
    return nn.Sequential(*stem, *blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4 * width, CLASSES))


class Shortcut(nn.Module):
    """A body plus its input, or a projection of it."""

    def __init__(self, body: nn.Module, projection: nn.Module | None = None) -> None:
        super().__init__()
        self.body, self.projection = body, projection

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x) + (x if self.projection is None else self.projection(x))


def _inverted_bottleneck(inputs: int, outputs: int, stride: int, expansion: int) -> nn.Module:
    """Widen by 1 x 1, a depthwise 3 x 3, narrow by 1 x 1; a shortcut where the shape stays."""
    inner = inputs * expansion
    body = nn.Sequential(
        nn.Conv2d(inputs, inner, 1, bias=False),
        nn.BatchNorm2d(inner),
        nn.ReLU6(),
        nn.Conv2d(inner, inner, 3, stride=stride, padding=1, groups=inner, bias=False),
        nn.BatchNorm2d(inner),
        nn.ReLU6(),
        nn.Conv2d(inner, outputs, 1, bias=False),
        nn.BatchNorm2d(outputs),
    )
    return Shortcut(body) if stride == 1 and inputs == outputs else body


def mobilenet(width: int = 8, expansion: int = 4) -> nn.Module:
    """MobileNetV2 (arXiv:1801.04381) cut to five inverted bottlenecks, the stem without a stride."""
    shapes = ((1, 1, 1), (1, 2, 2), (2, 2, 1), (2, 4, 2), (4, 4, 1))
    blocks = [_inverted_bottleneck(i * width, o * width, stride, expansion) for i, o, stride in shapes]
    stem = (nn.Conv2d(3, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU6())
    top = (nn.Conv2d(4 * width, 8 * width, 1, bias=False), nn.BatchNorm2d(8 * width), nn.ReLU6())
    return nn.Sequential(*stem, *blocks, *top, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8 * width, CLASSES))


def group_convnet(width: int = 32, groups: int = 8) -> nn.Module:
    """Six 3 x 3 convolutions with GroupNorm and ReLU, widths w to 4w, three of them strided."""
    layers: list[nn.Module] = []
    channels = 3
    for factor, stride in ((1, 1), (1, 2), (2, 1), (2, 2), (4, 1), (4, 2)):
        outputs = factor * width
        layers += [nn.Conv2d(channels, outputs, 3, stride=stride, padding=1), nn.GroupNorm(groups, outputs), nn.ReLU()]
        channels = outputs
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(channels * 4 * 4, CLASSES))


def plain_convnet(width: int = 16) -> nn.Module:
    """A network of tutorials: two 5 x 5 convolutions, each before a 2 x 2 max-pool, and three linear layers."""
    return nn.Sequential(
        nn.Conv2d(3, width, 5),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(width, 2 * width, 5),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(2 * width * 5 * 5, 120),
        nn.ReLU(),
        nn.Linear(120, 84),
        nn.ReLU(),
        nn.Linear(84, CLASSES),
    )


def vgg(width: int = 32) -> nn.Module:
    """VGG with BatchNorm: widths w to 4w, a 2 x 2 max-pool after two convolutions of each, two linear layers."""
    layers: list[nn.Module] = []
    channels = 3
    for outputs in (width, 2 * width, 4 * width):
        for _ in range(2):
            layers += [nn.Conv2d(channels, outputs, 3, padding=1), nn.BatchNorm2d(outputs), nn.ReLU()]
            channels = outputs
        layers.append(nn.MaxPool2d(2))
    head = (nn.Linear(channels * 4 * 4, 128), nn.ReLU(), nn.Linear(128, CLASSES))
    return nn.Sequential(*layers, nn.Flatten(), *head)


def wide_resnet(width: int = 16, widening: int = 2, groups: int = 8) -> nn.Module:
    """A pre-activation residual network (arXiv:1605.07146) with GroupNorm: one wide block in each of three stages."""

    def block(inputs: int, outputs: int, stride: int) -> nn.Module:
        body = nn.Sequential(
            nn.Conv2d(inputs, outputs, 3, stride=stride, padding=1, bias=False),
            nn.GroupNorm(groups, outputs),
            nn.ReLU(),
            nn.Conv2d(outputs, outputs, 3, padding=1, bias=False),
        )
        projection = nn.Conv2d(inputs, outputs, 1, stride=stride, bias=False)
        return nn.Sequential(nn.GroupNorm(groups, inputs), nn.ReLU(), Shortcut(body, projection))

    widths = (width, widening * width, 2 * widening * width, 4 * widening * width)
    blocks = [block(widths[i], widths[i + 1], 1 if i == 0 else 2) for i in range(3)]
    top = (nn.GroupNorm(groups, widths[3]), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    return nn.Sequential(nn.Conv2d(3, width, 3, padding=1, bias=False), *blocks, *top, nn.Linear(widths[3], CLASSES))


class ChannelNorm(nn.Module):
    """LayerNorm over the channels of each place."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(channels)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(x.movedim(1, -1)).movedim(-1, 1)


def convnext(width: int = 32) -> nn.Module:
    """ConvNeXt (arXiv:2201.03545) for 32 x 32: 2 x 2 patches, two stages of two blocks, no layer scale."""

    def block(channels: int) -> nn.Module:
        return Shortcut(
            nn.Sequential(
                nn.Conv2d(channels, channels, 7, padding=3, groups=channels),
                ChannelNorm(channels),
                nn.Conv2d(channels, 4 * channels, 1),
                nn.GELU(),
                nn.Conv2d(4 * channels, channels, 1),
            )
        )

    return nn.Sequential(
        nn.Conv2d(3, width, 2, stride=2),
        ChannelNorm(width),
        block(width),
        block(width),
        ChannelNorm(width),
        nn.Conv2d(width, 2 * width, 2, stride=2),
        block(2 * width),
        block(2 * width),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.LayerNorm(2 * width),
        nn.Linear(2 * width, CLASSES),
    )


def instance_convnet(width: int = 64) -> nn.Module:
    """The network of data set distillation: three 3 x 3 convolutions, InstanceNorm, ReLU, 2 x 2 average pooling."""
    layers: list[nn.Module] = []
    for channels in (3, width, width):
        layers += [nn.Conv2d(channels, width, 3, padding=1), nn.GroupNorm(width, width), nn.ReLU(), nn.AvgPool2d(2)]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(width * 4 * 4, CLASSES))


class Concatenation(nn.Module):
    """A layer of DenseNet: BatchNorm, ReLU and a convolution, whose result joins its input."""

    def __init__(self, channels: int, growth: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.BatchNorm2d(channels), nn.ReLU(), nn.Conv2d(channels, growth, 3, padding=1, bias=False)
        )

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([x, self.body(x)], dim=1)


def densenet(growth: int = 12, layers: int = 4) -> nn.Module:
    """DenseNet (arXiv:1608.06993): three dense blocks, between them a halving 1 x 1 convolution and average pooling."""
    channels = 2 * growth
    modules: list[nn.Module] = [nn.Conv2d(3, channels, 3, padding=1, bias=False)]
    for position in range(3):
        if position:
            modules += [nn.BatchNorm2d(channels), nn.ReLU(), nn.Conv2d(channels, channels // 2, 1, bias=False)]
            modules.append(nn.AvgPool2d(2))
            channels //= 2
        for _ in range(layers):
            modules.append(Concatenation(channels, growth))
            channels += growth
    top = (nn.BatchNorm2d(channels), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    return nn.Sequential(*modules, *top, nn.Linear(channels, CLASSES))


FIRST_HALF = (pool_convnet, projection_resnet, mobilenet, group_convnet, plain_convnet)
OTHER_HALF = (vgg, wide_resnet, convnext, instance_convnet, densenet)


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


def train(
    model: nn.Module, pixels: Tensor, labels: Tensor, *, epochs: int, seed: int, most_steps: int | None = None
) -> None:
    """Train on images in the model's input space: Adam, learning rate 1e-3, batches of 50, random mirroring."""
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    model.train()
    steps = 0
    for _ in range(epochs):
        for chosen in torch.randperm(len(pixels), generator=generator).split(50):
            if steps == most_steps:
                return
            steps += 1
            mirrored = torch.rand((len(chosen), 1, 1, 1), generator=generator) < 0.5
            images = torch.where(mirrored, pixels[chosen].flip(-1), pixels[chosen])
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(images), labels[chosen]).backward()
            optimizer.step()

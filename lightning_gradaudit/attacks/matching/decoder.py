"""An untrained convolutional decoder as the image prior: its structure alone prefers natural images."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812

from lightning_gradaudit.attacks.matching.parametrizations import Parametrization
from lightning_gradaudit.errors import InvalidInputError
from lightning_gradaudit.simulation.observation import Observation

_SLOPE = 0.2  # of the leaky ReLU
_GROUPS = 8
_EPSILON = 1e-5


@dataclass(frozen=True, kw_only=True)
class UntrainedDecoder(Parametrization):
    """Images as the output of a small decoder whose weights are optimised and whose input is fixed noise.

    Per image of the batch a code of `code` channels at 1/2^upsamplings of the image's side; then per stage bilinear
    upsampling by 2, a 3 x 3 convolution of `width` channels, group normalisation, leaky ReLU; a last 3 x 3
    convolution and a sigmoid give pixels. All images share the weights and differ by their codes, which are optimised
    too. The idea is the deep image prior (Ulyanov et al., arXiv:1711.10925), used for gradient inversion by
    CI-Net (Zhang et al., 2023) and GI-NAS (arXiv:2405.20725).

    Args:
        width: Channels of the hidden layers, a multiple of 8.
        upsamplings: Number of stages.
        code: Channels of the code.
        separate: One set of weights per image instead of shared ones.
    """

    width: int = 64
    upsamplings: int = 2
    code: int = 16
    separate: bool = False

    def __post_init__(self) -> None:
        if self.width < _GROUPS or self.width % _GROUPS:
            raise InvalidInputError(f"width must be a positive multiple of {_GROUPS}, got {self.width}.")
        if self.upsamplings < 1 or self.code < 1:
            raise InvalidInputError(f"upsamplings and code must be >= 1, got {self.upsamplings} and {self.code}.")

    def start(self, observation: Observation, generator: torch.Generator) -> list[Tensor]:
        batch, channels, height, width = observation.shape
        shrink = 2**self.upsamplings
        copies = batch if self.separate else 1
        widths = [self.code, *[self.width] * self.upsamplings]
        variables = [torch.randn((batch, self.code, -(-height // shrink), -(-width // shrink)), generator=generator)]
        for inputs, outputs in zip(widths, [*widths[1:], channels], strict=True):
            bound = (1 / (9 * inputs)) ** 0.5  # the usual uniform initialisation of a convolution
            weight = torch.rand((copies * outputs, inputs, 3, 3), generator=generator) * 2 - 1
            variables += [weight * bound, torch.zeros(copies * outputs)]
        for _ in range(self.upsamplings):
            variables += [torch.ones(copies * self.width), torch.zeros(copies * self.width)]
        return [v.to(observation.device) for v in variables]

    def images(self, variables: list[Tensor], observation: Observation) -> Tensor:
        batch, _, height, width = observation.shape
        copies = batch if self.separate else 1
        convolutions = 2 * (self.upsamplings + 1)
        hidden, layers, norms = variables[0], variables[1 : 1 + convolutions], variables[1 + convolutions :]
        # Separate decoders run as one grouped convolution over the images laid out as channels.
        hidden = hidden.reshape(batch // copies, -1, *hidden.shape[2:])
        for stage in range(self.upsamplings):
            hidden = F.interpolate(hidden, scale_factor=2.0, mode="bilinear", align_corners=False)
            hidden = F.conv2d(hidden, layers[2 * stage], layers[2 * stage + 1], padding=1, groups=copies)
            hidden = F.group_norm(hidden, copies * _GROUPS, norms[2 * stage], norms[2 * stage + 1], _EPSILON)
            hidden = F.leaky_relu(hidden, _SLOPE)
        pixels = F.conv2d(hidden, layers[-2], layers[-1], padding=1, groups=copies).sigmoid()
        pixels = pixels.reshape(batch, -1, *pixels.shape[2:])[..., :height, :width]
        return observation.normalization.from_pixels(pixels)

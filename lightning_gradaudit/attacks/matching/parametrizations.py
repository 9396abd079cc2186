"""Where a candidate starts, and which variables it is a function of.

The loop optimises variables; a parametrization maps them to images. Pixels are the simplest choice; `priors.Whitened`
puts knowledge of images into the map itself.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_gradaudit.errors import InvalidInputError
from lightning_gradaudit.simulation.observation import Observation


class Start(ABC):
    """Draw the first candidate."""

    @abstractmethod
    def __call__(self, observation: Observation, generator: torch.Generator) -> Tensor:
        """Return images (B, C, H, W) in the model's input space, on the observation's device."""


@dataclass(frozen=True)
class NoiseStart(Start):
    """N(0, 1) in normalised units; around the middle of the pixel range where no normalisation is known."""

    def __call__(self, observation: Observation, generator: torch.Generator) -> Tensor:
        noise = torch.randn(observation.shape, generator=generator).to(observation.device)
        if observation.normalization.std != (1.0,):
            return noise
        return observation.normalization.from_pixels(0.5 + 0.25 * noise)


@dataclass(frozen=True, kw_only=True)
class TiledStart(Start):
    """One small random patch per image, repeated (Wei et al., arXiv:2004.10397): converges faster than noise.

    Args:
        side: Side of the patch, in pixels.
    """

    side: int = 4

    def __post_init__(self) -> None:
        if self.side < 1:
            raise InvalidInputError(f"side must be >= 1, got {self.side}.")

    def __call__(self, observation: Observation, generator: torch.Generator) -> Tensor:
        batch, channels, height, width = observation.shape
        patch = torch.rand((batch, channels, self.side, self.side), generator=generator).to(observation.device)
        tiles = patch.repeat(1, 1, -(-height // self.side), -(-width // self.side))
        return observation.normalization.from_pixels(tiles[..., :height, :width])


@dataclass(frozen=True)
class GreyStart(Start):
    """Mid-grey."""

    def __call__(self, observation: Observation, generator: torch.Generator) -> Tensor:
        grey = torch.full(observation.shape, 0.5, device=observation.device)
        return observation.normalization.from_pixels(grey)


class Parametrization(ABC):
    """Images as a function of the variables that are optimised."""

    @abstractmethod
    def start(self, observation: Observation, generator: torch.Generator) -> list[Tensor]:
        """Return the variables of a fresh candidate, without a graph."""

    @abstractmethod
    def images(self, variables: list[Tensor], observation: Observation) -> Tensor:
        """Return the images (B, C, H, W) in the model's input space, differentiable in the variables."""

    def variables(self, images: Tensor, observation: Observation) -> list[Tensor] | None:
        """Return the variables of given images, to start there; None: the map has no inverse."""
        return None

    def penalty(self, variables: list[Tensor]) -> Tensor | None:
        """Return a penalty on the variables (a negative log-prior), a scalar; None: none."""
        return None

    def project(self, variables: list[Tensor], observation: Observation) -> None:  # noqa: B027 - most need none
        """Project the variables onto the allowed set, in place, after a step."""


@dataclass(frozen=True, kw_only=True)
class Pixels(Parametrization):
    """The images themselves are the variables.

    Args:
        initial: First images.
        box: Clip the pixels to [0, 1] after every step.
    """

    initial: Start = NoiseStart()
    box: bool = True

    def start(self, observation: Observation, generator: torch.Generator) -> list[Tensor]:
        return [self.initial(observation, generator)]

    def images(self, variables: list[Tensor], observation: Observation) -> Tensor:
        return variables[0]

    def variables(self, images: Tensor, observation: Observation) -> list[Tensor]:
        return [images.clone()]

    def project(self, variables: list[Tensor], observation: Observation) -> None:
        if self.box:
            low, high = observation.box
            with torch.no_grad():
                torch.minimum(torch.maximum(variables[0], low), high, out=variables[0])

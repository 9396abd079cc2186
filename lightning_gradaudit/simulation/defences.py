"""What a client does to a gradient before it leaves: pure `Tensors -> Tensors`.

A defence is public (the adversary knows its kind and strength, as Kerckhoffs asks); the random numbers it draws
are not: they come from a generator that only the client holds.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from lightning_gradaudit.errors import InvalidInputError
from lightning_gradaudit.utils.tensors import Tensors, global_norm


@runtime_checkable
class Defence(Protocol):
    """Change a gradient before it is shared."""

    def __call__(self, gradients: Tensors, *, generator: torch.Generator) -> dict[str, Tensor]:
        """Return the gradient that leaves; the argument is left as it was."""
        ...


@dataclass(frozen=True, kw_only=True)
class GaussianNoise:
    """Add independent Gaussian noise to every coordinate.

    Args:
        relative: Expected norm of the noise over the norm of the gradient (0.3 is mild, 30 drowns it).
        std: Standard deviation per coordinate, in units of the gradient. Give exactly one of the two.

    Raises:
        InvalidInputError: When none or both are given, or the value is negative.
    """

    relative: float | None = None
    std: float | None = None

    def __post_init__(self) -> None:
        given = [value for value in (self.relative, self.std) if value is not None]
        if len(given) != 1 or not given[0] >= 0:
            raise InvalidInputError(
                f"GaussianNoise needs exactly one of relative= and std=, and it must be >= 0; got {self!r}."
            )

    def __call__(self, gradients: Tensors, *, generator: torch.Generator) -> dict[str, Tensor]:
        """Return noised copies. Noise is drawn on the generator's device in the order of the mapping."""
        if self.std is not None:
            std: float | Tensor = self.std
        else:
            coordinates = sum(t.numel() for t in gradients.values())
            std = self.relative * global_norm(gradients) / coordinates**0.5  # type: ignore[operator]
        return {
            name: t
            + std * torch.randn(t.shape, generator=generator, device=generator.device, dtype=torch.float32).to(t)
            for name, t in gradients.items()
        }


@dataclass(frozen=True, kw_only=True)
class ClipNorm:
    """Scale the whole gradient down to a largest global norm (with `GaussianNoise`: the Gaussian mechanism)."""

    max_norm: float

    def __post_init__(self) -> None:
        if not self.max_norm > 0:
            raise InvalidInputError(f"ClipNorm(max_norm=) must be > 0, got {self.max_norm!r}.")

    def __call__(self, gradients: Tensors, *, generator: torch.Generator) -> dict[str, Tensor]:
        """Return scaled copies; a gradient below the limit is unchanged."""
        scale = (self.max_norm / global_norm(gradients).clamp_min(1e-30)).clamp(max=1.0)
        return {name: t * scale for name, t in gradients.items()}


@dataclass(frozen=True, kw_only=True)
class ClipValue:
    """Limit every coordinate to [-max_value, max_value]."""

    max_value: float

    def __post_init__(self) -> None:
        if not self.max_value > 0:
            raise InvalidInputError(f"ClipValue(max_value=) must be > 0, got {self.max_value!r}.")

    def __call__(self, gradients: Tensors, *, generator: torch.Generator) -> dict[str, Tensor]:
        """Return limited copies."""
        return {name: t.clamp(-self.max_value, self.max_value) for name, t in gradients.items()}


def derived_seed(seed: int, purpose: str) -> int:
    """Derive a seed for one purpose, one-way: what the adversary may know of one stream tells nothing of another."""
    digest = hashlib.sha256(f"{purpose}:{seed}".encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


def apply_defences(
    defences: tuple[Defence, ...], gradients: Tensors, *, seed: int, device: torch.device | str = "cpu"
) -> dict[str, Tensor]:
    """Apply defences in order with a generator seeded by `seed`, so that the auditor can repeat the draw."""
    generator = torch.Generator(device=device).manual_seed(derived_seed(seed, "defence"))
    shared = dict(gradients)
    for defence in defences:
        shared = defence(shared, generator=generator)
    return shared

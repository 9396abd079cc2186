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


@dataclass(frozen=True, kw_only=True)
class ClipLayers:
    """Scale the gradient of each layer (the tensors of one module) down to a largest norm."""

    max_norm: float

    def __post_init__(self) -> None:
        if not self.max_norm > 0:
            raise InvalidInputError(f"ClipLayers(max_norm=) must be > 0, got {self.max_norm!r}.")

    def __call__(self, gradients: Tensors, *, generator: torch.Generator) -> dict[str, Tensor]:
        """Return scaled copies; a layer below the limit is unchanged."""
        layers: dict[str, dict[str, Tensor]] = {}
        for name, t in gradients.items():
            layers.setdefault(name.rpartition(".")[0], {})[name] = t
        scale = {k: (self.max_norm / global_norm(own).clamp_min(1e-30)).clamp(max=1.0) for k, own in layers.items()}
        return {name: t * scale[name.rpartition(".")[0]] for name, t in gradients.items()}


@dataclass(frozen=True, kw_only=True)
class LaplaceNoise:
    """Add independent Laplace noise to every coordinate.

    Args:
        relative: Expected norm of the noise over the norm of the gradient.
        scale: Of the distribution, in units of the gradient; its standard deviation is √2 times that. Give exactly one.

    Raises:
        InvalidInputError: When none or both are given, or the value is negative.
    """

    relative: float | None = None
    scale: float | None = None

    def __post_init__(self) -> None:
        given = [value for value in (self.relative, self.scale) if value is not None]
        if len(given) != 1 or not given[0] >= 0:
            raise InvalidInputError(
                f"LaplaceNoise needs exactly one of relative= and scale=, and it must be >= 0; got {self!r}."
            )

    def __call__(self, gradients: Tensors, *, generator: torch.Generator) -> dict[str, Tensor]:
        """Return noised copies. Noise is drawn on the generator's device in the order of the mapping."""
        if self.scale is not None:
            scale: float | Tensor = self.scale
        else:
            coordinates = sum(t.numel() for t in gradients.values())
            scale = self.relative * global_norm(gradients) / (2 * coordinates) ** 0.5  # type: ignore[operator]
        shared = {}
        for name, t in gradients.items():
            # The difference of two exponentials; float64, so that the tail is not cut at 2^-24.
            uniform = torch.rand((2, *t.shape), generator=generator, device=generator.device, dtype=torch.float64)
            exponential = -torch.log1p(-uniform)
            shared[name] = t + scale * (exponential[0] - exponential[1]).to(t)
        return shared


@dataclass(frozen=True, kw_only=True)
class PruneSmallest:
    """Share only the largest coordinates of each tensor and zeros for the rest (sparsification, top-k).

    Args:
        share: Of each tensor's coordinates that is set to 0, in [0, 1); one coordinate at least is kept.
    """

    share: float

    def __post_init__(self) -> None:
        if not 0 <= self.share < 1:
            raise InvalidInputError(f"PruneSmallest(share=) must be in [0, 1), got {self.share!r}.")

    def __call__(self, gradients: Tensors, *, generator: torch.Generator) -> dict[str, Tensor]:
        """Return pruned copies; coordinates as large as the smallest kept one are kept too."""
        shared = {}
        for name, t in gradients.items():
            size = t.abs().flatten()
            kept = max(1, round((1 - self.share) * size.numel()))
            shared[name] = t * (t.abs() >= size.kthvalue(size.numel() - kept + 1).values)
        return shared


@dataclass(frozen=True, kw_only=True)
class SignOnly:
    """Share the sign of each coordinate, times a scale (sign-SGD, Bernstein et al., arXiv:1802.04434).

    Args:
        scale: Of all coordinates; None: each tensor's mean absolute value, which is shared with its signs.
    """

    scale: float | None = None

    def __post_init__(self) -> None:
        if self.scale is not None and not self.scale > 0:
            raise InvalidInputError(f"SignOnly(scale=) must be > 0 or None, got {self.scale!r}.")

    def __call__(self, gradients: Tensors, *, generator: torch.Generator) -> dict[str, Tensor]:
        """Return signs, 0 where the gradient is 0."""
        return {n: t.sign() * (t.abs().mean() if self.scale is None else self.scale) for n, t in gradients.items()}


@dataclass(frozen=True, kw_only=True)
class Quantise:
    """Round each coordinate to one of 2^bits - 1 levels, evenly spaced over [-m, m], m the tensor's largest value.

    Args:
        bits: In [2, 16]; m itself is shared with the levels.
        stochastic: Round up or down at random so that the mean is right (QSGD, Alistarh et al., arXiv:1610.02132);
            False: to the nearest.
    """

    bits: int
    stochastic: bool = True

    def __post_init__(self) -> None:
        if not 2 <= self.bits <= 16:
            raise InvalidInputError(f"Quantise(bits=) must be in [2, 16], got {self.bits!r}.")

    def __call__(self, gradients: Tensors, *, generator: torch.Generator) -> dict[str, Tensor]:
        """Return rounded copies; randomness is drawn on the generator's device in the order of the mapping."""
        shared = {}
        for name, t in gradients.items():
            step = self.step_of(t)
            level = t / step
            if self.stochastic:
                level = torch.floor(level + torch.rand(t.shape, generator=generator, device=generator.device).to(t))
            most = 2 ** (self.bits - 1) - 1  # rounding may leave the largest value a little above its level
            shared[name] = level.round().clamp(-most, most) * step
        return shared

    def step_of(self, tensor: Tensor) -> Tensor:
        """Return the distance between two levels; the same for a tensor and for its rounded copy."""
        return tensor.abs().max().clamp_min(1e-30) / (2 ** (self.bits - 1) - 1)


@dataclass(frozen=True, kw_only=True)
class Soteria:
    """Set the largest columns of one layer's weight gradient to 0, after Sun et al., arXiv:2012.06043.

    A column belongs to one coordinate r_i of the representation that the layer gets. The paper prunes the coordinates
    with the largest |r_i| / ‖∂r_i/∂x‖. A function of the gradient alone has no ∂r_i/∂x; this one takes them as equal,
    and the norm of the column, which is proportional to |r_i| for one image, in place of r_i. The known weakness stays:
    every other layer is shared as it is, and an adversary who leaves the pruned columns out reconstructs from the rest.

    Args:
        layer: Name of the layer's weight, (out, in, ...).
        share: Of the columns that is set to 0, in [0, 1).
    """

    layer: str
    share: float = 0.8

    def __post_init__(self) -> None:
        if not 0 <= self.share < 1:
            raise InvalidInputError(f"Soteria(share=) must be in [0, 1), got {self.share!r}.")

    def __call__(self, gradients: Tensors, *, generator: torch.Generator) -> dict[str, Tensor]:
        """Return the gradients with that layer's pruned."""
        weight = gradients.get(self.layer)
        if weight is None or weight.ndim < 2:
            raise InvalidInputError(
                f"Soteria(layer=): expected the name of a weight of at least two dimensions, got {self.layer!r}; "
                f"among the gradients are {list(gradients)[-4:]}."
            )
        norms = weight.detach().transpose(0, 1).flatten(1).norm(dim=1)
        pruned = norms.topk(round(self.share * len(norms))).indices
        return dict(gradients) | {self.layer: weight.index_fill(1, pruned, 0.0)}


@dataclass(frozen=True, kw_only=True)
class WithholdLayers:
    """Do not share some tensors at all: partial sharing, or layers that are frozen or trained apart.

    It comes first among several defences: what is done to the rest does not depend on what stays at home.

    Args:
        names: Of tensors, or of modules, all of whose tensors stay ("net.0" is "net.0.weight" and "net.0.bias").
    """

    names: tuple[str, ...]

    def __post_init__(self) -> None:
        if isinstance(self.names, str):
            raise InvalidInputError(f"WithholdLayers(names=) expects a sequence of names, got {self.names!r}.")
        object.__setattr__(self, "names", tuple(self.names))

    def __call__(self, gradients: Tensors, *, generator: torch.Generator) -> dict[str, Tensor]:
        """Return the tensors that are shared; an empty mapping where none is."""
        return {
            n: t for n, t in gradients.items() if not any(n == own or n.startswith(f"{own}.") for own in self.names)
        }


def check_defences(defences: tuple[Defence, ...]) -> None:
    """Check defences that are to act one after the other.

    Raises:
        InvalidInputError: When one is no defence, or `WithholdLayers` is not first.
    """
    for position, defence in enumerate(defences):
        if isinstance(defence, type) or not isinstance(defence, Defence):
            raise InvalidInputError(
                f"defences: expected objects such as GaussianNoise(relative=0.3), got {defence!r} at {position}."
            )
        if position and isinstance(defence, WithholdLayers):
            raise InvalidInputError("defences: WithholdLayers must come first; give all its names to one.")


def step_seed(seed: int, step: int) -> int:
    """Return the seed of one step of a run."""
    return seed * 1_000_003 + step


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

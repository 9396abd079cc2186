"""Matching objectives: how far a simulated gradient lies from the observed one.

An objective is a differentiable function. Attacks need its value and its derivative with respect to the simulated
gradient; one vector-Jacobian product then gives the derivative with respect to the images. The built-in objectives have
that derivative in closed form.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from lightning_gradaudit.errors import InvalidInputError
from lightning_gradaudit.utils.tensors import TINY, Tensors, global_norm, sum_of_squares

_LEAST_MOVEMENT_SHARE = 1e-12  # of the largest squared movement of a tensor


class Objective(ABC):
    """A differentiable distance between two gradients."""

    @property
    def references(self) -> int:
        """Number of gradients of noise images that `calibrated` needs; each costs one evaluation of the budget."""
        return 0

    def unit(self, observed: Tensors) -> float:
        """Return about what the worst candidates cost, so that other terms can be weighed; 1 for relative distances."""
        return 1.0

    def calibrated(self, references: Sequence[Tensors], observed: Tensors) -> Objective:
        """Return the objective for one observation, given gradients of noise images."""
        return self

    def of(self, observed: Tensors) -> Objective:
        """Return the objective with everything computed beforehand that depends on the observed gradient alone."""
        return self

    @abstractmethod
    def __call__(self, simulated: Tensors, observed: Tensors) -> Tensor:
        """Return a scalar >= 0 that is 0 when both are equal."""

    def value_and_gradient(self, simulated: Tensors, observed: Tensors) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the distance and its derivative with respect to `simulated`, both without a graph.

        Overridden where the derivative has a closed form; the result must be the same to rounding.
        """
        leaves = {name: t.detach().requires_grad_() for name, t in simulated.items()}
        with torch.enable_grad():
            value = self(leaves, observed)
        gradient = torch.autograd.grad(value, list(leaves.values()), allow_unused=True, materialize_grads=True)
        return value.detach(), dict(zip(leaves, gradient, strict=True))


@dataclass(frozen=True)
class CosineDistance(Objective):
    """1 - cos(g', g) over all tensors jointly, in [0, 2] (Geiping et al., arXiv:2003.14053).

    Computed as ½‖ĝ' - ĝ‖² of the unit vectors, which is the same number without the cancellation near 0.
    """

    def of(self, observed: Tensors) -> CosineDistance:
        if type(self) is not CosineDistance:  # a user's subclass may compute something else
            return self
        return _CosineDistanceTo(global_norm(observed))

    def __call__(self, simulated: Tensors, observed: Tensors) -> Tensor:
        return 0.5 * sum_of_squares(self._residual(simulated, observed, global_norm(simulated).clamp_min(TINY)))

    def value_and_gradient(self, simulated: Tensors, observed: Tensors) -> tuple[Tensor, dict[str, Tensor]]:
        with torch.no_grad():
            norm = global_norm(simulated).clamp_min(TINY)
            residual = self._residual(simulated, observed, norm)
            value = 0.5 * sum_of_squares(residual)
            # (I - ĝ'ĝ'ᵀ)(ĝ' - ĝ)/‖g'‖, and ĝ'ᵀ(ĝ' - ĝ) is the distance itself.
            return value, {name: (r - value / norm * simulated[name]) / norm for name, r in residual.items()}

    def _residual(self, simulated: Tensors, observed: Tensors, norm: Tensor) -> dict[str, Tensor]:
        other = self._norm(observed).clamp_min(TINY)
        return {name: simulated[name] / norm - g / other for name, g in observed.items()}

    def _norm(self, observed: Tensors) -> Tensor:
        return global_norm(observed)


@dataclass(frozen=True, eq=False)
class _CosineDistanceTo(CosineDistance):
    """The same for one observed gradient, whose norm is computed once: it is a pass over all weights."""

    norm: Tensor

    def _norm(self, observed: Tensors) -> Tensor:
        return self.norm


@dataclass(frozen=True)
class SquaredError(Objective):
    """‖g' - g‖², the objective of deep leakage from gradients (Zhu et al., arXiv:1906.08935).

    Args:
        scale: Factor on the sum; 1 as published, ½ in some later papers, 1/(2σ²) for Gaussian noise of deviation σ.
    """

    scale: float = 1.0

    def unit(self, observed: Tensors) -> float:
        return self.scale * float(sum_of_squares(observed))

    def __call__(self, simulated: Tensors, observed: Tensors) -> Tensor:
        return self.scale * sum_of_squares({name: simulated[name] - g for name, g in observed.items()})

    def value_and_gradient(self, simulated: Tensors, observed: Tensors) -> tuple[Tensor, dict[str, Tensor]]:
        with torch.no_grad():
            residual = {name: simulated[name] - g for name, g in observed.items()}
            return self.scale * sum_of_squares(residual), {name: 2 * self.scale * r for name, r in residual.items()}


@dataclass(frozen=True, kw_only=True, eq=False)
class SensitivityWeightedError(Objective):
    """Σ_l w_l ‖g'_l - g_l‖² with w_l ∝ 1 / m_l^power, where m_l = mean over noise images of ‖g'_l - g_l‖².

    m_l measures how much a tensor depends on the images. A tensor that is large because of the labels alone, as the
    head's is, thus gets a small weight. The weights are scaled so that noise images cost 1 on average. The labels are
    needed, given or recovered.

    Args:
        power: 0 weighs all coordinates alike, 1 all tensors; in between, large tensors count more.
        draws: Number of batches of noise images.
        weights: Factor on each tensor, set by `calibrated`.
    """

    power: float = 0.5
    draws: int = 3
    weights: Mapping[str, Tensor] | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        if self.draws < 1 or not 0 <= self.power <= 1:
            raise InvalidInputError(f"SensitivityWeightedError needs draws >= 1 and power in [0, 1], got {self!r}.")

    @property
    def references(self) -> int:
        return self.draws

    def calibrated(self, references: Sequence[Tensors], observed: Tensors) -> SensitivityWeightedError:
        """Return the objective with its weights; without any reference, every tensor weighs 1."""
        if not references:
            return replace(self, weights={name: torch.ones((), device=g.device) for name, g in observed.items()})
        moved = torch.stack(
            [torch.stack([((r[name] - g) ** 2).sum() for r in references]).mean() for name, g in observed.items()]
        )
        # A tensor that does not depend on the images differs by rounding alone.
        weights = moved.clamp_min(_LEAST_MOVEMENT_SHARE * moved.max()).clamp_min(TINY) ** -self.power
        weights = weights / (weights * moved).sum().clamp_min(TINY)
        return replace(self, weights=dict(zip(observed, weights, strict=True)))

    def _weights(self) -> Mapping[str, Tensor]:
        if self.weights is None:
            raise InvalidInputError(
                "SensitivityWeightedError: expected weights, got none. Call calibrated(references, observed)."
            )
        return self.weights

    def __call__(self, simulated: Tensors, observed: Tensors) -> Tensor:
        return torch.stack([w * ((simulated[n] - observed[n]) ** 2).sum() for n, w in self._weights().items()]).sum()

    def value_and_gradient(self, simulated: Tensors, observed: Tensors) -> tuple[Tensor, dict[str, Tensor]]:
        with torch.no_grad():
            gradient = {n: 2 * w * (simulated[n] - observed[n]) for n, w in self._weights().items()}
            return self(simulated, observed), gradient

"""Second-order products without a second-order pass.

The product vᵀ ∂g/∂x of a gradient g = ∇_θ L(x, θ) is the derivative of ∇ₓ L along v in the weights, so a difference of
two first-order passes gives it: (∇ₓ L(x, θ + εv) - ∇ₓ L(x, θ)) / ε. The second pass needs no gradient of the weights.
Counted in forward passes, g takes 3 and the difference 2; differentiating twice takes 3 and 4.

Rounding calls for a large ε, curvature for a small one. At a kink no ε works: ∇ₓ L jumps where a ReLU switches, and in
a deep network every step switches some units. The exact derivative has no jumps, because it holds every unit on its
side. The second pass does the same: it repeats the decisions of the first.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from lightning_gradaudit.errors import UnsupportedError
from lightning_gradaudit.simulation.observation import Observation
from lightning_gradaudit.utils.tensors import Tensors, global_norm

_aten = torch.ops.aten
Rule = Callable[..., Any]


def step_length(weights: Tensors) -> Tensor:
    """Return how far to move the weights, a scalar: a compromise between rounding and curvature.

    It is eps^(2/3) of their norm, 2.4e-5 of it in float32.
    """
    dtype = next(iter(weights.values())).dtype
    return torch.finfo(dtype).eps ** (2 / 3) * global_norm(weights).detach()


def move_weights(weights: Tensors, direction: Tensors, length: Tensor) -> tuple[dict[str, Tensor], Tensor]:
    """Return the weights moved along a direction, and the distance in units of the direction.

    Args:
        weights: All weights; those without a direction stay.
        direction: Any vector, zero included.
        length: Length of the step, a scalar.
    """
    step = length / global_norm(direction).clamp_min(1e-30)
    beside = {name: weight.detach() for name, weight in weights.items()}
    return beside | {name: beside[name] + step * v for name, v in direction.items()}, step


class Kinks(TorchDispatchMode):
    """Record on which side of its kink every operation lies, and hold a later pass to the same sides.

    The block of the object itself records, the block of `repeated` replays; both include backward passes. Known are
    ReLU, leaky ReLU, clipped ReLU and 2-d maximum pooling.

    Attributes:
        decisions: Operations and what they decided, in order.
    """

    def __init__(self) -> None:
        super().__init__()
        self.decisions: list[tuple[object, Any]] = []
        self._next: int | None = None

    @contextmanager
    def repeated(self) -> Iterator[None]:
        """Repeat the recorded decisions inside this block.

        Raises:
            UnsupportedError: When the block runs other operations than were recorded.
        """
        self._next = 0
        try:
            with self:
                yield
            if self._next != len(self.decisions):
                raise UnsupportedError("the second pass through the model was shorter than the first")
        finally:
            self._next = None

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        rule = _RULES.get(func)
        if rule is None:
            return func(*args, **(kwargs or {}))
        decide, repeat = rule
        if self._next is not None:
            return repeat(self._decision(func), *args)
        found = func(*args)
        self.decisions.append((func, decide(found, *args)))
        return found

    def _decision(self, func: object) -> Any:
        assert self._next is not None
        recorded, decision = self.decisions[self._next] if self._next < len(self.decisions) else (None, None)
        if recorded is not func:
            raise UnsupportedError("the second pass through the model ran other operations than the first")
        self._next += 1
        return decision


def has_kinks(observation: Observation) -> bool:
    """Tell whether the client's model has known kinks, from one forward pass; False where labels are unknown."""
    if observation.labels is None:
        return False
    kinks = Kinks()
    with torch.no_grad(), kinks:
        observation.loss(torch.zeros(observation.shape, device=observation.device), observation.labels)
    return bool(kinks.decisions)


def _keep(kept: Tensor, x: Tensor, *_: Any) -> Tensor:
    return torch.where(kept, x, 0.0)


def _scale(factor: Tensor, x: Tensor, *_: Any) -> Tensor:
    return x * factor


def _scale_(factor: Tensor, x: Tensor, *_: Any) -> Tensor:
    return x.mul_(factor)


def _find_sides(found: Tensor, _: Tensor, low: float = -1.0, high: float = 1.0) -> tuple[Tensor, Tensor]:
    return found <= low, found >= high


def _clip(sides: tuple[Tensor, Tensor], x: Tensor, low: float = -1.0, high: float = 1.0) -> Tensor:
    return torch.where(sides[0], low, torch.where(sides[1], high, x))


def _clip_(sides: tuple[Tensor, Tensor], x: Tensor, low: float = -1.0, high: float = 1.0) -> Tensor:
    return x.copy_(_clip(sides, x, low, high))


def _find_slope(found: Tensor, _: Tensor, slope: float = 0.01) -> Tensor:
    return torch.where(found > 0, 1.0, slope)


def _pick(places: Tensor, x: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    return x.flatten(-2).gather(-1, places.flatten(-2)).view(places.shape), places


_RULES: dict[Any, tuple[Rule, Rule]] = {
    _aten.relu.default: (lambda found, _x: found > 0, _keep),
    _aten.relu_.default: (lambda found, _x: found > 0, _scale_),
    _aten.threshold_backward.default: (lambda _found, _gradient, x, threshold: x > threshold, _keep),
    _aten.leaky_relu.default: (_find_slope, _scale),
    _aten.leaky_relu_.default: (_find_slope, _scale_),
    _aten.leaky_relu_backward.default: (
        lambda _found, _gradient, x, slope, _is_result: torch.where(x > 0, 1.0, slope),
        _scale,
    ),
    _aten.hardtanh.default: (_find_sides, _clip),
    _aten.hardtanh_.default: (_find_sides, _clip_),
    _aten.hardtanh_backward.default: (lambda _found, _gradient, x, low, high: (x > low) & (x < high), _keep),
    _aten.max_pool2d_with_indices.default: (lambda found, *_: found[1], _pick),
}
"""For each operation with a kink: what it decides, from its result and arguments, and how to repeat that decision."""

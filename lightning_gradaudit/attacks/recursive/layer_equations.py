"""What one layer's gradient says of its input: a linear least-squares problem, or the inverse of an activation."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812
from torch.nn.grad import conv2d_input, conv2d_weight

from lightning_gradaudit.simulation.layer_trace import LayerCall
from lightning_gradaudit.simulation.observation import Observation
from lightning_gradaudit.utils.tensors import Tensors


@dataclass(frozen=True)
class EquationSettings:
    """Settings of the equations of a layer and their solution."""

    most_negative_part: float = 1e-6  # norm of the negative part, relative, that a non-negative solution may have
    rounding_residual: float = 1.5e-7  # relative residual that float32 gradients leave at the truth
    converged_gradient: float = 1e-24  # squared gradient of a least-squares problem, relative to its start
    active_set_sweeps: int = 12
    steps_per_sweep: int = 300  # of conjugate gradients
    overhead_steps: int = 2  # that the beginning and the end of a sweep cost
    released_pull: float = 1e-3  # of the largest: from it a value that was fixed at zero becomes free again
    most_preconditioned_pixels: int = 1024  # of a layer's input
    double_precision_cost: int = 2  # float64 arithmetic costs twice
    same_outputs_error: float = 1e-3  # relative, up to which a layer computes what its type says


SETTINGS = EquationSettings()


@dataclass(frozen=True, eq=False)
class Known:
    """An activation: its values, where they are known, and the derivative of the loss with respect to it."""

    values: Tensor
    where: Tensor
    derivative: Tensor

    def reshaped(self, shape: torch.Size) -> Known:
        """Return the same elements in another shape."""
        return Known(self.values.reshape(shape), self.where.reshape(shape), self.derivative.reshape(shape))


def prediction_error(call: LayerCall, known: Known, weights: Tensors, gradients: Tensors) -> float:
    """Compare gradients that follow from δ with the shared ones; they agree only if all layers above are solved.

    For a bias the gradient is the sum of δ, for the weight of a BatchNorm that of δ times what it scaled.

    Returns:
        The relative error, >= 0; 0 where there is nothing to compare.
    """
    batchnorm = isinstance(call.module, nn.modules.batchnorm._BatchNorm)
    if not batchnorm and not isinstance(call.module, (nn.Linear, nn.Conv2d)):
        return 0.0
    sums = _by_channel(known.derivative)
    predicted, observed = [], []
    if call.bias in gradients:
        predicted.append(sums)
        observed.append(gradients[call.bias].double())
    if batchnorm and call.weight in gradients and call.bias in weights:
        weight, bias = (weights[name].double() for name in (call.weight, call.bias))
        scaled = _by_channel(known.derivative * known.values) - bias * sums
        predicted.append(torch.where(weight != 0, scaled / weight, 0.0))
        observed.append(torch.where(weight != 0, gradients[call.weight].double(), 0.0))
    if not observed or observed[0].shape != predicted[0].shape:
        return 0.0
    seen = torch.cat(observed)
    return float((torch.cat(predicted) - seen).norm() / seen.norm().clamp_min(1e-300))


def _by_channel(values: Tensor) -> Tensor:
    return values.transpose(0, 1).flatten(1).sum(1)


def used_once(observation: Observation, calls: list[LayerCall]) -> set[str]:
    """Return the modules that ran once and share no parameter, so that a gradient belongs to one call alone."""
    runs = Counter(call.name for call in calls)
    modules = dict(observation.client.module.named_modules())
    owners = Counter(id(p) for module in modules.values() for p in module.parameters(recurse=False))
    alone = {name for name, m in modules.items() if all(owners[id(p)] == 1 for p in m.parameters(recurse=False))}
    return {name for name in alone if runs[name] == 1}


def operations(call: LayerCall) -> int:
    """Return the multiplications of one forward pass of a layer."""
    weight = getattr(call.module, "weight", None)
    if not isinstance(call.module, (nn.Linear, nn.Conv2d)) or weight is None:
        return 0
    return int(weight.numel()) * (call.outputs.numel() // len(weight))


def never_negative(module: nn.Module) -> bool:
    """Tell whether a module returns no negative value."""
    return isinstance(module, (nn.ReLU, nn.ReLU6, nn.Sigmoid))


def keeps_values(module: nn.Module) -> bool:
    """Tell whether a module changes no value, only the shape."""
    dropout = isinstance(module, nn.modules.dropout._DropoutNd) and not module.training
    return dropout or isinstance(module, (nn.Flatten, nn.Unflatten, nn.Identity))


def invert(module: nn.Module, known: Known) -> Known | None:
    """Step from the output of a smooth or strictly monotonic activation to its input; None: it has no inverse here."""
    if keeps_values(module):
        return known
    for kind, inverse in _INVERSES.items():
        if isinstance(module, kind):
            return inverse(module, known)
    return None


def _leaky_relu(module: nn.Module, known: Known) -> Known | None:
    below_zero = float(module.negative_slope)  # type: ignore[arg-type]
    if not below_zero > 0:
        return None
    slope = torch.where(known.values >= 0, 1.0, below_zero)
    return Known(known.values / slope, known.where, known.derivative * slope)


def _sigmoid(_: nn.Module, known: Known) -> Known:
    inside = (known.values > 0) & (known.values < 1)
    values = known.values.clamp(1e-12, 1 - 1e-12)
    return Known(values.logit(), known.where & inside, known.derivative * values * (1 - values))


def _tanh(_: nn.Module, known: Known) -> Known:
    inside = known.values.abs() < 1
    values = known.values.clamp(-1 + 1e-12, 1 - 1e-12)
    return Known(values.atanh(), known.where & inside, known.derivative * (1 - values**2))


_INVERSES: dict[type[nn.Module], Callable[[nn.Module, Known], Known | None]] = {
    nn.LeakyReLU: _leaky_relu,
    nn.Sigmoid: _sigmoid,
    nn.Tanh: _tanh,
}


def undo_batchnorm(call: LayerCall, known: Known, weights: Tensors) -> Known | None:
    """Step from the output of a BatchNorm in eval mode to its input; None where it uses the batch's statistics."""
    if call.module.training or f"{call.name}.running_var" not in weights:
        return None
    mean, variance = (weights[f"{call.name}.running_{kind}"].double() for kind in ("mean", "var"))
    scale = (variance + float(call.module.eps)).rsqrt()  # type: ignore[arg-type]
    if call.weight in weights:
        scale = scale * weights[call.weight].double()
    shift = -mean * scale
    if call.bias in weights:
        shift = shift + weights[call.bias].double()
    shape = (1, -1, *[1] * (known.values.ndim - 2))
    scale, shift = scale.reshape(shape), shift.reshape(shape)
    passes = (scale != 0).expand_as(known.values)  # a channel of weight 0 carries no information on its input
    values = torch.where(passes, (known.values - shift) / scale, 0.0)
    return Known(values, known.where & passes, known.derivative * scale)


@dataclass(frozen=True, eq=False)
class Layer:
    """The equations of a layer's input x: dL/dW = corr(x, δ), and W x + b = z where z is known.

    Both kinds are in units of their right-hand sides.

    Attributes:
        call: The layer, and a forward pass through it.
        weight: Its W.
        delta: dL/dz over `unit`.
        gradient: dL/dW over `unit`.
        outputs: z - b over its norm; 0 where z is not known.
        where: 1 over that norm where z is known, else 0.
        unit: Norm of dL/dW.
        how: Stride, padding, dilation and groups of a convolution.
    """

    call: LayerCall
    weight: Tensor
    delta: Tensor
    gradient: Tensor
    outputs: Tensor
    where: Tensor
    unit: Tensor
    how: tuple[Any, ...]

    @classmethod
    def of(cls, call: LayerCall, known: Known, weights: Tensors, gradients: Tensors) -> Layer | None:
        """Set up the equations; None for what is not a fully connected or 2-D convolutional layer of one image."""
        module = call.module
        convolution = isinstance(module, nn.Conv2d)
        if call.weight not in gradients or len(call.inputs) != 1 or call.inputs.ndim != (4 if convolution else 2):
            return None
        how: tuple[Any, ...] = ()
        if isinstance(module, nn.Conv2d):
            if module.padding_mode != "zeros" or (padding := _padding(module)) is None:
                return None
            how = (module.stride, padding, module.dilation, module.groups)
        weight, gradient = weights[call.weight].double(), gradients[call.weight].double()
        unit = gradient.norm()
        if not bool(unit > 0):
            return None
        bias = weights.get(call.bias, weight.new_zeros(len(weight)))
        shift = bias.double().reshape(1, -1, *[1] * (known.values.ndim - 2))
        outputs = torch.where(known.where, known.values - shift, 0.0)
        scale = 1 / outputs.norm().clamp_min(1e-300)
        layer = cls(
            call, weight, known.derivative / unit, gradient / unit, outputs * scale, known.where * scale, unit, how
        )
        # A subclass may compute something else.
        misfit = layer.forward(call.inputs.double()) + shift - call.outputs.double()
        return layer if bool(misfit.norm() <= SETTINGS.same_outputs_error * call.outputs.double().norm()) else None

    @property
    def equations(self) -> int:
        """Number of equations, without those that cannot be independent."""
        if not self.how:
            return self.call.inputs.numel() + int((self.where > 0).sum())
        filters, channels = len(self.weight) // self.how[3], self.call.inputs.shape[1]
        a_channel = min(filters * self.weight.shape[2:].numel(), self.call.inputs.shape[2:].numel())
        return channels * a_channel + int((self.where > 0).sum())

    def forward(self, x: Tensor) -> Tensor:
        """Return W x."""
        return F.conv2d(x, self.weight, None, *self.how) if self.how else F.linear(x, self.weight)

    def __call__(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return the left-hand sides."""
        by_weight = conv2d_weight(x, self.weight.shape, self.delta, *self.how) if self.how else self.delta.T @ x  # type: ignore[arg-type]
        return by_weight, self.where * self.forward(x)

    def adjoint(self, by_weight: Tensor, outputs: Tensor) -> Tensor:
        """Return the product of the transposed equations with their two kinds of residuals."""
        return self._back(by_weight, self.delta) + self._back(self.weight, self.where * outputs)

    def residual(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return the right-hand sides less the left-hand ones."""
        return _minus((self.gradient, self.outputs), self(x))

    def misfit(self, x: Tensor) -> float:
        """Return the norm of the residual over that of the right-hand sides."""
        return _norm(self.residual(x)) / _norm((self.gradient, self.outputs))

    def input_derivative(self) -> Tensor:
        """Return dL/dx."""
        return self._back(self.weight, self.delta * self.unit)

    def _back(self, weight: Tensor, delta: Tensor) -> Tensor:
        return conv2d_input(self.call.inputs.shape, weight, delta, *self.how) if self.how else delta @ weight  # type: ignore[arg-type]


def _padding(module: nn.Conv2d) -> tuple[int, int] | None:
    """Return a convolution's padding, rows and columns; None where it differs from side to side."""
    left, right, top, bottom = module._reversed_padding_repeated_twice
    return (top, left) if left == right and top == bottom else None


@dataclass(frozen=True, eq=False)
class Preconditioner:
    """Approximate the inverse of a convolution's normal equations.

    The part from the weight's gradient is one matrix over the pixels, the same for each input channel. The part from
    the outputs couples channels and is replaced by the mean of its diagonal. Grouped convolutions, and inputs of many
    pixels, have none.

    Attributes:
        layer: The equations.
        root: (pixels, pixels) Cholesky factor; None: the identity in its place.
    """

    layer: Layer
    root: Tensor | None

    @staticmethod
    def cost(layer: Layer) -> tuple[int, int]:
        """Return the multiplications that it takes to build it and to apply it."""
        pixels = layer.call.inputs.shape[2:].numel()
        if not layer.how or layer.how[3] != 1 or pixels > SETTINGS.most_preconditioned_pixels:
            return 0, 0
        equations = len(layer.weight) * layer.weight.shape[2:].numel()
        return equations * pixels**2 + pixels**3 // 3, 2 * layer.call.inputs.shape[1] * pixels**2

    @classmethod
    def of(cls, layer: Layer) -> Preconditioner:
        """Build it for some equations."""
        if cls.cost(layer) == (0, 0):
            return cls(layer, None)
        shape, how = layer.call.inputs.shape, layer.how
        kernel, filters = layer.weight.shape[2:], len(layer.weight)
        taps = torch.eye(kernel.numel()).to(layer.delta).reshape(-1, 1, 1, *kernel)
        each = layer.delta.transpose(0, 1)  # filters as a batch of one channel
        rows = torch.cat([conv2d_input((filters, 1, *shape[2:]), tap, each, *how).flatten(1) for tap in taps])  # type: ignore[arg-type]
        normal = rows.T @ rows
        outputs = conv2d_input(shape, layer.weight**2, layer.where**2, *how).mean()  # type: ignore[arg-type]
        normal.diagonal().add_(outputs + 1e-12 * normal.trace())
        root, failed = torch.linalg.cholesky_ex(normal)
        return cls(layer, None if bool(failed) else root)

    def __call__(self, x: Tensor) -> Tensor:
        if self.root is None:
            return x
        return torch.cholesky_solve(x.reshape(-1, len(self.root)).T, self.root).T.reshape(x.shape)


def fully_connected(layer: Layer, *, free: bool) -> Tensor:
    """Solve a fully connected layer, whose dL/dW = δ xᵀ alone determines x; with x >= 0 unless `free`."""
    x = (layer.delta @ layer.gradient) / (layer.delta**2).sum()
    return x if free else x.clamp_min(0)


def least_squares(
    layer: Layer,
    precondition: Callable[[Tensor], Tensor],
    *,
    start: Tensor,
    free: bool,
    most: int,
    deadline: float,
    enough: float = SETTINGS.rounding_residual,
) -> tuple[Tensor, int]:
    """Solve for x, with x >= 0 unless `free`: conjugate gradients on the positive part, which is revised in sweeps.

    Args:
        layer: The equations.
        precondition: An approximate inverse of their normal equations.
        start: Where the iteration begins; a solution that is not unique depends on it.
        free: Whether x may be negative.
        most: Largest number of steps, each of which costs a product with the equations and one with their transpose.
        deadline: Of `time.monotonic`.
        enough: Relative residual at which to stop.

    Returns:
        x, and the steps taken.
    """
    right = layer.adjoint(layer.gradient, layer.outputs)
    square = SETTINGS.converged_gradient * float((right * precondition(right)).sum())
    norm = enough * _norm((layer.gradient, layer.outputs))

    def is_done(rest: tuple[Tensor, Tensor], gradient: float) -> bool:
        return gradient <= square or _norm(rest) < norm or time.monotonic() > deadline

    x, positive, steps = start, torch.ones_like(right, dtype=torch.bool), 0
    for _ in range(1 if free else SETTINGS.active_set_sweeps):
        if steps + SETTINGS.overhead_steps > most:
            break
        steps += SETTINGS.overhead_steps
        x, taken = _conjugate_gradients(layer, precondition, x * positive, positive, most - steps, is_done)
        steps += taken
        pull = layer.adjoint(*layer.residual(x))
        wanted = ~positive & (pull > SETTINGS.released_pull * pull.abs().max())
        negative_part = float(x.clamp_max(0).norm())
        settled = negative_part < SETTINGS.most_negative_part * float(x.norm()) and not bool(wanted.any())
        if free or settled or time.monotonic() > deadline:
            break
        positive = (positive & ~(x < 0)) | wanted
    return (x if free else x.clamp_min(0)), steps


def _conjugate_gradients(
    layer: Layer,
    precondition: Callable[[Tensor], Tensor],
    x: Tensor,
    active: Tensor,
    most: int,
    is_done: Callable[[tuple[Tensor, Tensor], float], bool],
) -> tuple[Tensor, int]:
    """Solve the normal equations for the active elements of x by one sweep; return x and the steps taken."""
    rest, steps = layer.residual(x), 0
    descent = active * layer.adjoint(*rest)
    direction = active * precondition(descent)
    square = float((descent * direction).sum())
    while steps < min(SETTINGS.steps_per_sweep, most) and not is_done(rest, square):
        image = layer(direction)
        length = square / _norm(image) ** 2
        x = x + length * direction
        rest = _minus(rest, (length * image[0], length * image[1]))
        descent = active * layer.adjoint(*rest)
        towards = active * precondition(descent)
        before, square = square, float((descent * towards).sum())
        direction = towards + (square / before) * direction
        steps += 1
    return x, steps


def _norm(parts: tuple[Tensor, Tensor]) -> float:
    """Return the norm of both kinds of equations together."""
    return sum(float((part**2).sum()) for part in parts) ** 0.5


def _minus(left: tuple[Tensor, Tensor], right: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    return left[0] - right[0], left[1] - right[1]

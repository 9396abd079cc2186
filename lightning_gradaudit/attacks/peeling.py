"""Peel a chain of layers from the head down: each layer's input follows linearly from what is known above it.

For one image the gradient of a biased head gives the head's input exactly, and with it the loss's derivative by
that input. One layer further down both are known again: the derivative δ by the layer's output passes back through
activations and normalisations whose outputs are known, and the gradient of the layer's weight is *linear* in its input
for given δ, as is the layer's output where the activation after it let it through. Thousands of equations, often more
than unknowns and well conditioned, at any stage of training; where they are, a non-convex match of the whole network
becomes a row of linear least-squares problems. R-GAP (Zhu and Blaschko, arXiv:2010.07733) recurses in this way from the
loss; here the head starts it, activations may hide values (ReLU), inputs are known to be non-negative where a ReLU
made them, and a solution has to predict the bias gradients of the layers below before it is believed.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812
from torch.nn.grad import conv2d_input, conv2d_weight

from lightning_gradaudit.attacks.gradient_matching import GradientMatching
from lightning_gradaudit.attacks.iterative import IterativeAttack, Run, part_of
from lightning_gradaudit.attacks.labels import noise_images, placeholder_labels
from lightning_gradaudit.attacks.least_squares import LevenbergMarquardt
from lightning_gradaudit.attacks.objectives import MovedError
from lightning_gradaudit.attacks.optimizers import Adam, CosineDecay
from lightning_gradaudit.attacks.priors import Whitened
from lightning_gradaudit.attacks.regularizers import KnownFeatures
from lightning_gradaudit.budget import Budget, Meter
from lightning_gradaudit.errors import InvalidInputError
from lightning_gradaudit.observation import LayerCall, Observation
from lightning_gradaudit.reconstruction import Reconstruction

_RANK_ONE = 1e-3  # relative misfit of the head's gradient up to which its input is believed
_FITS = 1e-2  # relative residual of a layer's equations above which their solution is dropped
_PREDICTS = 0.15  # relative error of predicted bias gradients above which a solution is dropped
_EXACT = 1e-4  # the same, up to which the next layer can be built on it
_ZEROS = (1e-6, 1e-5, 1e-4, 1e-3, 1e-2)  # of the largest activation: what may count as switched off
_ZERO = 1e-6  # norm of the negative part, relative, that a non-negative solution may have
_ROUNDED = 1.5e-7  # relative residual that float32 gradients leave at the truth
_CONVERGED = 1e-24  # squared gradient of a least-squares problem, relative to its start
_SWEEPS = 12  # of the active set
_STEPS = 300  # of conjugate gradients in a sweep
_MOST_PIXELS = 1024  # of a layer's input whose equations are preconditioned
_UNLIMITED = 500.0  # evaluations, where only time is limited
_DOUBLE = 2  # float64 arithmetic costs twice


@dataclass(frozen=True, eq=False)
class Peeled:
    """What was recovered.

    Attributes:
        features: Inputs of modules by name, (1, ...), as far down as the equations determine them.
        image: (1, C, H, W) when the recursion reached the image, else None.
        cost: Arithmetic spent, in gradient evaluations.
        reason: Where it ended, and why.
    """

    features: dict[str, Tensor] = field(repr=False)
    image: Tensor | None = field(default=None, repr=False)
    cost: float = 0.0
    reason: str = ""


@dataclass(frozen=True, eq=False)
class _Known:
    """An activation: its values, where they are known, and the derivative of the loss by it."""

    values: Tensor
    where: Tensor
    derivative: Tensor


def peel(observation: Observation, *, budget: float, generator: torch.Generator) -> Peeled:
    """Recover the inputs of the layers of a chain, one image.

    Args:
        observation: One image through a chain of modules: each takes what the one before gave, reshaped at most
            or through a functional ReLU. Branches, pooling and train-mode BatchNorm end the recursion where they stand.
        budget: Largest arithmetic, in gradient evaluations.
        generator: Draws the image that the chain is read off.
    """
    if reason := _unsuitable(observation):
        return Peeled({}, reason=reason)
    with torch.no_grad():
        calls = observation.trace(noise_images(observation, generator), placeholder_labels(observation), kinds=None)
        return _Peeler(observation, calls, budget).run()


def _unsuitable(observation: Observation) -> str:
    if observation.batch_size != 1 or observation.protocol.optimizer is not None:
        return "only the gradient of a single image can be peeled"
    if observation.threat_model.defences or observation.noise_std or observation.protocol.clip is not None:
        return "the gradient was changed on its way"
    return ""


class _Peeler:
    def __init__(self, observation: Observation, calls: list[LayerCall], budget: float) -> None:
        self.observation, self.calls, self.budget = observation, calls, budget
        self.gradients = {name: g.double() for name, g in observation.gradients.items()}
        weights = {**observation.parameters, **observation.buffers}
        self.weights = {name: w.double() for name, w in weights.items() if w.is_floating_point()}
        self.evaluation = max(1, 7 * sum(_operations(call) for call in calls))
        self.spent = 0.0
        self.features: dict[str, Tensor] = {}

    def run(self) -> Peeled:
        if not self.calls or (known := self._head(self.calls[-1])) is None:
            return self._end("the last layer is not a linear head whose gradient gives its input away")
        below = self.calls[-1]
        solved, exact = below, True
        for position in range(len(self.calls) - 2, -1, -1):
            call = self.calls[position]
            if (linked := self._link(known, call, below)) is None:
                return self._end(f"{solved.name!r} is not fed by {call.name!r} alone")
            known, below = linked, call
            error = self._prediction_error(call, known)
            if error > _PREDICTS:
                self.features.pop(solved.name, None)
                return self._end(f"the input of {solved.name!r} is not determined")
            exact = exact and error < _EXACT
            if not isinstance(call.module, (nn.Linear, nn.Conv2d)):
                following = self.calls[position - 1] if position else None
                if (passed := self._pass(call, known, following)) is None:
                    return self._end(f"{call.name!r} ({type(call.module).__name__}) cannot be inverted")
                known = passed
                continue
            if not exact:
                return self._end(f"the input of {solved.name!r} is only approximate")
            below_zero = position == 0 or not _never_negative(self.calls[position - 1].module)
            found = self._solve(call, known, free=below_zero)
            if found is None:
                return self._end(f"the input of {call.name!r} is not determined")
            known, solved = found, call
            self.features[call.name] = known.values
        if tuple(known.values.shape) == self.observation.shape:
            return replace(self._end("reached the image"), image=known.values.to(self.observation.input_dtype))
        return self._end("the first layer is not fed by the image")

    def _end(self, reason: str) -> Peeled:
        features = {name: f.to(self.observation.input_dtype) for name, f in self.features.items()}
        return Peeled(features, cost=self.spent / self.evaluation, reason=reason)

    def _head(self, head: LayerCall) -> _Known | None:
        if head.weight not in self.gradients or head.bias not in self.gradients or head.outputs.ndim != 2:
            return None
        weight, bias = self.gradients[head.weight], self.gradients[head.bias]
        values = (bias @ weight) / (bias @ bias).clamp_min(1e-300)
        if not bool((weight - torch.outer(bias, values)).norm() < _RANK_ONE * weight.norm()):
            return None
        self.features[head.name] = values[None]
        known = torch.ones_like(values[None], dtype=torch.bool)
        return _Known(values[None], known, (bias @ self.weights[head.weight])[None])

    def _prediction_error(self, call: LayerCall, known: _Known) -> float:
        """Compare the gradient of a layer's bias with the sum of δ: right only if everything above was."""
        if call.bias not in self.gradients:
            return 0.0
        predicted = known.derivative.transpose(0, 1).flatten(1).sum(1)
        observed = self.gradients[call.bias]
        return float((predicted - observed).norm() / observed.norm().clamp_min(1e-300))

    def _link(self, known: _Known, call: LayerCall, above: LayerCall) -> _Known | None:
        """Carry what is known of a module's input to the output of the module before it."""
        shape = call.outputs.shape
        if above.inputs.numel() != call.outputs.numel():
            return None
        known = _Known(known.values.reshape(shape), known.where.reshape(shape), known.derivative.reshape(shape))
        seen = above.inputs.reshape(shape)
        if torch.equal(seen, call.outputs):
            return known
        return self._relu(known, call) if torch.equal(seen, call.outputs.relu()) else None

    def _relu(self, known: _Known, below: LayerCall | None) -> _Known:
        """Tell which values a ReLU let through: those that predict the next bias gradient best.

        What is not determined well may be small without being zero.
        """
        guesses = []
        for zero in _ZEROS:
            active = known.values > zero * known.values.max()
            guesses.append(_Known(known.values, known.where & active, known.derivative * active))
        errors = [0.0 if below is None else self._prediction_error(below, guess) for guess in guesses]
        return guesses[errors.index(min(errors))]

    def _pass(self, call: LayerCall, known: _Known, below: LayerCall | None) -> _Known | None:
        """Step from the output of an activation or a normalisation to its input."""
        module, values = call.module, known.values
        if isinstance(module, nn.ReLU):
            return self._relu(known, below)
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            if module.training or f"{call.name}.running_var" not in self.weights:
                return None
            shape = (1, -1, *[1] * (values.ndim - 2))
            scale = (self.weights[f"{call.name}.running_var"] + module.eps).rsqrt()
            scale = scale * self.weights.get(call.weight, torch.ones_like(scale))
            shift = self.weights.get(call.bias, 0.0) - self.weights[f"{call.name}.running_mean"] * scale
            scale, shift = scale.reshape(shape), shift.reshape(shape)
            return _Known((values - shift) / scale, known.where, known.derivative * scale)
        for kind, inverse in _INVERSES.items():
            if isinstance(module, kind):
                return inverse(module, known)
        return None

    def _solve(self, call: LayerCall, known: _Known, *, free: bool) -> _Known | None:
        """Find the input of a linear or convolutional layer by (non-negative) least squares."""
        layer = _Layer.of(call, known, self.weights, self.gradients)
        if layer is None:
            return None
        precondition, extra = _preconditioner(layer)
        each = _DOUBLE * (4 * _operations(call) + extra)
        most = int((self.budget * self.evaluation - self.spent) / each)
        if most < _STEPS:  # half a solution would cost as much and tell nothing
            return None
        values, residual, steps = _least_squares(layer, precondition, free=free, most=most)
        self.spent += each * steps
        if not residual < _FITS:
            return None
        everywhere = torch.ones_like(values, dtype=torch.bool)
        return _Known(values, everywhere, layer.input_derivative())


def _operations(call: LayerCall) -> int:
    """Return the multiplications of one forward pass of a layer."""
    weight = getattr(call.module, "weight", None)
    if not isinstance(call.module, (nn.Linear, nn.Conv2d)) or weight is None:
        return 0
    positions = call.outputs.numel() // call.outputs.shape[1] if isinstance(call.module, nn.Conv2d) else 1
    return int(weight.numel()) * positions


def _never_negative(module: nn.Module) -> bool:
    return isinstance(module, (nn.ReLU, nn.ReLU6, nn.Sigmoid))


def _leaky_relu(module: nn.Module, known: _Known) -> _Known:
    slope = torch.where(known.values >= 0, 1.0, float(module.negative_slope))  # type: ignore[arg-type]
    return _Known(known.values / slope, known.where, known.derivative * slope)


def _sigmoid(_: nn.Module, known: _Known) -> _Known:
    inside = (known.values > 0) & (known.values < 1)
    values = known.values.clamp(1e-12, 1 - 1e-12)
    return _Known(values.logit(), known.where & inside, known.derivative * values * (1 - values))


def _tanh(_: nn.Module, known: _Known) -> _Known:
    inside = known.values.abs() < 1
    values = known.values.clamp(-1 + 1e-12, 1 - 1e-12)
    return _Known(values.atanh(), known.where & inside, known.derivative * (1 - values**2))


def _unchanged(module: nn.Module, known: _Known) -> _Known | None:
    return None if isinstance(module, nn.Dropout) and module.training else known


_INVERSES: dict[type[nn.Module], Callable[[nn.Module, _Known], _Known | None]] = {
    nn.LeakyReLU: _leaky_relu,
    nn.Sigmoid: _sigmoid,
    nn.Tanh: _tanh,
    nn.Flatten: _unchanged,
    nn.Identity: _unchanged,
    nn.Dropout: _unchanged,
}


@dataclass(frozen=True, eq=False)
class _Layer:
    """The equations of a layer's input x: dL/dW = corr(x, δ), and W x + b = z where z is known."""

    call: LayerCall
    weight: Tensor
    delta: Tensor
    gradient: Tensor
    outputs: Tensor
    where: Tensor
    unit: Tensor

    @classmethod
    def of(
        cls, call: LayerCall, known: _Known, weights: dict[str, Tensor], gradients: dict[str, Tensor]
    ) -> _Layer | None:
        if call.weight not in gradients:
            return None
        module = call.module
        if isinstance(module, nn.Conv2d) and (module.padding_mode != "zeros" or isinstance(module.padding, str)):
            return None
        bias = weights.get(call.bias)
        shift = 0.0 if bias is None else bias.reshape(1, -1, *[1] * (known.values.ndim - 2))
        where = known.where.double()
        outputs = where * (known.values - shift)
        # Both kinds of equations in units of their right-hand sides.
        unit = gradients[call.weight].norm().clamp_min(1e-300)
        scale = 1 / outputs.norm().clamp_min(1e-300)
        return cls(
            call,
            weights[call.weight],
            known.derivative / unit,
            gradients[call.weight] / unit,
            outputs * scale,
            where * scale,
            unit,
        )

    def __call__(self, x: Tensor) -> tuple[Tensor, Tensor]:
        module = self.call.module
        if isinstance(module, nn.Conv2d):
            how = (module.stride, module.padding, module.dilation, module.groups)
            by_weight = conv2d_weight(x, self.weight.shape, self.delta, *how)  # type: ignore[arg-type]
            return by_weight, self.where * F.conv2d(x, self.weight, None, *how)  # type: ignore[arg-type]
        return torch.outer(self.delta[0], x[0]), self.where * F.linear(x, self.weight)

    def adjoint(self, by_weight: Tensor, outputs: Tensor) -> Tensor:
        return self._back(by_weight, self.delta) + self._back(self.weight, self.where * outputs)

    def input_derivative(self) -> Tensor:
        """Return dL/dx."""
        return self._back(self.weight, self.delta * self.unit)

    def _back(self, weight: Tensor, delta: Tensor) -> Tensor:
        module = self.call.module
        if isinstance(module, nn.Conv2d):
            how = (module.stride, module.padding, module.dilation, module.groups)
            return conv2d_input(self.call.inputs.shape, weight, delta, *how)  # type: ignore[arg-type]
        return delta @ weight


def _preconditioner(layer: _Layer) -> tuple[Callable[[Tensor], Tensor], int]:
    """Approximate the inverse of a layer's normal equations; return it, and its multiplications.

    For a convolution, the part from the weight's gradient is one matrix over the pixels, the same for each input
    channel. The part from the outputs couples channels and is replaced by the mean of its diagonal.
    """
    module, shape = layer.call.module, layer.call.inputs.shape
    pixels = shape[2:].numel()
    if not isinstance(module, nn.Conv2d) or module.groups != 1 or pixels > _MOST_PIXELS:
        return lambda x: x, 0
    kernel, filters = layer.weight.shape[2:], layer.weight.shape[0]
    taps = torch.eye(kernel.numel(), dtype=torch.double, device=layer.delta.device).reshape(-1, 1, *kernel)
    how = {"stride": module.stride, "padding": module.padding, "dilation": module.dilation}
    each = layer.delta.transpose(0, 1)  # filters as a batch of one channel
    rows = [
        conv2d_input((filters, 1, *shape[2:]), tap[None], each, **how).flatten(1)  # type: ignore[arg-type]
        for tap in taps
    ]
    by_pixel = torch.cat(rows)
    values, basis = torch.linalg.eigh(by_pixel.T @ by_pixel)
    diagonal = conv2d_input(shape, layer.weight**2, layer.where**2, **how).mean()  # type: ignore[arg-type]
    shrink = 1 / (values.clamp_min(0) + diagonal + 1e-12 * values.max())

    def apply(x: Tensor) -> Tensor:
        flat = x.reshape(-1, pixels) @ basis
        return ((flat * shrink) @ basis.T).reshape(x.shape)

    return apply, 2 * shape[1] * pixels**2


def _least_squares(
    layer: _Layer, precondition: Callable[[Tensor], Tensor], *, free: bool, most: int
) -> tuple[Tensor, float, int]:
    """Solve for x, with x >= 0 unless `free`: conjugate gradients on the positive part, which is revised in sweeps.

    Returns x, the relative residual, and the steps taken.
    """
    right = (layer.gradient, layer.outputs)
    start = layer.adjoint(*right)
    size, scale = float((start * precondition(start)).sum()), _norm(right)
    x, positive, steps = torch.zeros_like(start), torch.ones_like(start, dtype=torch.bool), 0
    for _ in range(1 if free else _SWEEPS):
        x = x * positive
        rest = _minus(right, layer(x))
        descent = positive * layer.adjoint(*rest)
        direction = positive * precondition(descent)
        norm = float((descent * direction).sum())
        for _ in range(min(_STEPS, most - steps)):
            if norm <= _CONVERGED * size or _norm(rest) < _ROUNDED * scale:
                break
            image = layer(direction)
            length = norm / sum(float((part**2).sum()) for part in image)
            x = x + length * direction
            rest = _minus(rest, tuple(length * part for part in image))
            descent = positive * layer.adjoint(*rest)
            towards = positive * precondition(descent)
            before, norm = norm, float((descent * towards).sum())
            direction = towards + (norm / before) * direction
            steps += 1
        pull = layer.adjoint(*_minus(right, layer(x)))
        negative = positive & (x < 0)
        wanted = ~positive & (pull > 1e-3 * pull.abs().max())
        settled = float(x.clamp_max(0).norm()) < _ZERO * float(x.norm()) and not bool(wanted.any())
        if free or settled or steps >= most:
            break
        positive = (positive & ~negative) | wanted
    x = x if free else x.clamp_min(0)
    return x, _norm(_minus(right, layer(x))) / scale, steps


def _norm(parts: tuple[Tensor, ...]) -> float:
    return sum(float((part**2).sum()) for part in parts) ** 0.5


def _minus(left: tuple[Tensor, ...], right: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return tuple(a - b for a, b in zip(left, right, strict=True))


@dataclass(frozen=True, kw_only=True)
class LayerPeeling(IterativeAttack):
    """Recover the inputs of the upper layers exactly (`peel`), then match the rest of the network to them.

    For one image and a chain of layers: fully connected, convolutional, ReLU, leaky ReLU, sigmoid, tanh, BatchNorm in
    eval mode, flattening. Where the equations reach the image, matching only polishes it; where they end before,
    what they gave is a target inside the network, close to the image and without the non-convexity of what lies above.
    Layers of high resolution behind a stride leave more unknowns than equations and are where it usually ends.

    Args:
        matching: How the image is found once the features are known.
        polish: What refines an image that the equations reached.
        share: Largest part of the first budget spent on the equations; their arithmetic is counted in evaluations.
        weight: Of the distance to the features, which is relative to how much they vary from place to place.
    """

    matching: GradientMatching = GradientMatching(
        objective=MovedError(),
        parametrization=Whitened(weight=1e-6),
        optimizer=Adam(lr=0.1, schedule=CosineDecay()),
    )
    polish: LevenbergMarquardt = LevenbergMarquardt()
    share: float = 0.5
    weight: float = 1.0

    def __post_init__(self) -> None:
        if not 0 < self.share < 1 or not self.weight > 0:
            raise InvalidInputError(f"LayerPeeling needs share in (0, 1) and weight > 0, got {self!r}.")

    def start(self, observation: Observation, generator: torch.Generator) -> Run | Reconstruction:
        if reason := _unsuitable(observation):
            return Reconstruction.not_applicable(observation, reason)
        # The chain and what is cheap of it, to know whether there is anything to gain.
        tried = peel(observation, budget=0.0, generator=generator)
        if not tried.features:
            return Reconstruction.not_applicable(observation, tried.reason)
        return _PeelingRun(self, observation, generator)


class _PeelingRun:
    """The equations in the first cycle, matching in all."""

    def __init__(self, attack: LayerPeeling, observation: Observation, generator: torch.Generator) -> None:
        self.attack, self.observation, self.generator = attack, observation, generator
        self.peeled: Peeled | None = None
        self.matching: Run | Reconstruction | None = None
        self.cost = 0

    @property
    def evaluations(self) -> int:
        matching = 0 if self.matching is None else self.matching.evaluations
        return self.cost + matching

    @property
    def finished(self) -> bool:
        return isinstance(self.matching, Reconstruction) or (self.matching is not None and self.matching.finished)

    def advance(self, budget: Budget) -> None:
        meter = Meter(budget)
        if self.peeled is None:
            most = _UNLIMITED if budget.evaluations is None else self.attack.share * budget.evaluations
            self.peeled = peel(self.observation, budget=most, generator=self.generator)
            self.cost = min(math.ceil(self.peeled.cost), math.floor(most))
            meter.spend(self.cost)
            self.matching = self._matching(self.peeled)
        if not self.finished and not meter.exhausted:
            assert self.matching is not None
            assert not isinstance(self.matching, Reconstruction)
            self.matching.advance(part_of(meter, 1.0))

    def _matching(self, peeled: Peeled) -> Run | Reconstruction:
        matching = replace(self.attack.matching, label=self.attack.name)
        if peeled.image is not None:
            low, high = self.observation.box
            return self.attack.polish.start(self.observation, self.generator, at=peeled.image.clamp(low, high))
        if len(peeled.features) < 2:  # the head's input alone is as good as its gradient
            return Reconstruction.not_applicable(self.observation, peeled.reason)
        deepest = dict([list(peeled.features.items())[-1]])
        features = KnownFeatures(features=deepest, weight=self.attack.weight)
        return replace(matching, regularizers=(*matching.regularizers, features)).start(
            self.observation, self.generator
        )

    def result(self) -> Reconstruction:
        assert self.matching is not None
        assert self.peeled is not None
        result = self.matching if isinstance(self.matching, Reconstruction) else self.matching.result()
        reason = f"{len(self.peeled.features)} layer(s) peeled, {self.peeled.reason}"
        return replace(result, attack=self.attack.name, evaluations=self.evaluations, reason=reason)

"""Peel a chain of layers from the head down: each layer's input follows linearly from what is known above it.

For one image the gradient of a biased head gives the head's input exactly, and with it the derivative of the loss with
respect to that input. One layer further down both are known again: the derivative δ with respect to the layer's output
passes back through activations and normalisations whose outputs are known, and the gradient of the layer's weight is
*linear* in its input for given δ, as is the layer's output where the activation after it passes it on. These are
thousands of equations, at any stage of training. Where they are well conditioned and more than the unknowns, a sequence
of linear least-squares problems replaces a non-convex match of the whole network. R-GAP (Zhu and Blaschko,
arXiv:2010.07733) recurses in this way from the loss. Here the recursion starts at the head, activations may hide values
(ReLU), inputs behind a ReLU are constrained to be non-negative, and a solution is accepted only if two starts agree on
it and it predicts the gradients of the biases below.
"""

from __future__ import annotations

import math
import time
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from lightning_gradaudit.attacks.closed_form.row_space import RANK_ONE_MISFIT, divide_by_bias
from lightning_gradaudit.attacks.labels.head import placeholder_labels
from lightning_gradaudit.attacks.labels.recovery import noise_images
from lightning_gradaudit.attacks.recursive.layer_equations import SETTINGS as EQUATIONS
from lightning_gradaudit.attacks.recursive.layer_equations import (
    Known,
    Layer,
    Preconditioner,
    fully_connected,
    invert,
    keeps_values,
    least_squares,
    never_negative,
    operations,
    prediction_error,
    undo_batchnorm,
    used_once,
)
from lightning_gradaudit.simulation.layer_trace import LayerCall
from lightning_gradaudit.simulation.observation import Observation
from lightning_gradaudit.utils.time_limit import time_left


@dataclass(frozen=True)
class PeelingSettings:
    """Settings of `peel`."""

    most_residual: float = 1e-2  # relative, of a layer's equations, above which their solution is dropped
    most_start_distance: float = 0.05  # relative, of the solutions from two starts, above which they are dropped
    exact_start_distance: float = 1e-3  # the same, up to which the next layer can be solved with them
    most_prediction_error: float = 0.15  # relative, of predicted gradients, above which a solution is dropped
    exact_prediction_error: float = 1e-4  # the same, up to which the next layer can be solved with it
    zero_shares: tuple[float, ...] = (1e-4, 1e-5, 1e-6, 1e-3, 1e-2)
    """Of the largest activation: values that may count as switched off, the likeliest limit first."""
    negative_share: float = 1e-3  # of the largest activation: more than that below zero, no ReLU returned the values
    second_start_factor: float = 2.0  # times the residual from the first start, at which the second start ends


SETTINGS = PeelingSettings()


@dataclass(frozen=True, eq=False)
class Peeled:
    """What was recovered.

    Attributes:
        features: Inputs of modules by name, (1, ...), as far down as the equations determine them.
        image: (1, C, H, W) when the recursion reached the image, else None.
        cost: Arithmetic spent, in gradient evaluations.
        reason: Where it ended, and why.
        unfinished: Whether more budget would go further.
    """

    features: dict[str, Tensor] = field(repr=False)
    image: Tensor | None = field(default=None, repr=False)
    cost: float = 0.0
    reason: str = ""
    unfinished: bool = False


class _EndedError(Exception):
    """The recursion ends, for this reason."""

    def __init__(self, reason: str, *, unfinished: bool = False) -> None:
        super().__init__(reason)
        self.unfinished = unfinished


def peel(observation: Observation, *, budget: float, generator: torch.Generator, seconds: float = math.inf) -> Peeled:
    """Recover the inputs of the layers of a chain, one image.

    Args:
        observation: One image through a chain of modules: each takes what the one before gave, reshaped at most
            or through a functional ReLU. Branches, pooling and train-mode BatchNorm end the recursion where they stand,
            as does a layer whose equations leave its input open.
        budget: Largest arithmetic, in gradient evaluations; 0 for what costs next to nothing (fully connected layers).
        generator: Draws the image that the chain is read off, and the starts of the least-squares problems.
        seconds: Largest time.
    """
    if reason := _unsuitable(observation):
        return Peeled({}, reason=reason)
    deadline = time.monotonic() + min(seconds, time_left())
    with torch.no_grad():
        image = noise_images(observation, generator)
        calls = observation.trace(image, placeholder_labels(observation), kinds=None)
        return _Recursion(observation, image, calls, budget, deadline, generator).run()


def _unsuitable(observation: Observation) -> str:
    protocol = observation.protocol
    if observation.batch_size != 1 or protocol.optimizer is not None:
        return "only the gradient of a single image can be peeled"
    changed = protocol.clip is not None or protocol.private is not None
    if changed or observation.threat_model.defences or observation.noise_std:
        return "the gradient was changed on its way"
    if observation.device.type == "mps":
        return "the equations need double precision"
    return ""


class _Recursion:
    """The recursion from the head down: what is known so far, and what it cost."""

    def __init__(
        self,
        observation: Observation,
        image: Tensor,
        calls: list[LayerCall],
        budget: float,
        deadline: float,
        generator: torch.Generator,
    ) -> None:
        self.observation, self.image, self.generator = observation, image, generator
        self.budget, self.deadline = budget, deadline
        # What runs after the head, a loss or a metric, enters only by its derivative, which the gradient contains.
        heads = [position for position, call in enumerate(calls) if isinstance(call.module, nn.Linear)]
        self.calls = calls[: heads[-1] + 1] if heads else []
        self.once = used_once(observation, calls)
        self.gradients, self.weights = observation.gradients, {**observation.parameters, **observation.buffers}
        self.evaluation = max(1, 7 * sum(operations(call) for call in calls))
        self.spent = 0.0
        self.features: dict[str, Tensor] = {}

    def run(self) -> Peeled:
        image, unfinished = None, False
        try:
            image, reason = self._descend(), "reached the image"
        except _EndedError as ended:
            reason, unfinished = str(ended), ended.unfinished
        dtype = self.observation.input_dtype
        return Peeled(
            {name: values.to(dtype) for name, values in self.features.items()},
            None if image is None else image.to(dtype),
            self.spent / self.evaluation,
            reason,
            unfinished,
        )

    def _descend(self) -> Tensor:
        if not self.calls or (known := self._solve_head(self.calls[-1])) is None:
            raise _EndedError("the last layer is not a linear head whose gradient gives its input away")
        solved, exact = self.calls[-1], True
        for position in range(len(self.calls) - 2, -1, -1):
            call = self.calls[position]
            known = self._carry_down(known, call, self.calls[position + 1])
            error = self._prediction_error(call, known)
            if error > SETTINGS.most_prediction_error:
                self.features.pop(solved.name, None)
                raise _EndedError(f"the input of {solved.name!r} is not determined")
            exact = exact and error < SETTINGS.exact_prediction_error
            if not isinstance(call.module, (nn.Linear, nn.Conv2d)):
                known = self._invert_activation(call, known, self.calls[position - 1] if position else None)
                continue
            if not exact:
                raise _EndedError(f"the input of {solved.name!r} is only approximate")
            known, exact = self._solve(call, known, free=not self._has_nonnegative_input(position))
            solved = call
        if not torch.equal(self.calls[0].inputs.flatten(), self.image.to(self.calls[0].inputs.dtype).flatten()):
            raise _EndedError("the first layer is not fed by the image")
        return known.values.reshape(self.observation.shape)

    def _solve_head(self, head: LayerCall) -> Known | None:
        single = head.inputs.ndim == 2 and len(head.inputs) == 1 and head.name in self.once
        if not single or head.weight not in self.gradients or head.bias not in self.gradients:
            return None
        weight, bias = self.gradients[head.weight].double(), self.gradients[head.bias].double()
        values = divide_by_bias(weight, bias)
        if not bool((weight - torch.outer(bias, values)).norm() < RANK_ONE_MISFIT * weight.norm()):
            return None
        self.features[head.name] = values[None]
        known = torch.ones_like(values[None], dtype=torch.bool)
        return Known(values[None], known, (bias @ self.weights[head.weight].double())[None])

    def _prediction_error(self, call: LayerCall, known: Known) -> float:
        comparable = call.name in self.once
        return prediction_error(call, known, self.weights, self.gradients) if comparable else 0.0

    def _carry_down(self, known: Known, call: LayerCall, above: LayerCall) -> Known:
        """Carry what is known of a module's input to the output of the module before it."""
        if above.inputs.numel() == call.outputs.numel():
            seen, known = above.inputs.to(call.outputs).reshape(call.outputs.shape), known.reshaped(call.outputs.shape)
            same, rectified = torch.equal(seen, call.outputs), torch.equal(seen, call.outputs.relu())
            # Outputs that were all positive on the trial image do not show whether a ReLU follows.
            negative = bool(known.values.min() < -SETTINGS.negative_share * known.values.abs().max())
            if same and (negative or not rectified or keeps_values(call.module) or never_negative(call.module)):
                return known
            if rectified:
                return self._invert_relu(known, call)
        raise _EndedError(f"{above.name!r} is not fed by {call.name!r} alone")

    def _has_nonnegative_input(self, position: int) -> bool:
        """Tell whether a layer's input is never negative: a ReLU or a sigmoid made it, as a module or a function."""
        if not position or bool(self.calls[position].inputs.min() < 0):
            return False
        below = self.calls[position - 1]
        if keeps_values(below.module):
            return self._has_nonnegative_input(position - 1)
        return never_negative(below.module) or bool(below.outputs.min() < 0)

    def _invert_relu(self, known: Known, below: LayerCall | None) -> Known:
        """Decide which values a ReLU passed on: those that predict the next gradients best.

        A value that is badly determined may be small without being zero.
        """
        guesses = []
        for zero in SETTINGS.zero_shares:
            active = known.values > zero * known.values.max()
            guesses.append(Known(known.values, known.where & active, known.derivative * active))
        errors = [0.0 if below is None else self._prediction_error(below, guess) for guess in guesses]
        return guesses[errors.index(min(errors))]

    def _invert_activation(self, call: LayerCall, known: Known, below: LayerCall | None) -> Known:
        """Step from the output of an activation or a normalisation to its input."""
        module = call.module
        if isinstance(module, nn.ReLU):
            return self._invert_relu(known, below)
        batchnorm = isinstance(module, nn.modules.batchnorm._BatchNorm)
        passed = undo_batchnorm(call, known, self.weights) if batchnorm else invert(module, known)
        if passed is None:
            raise _EndedError(f"{call.name!r} ({type(module).__name__}) cannot be inverted")
        return passed

    def _solve(self, call: LayerCall, known: Known, *, free: bool) -> tuple[Known, bool]:
        """Find the input of a fully connected or convolutional layer; tell whether the next can be solved with it."""
        layer = Layer.of(call, known, self.weights, self.gradients) if call.name in self.once else None
        if layer is None:
            raise _EndedError(f"the equations of {call.name!r} are not known")
        if isinstance(call.module, nn.Linear):
            values, doubt = fully_connected(layer, free=free), 0.0
            self.spent += EQUATIONS.double_precision_cost * 2 * operations(call)
        else:
            values, doubt = self._solve_from_two_starts(layer, free=free)
        if not layer.misfit(values) < SETTINGS.most_residual or not doubt < SETTINGS.most_start_distance:
            raise _EndedError(f"the input of {call.name!r} is not determined")
        self.features[call.name] = values
        known = Known(values, torch.ones_like(values, dtype=torch.bool), layer.input_derivative())
        return known, doubt < SETTINGS.exact_start_distance

    def _solve_from_two_starts(self, layer: Layer, *, free: bool) -> tuple[Tensor, float]:
        """Solve by least squares from zero and from a random start; return x, and how far the two lie apart.

        Underdetermined equations can be solved as exactly as others, and the layers below may not show it.
        """
        call, undetermined = layer.call, f"the input of {layer.call.name!r} is not determined"
        if free and layer.equations < call.inputs.numel():
            raise _EndedError(undetermined)
        building, applying = (EQUATIONS.double_precision_cost * cost for cost in Preconditioner.cost(layer))
        each = EQUATIONS.double_precision_cost * 4 * operations(call) + applying
        limit = self.budget * self.evaluation
        # Half a solution would cost as much and be useless.
        if limit - self.spent - building < EQUATIONS.steps_per_sweep * each:
            raise _EndedError(f"the budget ends before the input of {call.name!r}", unfinished=True)
        precondition = Preconditioner.of(layer)
        self.spent += building
        found: list[Tensor] = []
        enough, size = EQUATIONS.rounding_residual, 1.0
        for start in (torch.zeros(call.inputs.shape), torch.rand(call.inputs.shape, generator=self.generator)):
            most = int((limit - self.spent) / each / (2 - len(found)))
            begin = size * start.to(layer.delta)
            x, steps = least_squares(
                layer, precondition, start=begin, free=free, most=most, deadline=self.deadline, enough=enough
            )
            self.spent += each * steps
            misfit = layer.misfit(x)
            if not misfit < SETTINGS.most_residual or int((x != 0).sum()) > layer.equations:
                unfinished = steps > most - EQUATIONS.overhead_steps or time.monotonic() > self.deadline
                raise _EndedError(undetermined, unfinished=unfinished)
            found.append(x)
            enough = max(EQUATIONS.rounding_residual, SETTINGS.second_start_factor * misfit)
            size = 2 * float(x.square().mean().sqrt())
        return found[0], float((found[0] - found[1]).norm() / found[0].norm().clamp_min(1e-300))

"""One evaluation of a matching problem: the loss of a candidate, and its derivative.

The derivative takes the vector-Jacobian form: the objective gives its value and its derivative v with respect to the
simulated gradient g', then one product vᵀ ∂g'/∂x carries it to the images. No graph of the objective is recorded. The
product is exact, by differentiating twice. A compiled graph may use a difference of first derivatives instead (see
`finite_differences`). In eager mode the difference would cost more than it saves.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from lightning_gradaudit.attacks.base import check_second_derivatives, input_gradient
from lightning_gradaudit.attacks.compilation.evaluation_graph import CompiledEvaluation, current_compilation
from lightning_gradaudit.attacks.matching.finite_differences import Kinks, move_weights, step_length
from lightning_gradaudit.attacks.matching.objectives import Objective
from lightning_gradaudit.attacks.matching.regularizers import ActivationRegularizer, Penalty, Regularizer
from lightning_gradaudit.simulation.layer_trace import record_inputs
from lightning_gradaudit.simulation.observation import Observation
from lightning_gradaudit.utils.tensors import Tensors

_PICKLED = "_image_penalties", "_activation_penalties", "_step_length"  # private attributes that a copy gets
_LARGEST_DIFFERENCE_ERROR = 0.02  # relative error of a derivative by difference; about 2e-3 is usual


class SoftLabelsRefusedError(Exception):
    """The loss needs class indices."""


@dataclass(frozen=True)
class LossAndGradient:
    """A candidate's loss and its derivatives, without a graph.

    Attributes:
        loss: Objective plus penalties, a scalar.
        inputs_gradient: (B, C, H, W).
        labels_gradient: (B, classes) where soft labels are optimised, else None.
    """

    loss: Tensor
    inputs_gradient: Tensor
    labels_gradient: Tensor | None


class MatchingProblem:
    """Evaluate candidates against one observation.

    Args:
        observation: What is matched; its labels serve regularizers that need them.
        objective: Distance between gradients.
        regularizers: Penalties on the images or on what they activate.
        exact: Always differentiate twice. False: compiled evaluations use a difference where what is shared is the
            gradient of one loss, if the first difference agrees with the exact derivative.
    """

    def __init__(
        self,
        observation: Observation,
        objective: Objective,
        regularizers: tuple[Penalty, ...] = (),
        *,
        exact: bool = True,
    ) -> None:
        self.observation = observation
        self.objective = objective.of(observation.gradients)
        self.exact = exact
        self._image_penalties = [r for r in regularizers if isinstance(r, Regularizer)]
        self._activation_penalties = [
            (r, r.targets(observation)) for r in regularizers if isinstance(r, ActivationRegularizer)
        ]
        # Computed once: it is a pass over all weights. In a compiled graph it is an argument.
        self._step_length = step_length({n: observation.parameters[n] for n in observation.gradients})
        self._prepare()

    def _prepare(self) -> None:
        protocol = self.observation.protocol
        passes = sum(len(each.indices) if protocol.private else 1 for each in protocol.micro_batches)
        refused = "" if passes == 1 else f"{passes} forward passes make too large a graph"
        self._leaves = self.observation.leaves()
        self._has_second_derivatives = False  # not checked yet
        allowed = not self.exact and protocol.is_one_gradient and not refused
        self._uses_difference = None if allowed else False  # None: not compared yet
        self._evaluations = {}
        for soft in (False, True):
            exact, difference = partial(self.differentiate_twice, soft=soft), partial(self.take_difference, soft=soft)
            self._evaluations[soft, False] = CompiledEvaluation(exact, refused)
            self._evaluations[soft, True] = CompiledEvaluation(exact, refused, twin=difference)

    def __getstate__(self) -> dict[str, Any]:
        return {k: v for k, v in self.__dict__.items() if not k.startswith("_") or k in _PICKLED}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._prepare()

    def __call__(self, inputs: Tensor, labels: Tensor, *, soft: bool = False) -> LossAndGradient:
        """Evaluate images (B, C, H, W) with labels (B, ...).

        Args:
            soft: Whether the labels are probabilities (B, classes) to be optimised too.

        Raises:
            DoubleBackwardError: When the model has an operation without a second derivative.
            SoftLabelsRefusedError: When the loss does not accept soft labels.
        """
        if self._uses_difference is None and current_compilation() is not None:
            self._uses_difference = self._is_difference_exact(inputs, labels, soft)
        loss, images, *others = self._evaluations[soft, bool(self._uses_difference)](inputs, labels)
        return LossAndGradient(loss, images, others[0] if others else None)

    def _is_difference_exact(self, inputs: Tensor, labels: Tensor, soft: bool) -> bool:
        """Tell whether the difference gives the exact derivative: an operation may have kinks that are not known."""
        expected = self.differentiate_twice(inputs, labels, soft=soft)
        try:
            found = self.take_difference(inputs, labels, soft=soft)
        except Exception:  # the second pass ran other operations, or one that is no function of plain tensors
            return False
        pairs = zip(found, expected, strict=True)
        return all(float((a - b).norm()) <= _LARGEST_DIFFERENCE_ERROR * float(b.norm()) for a, b in pairs)

    def differentiate_twice(self, inputs: Tensor, labels: Tensor, *, soft: bool = False) -> tuple[Tensor, ...]:
        """Return the loss and its derivatives, by differentiating the simulated gradient."""
        variables = inputs, labels = _variables(inputs, labels, soft)
        with self._activations() as seen:
            simulated = self.simulate(inputs, labels)
        loss, direction = self.objective.value_and_gradient(simulated, self.observation.gradients)
        penalties = self._penalties(inputs, seen)
        gradients = input_gradient(
            [*simulated.values(), *penalties],
            variables[: 1 + soft],
            [*(direction[name] for name in simulated), *(torch.ones_like(p) for p in penalties)],
        )
        return loss + sum(p.detach() for p in penalties), *(g.detach() for g in gradients)

    def take_difference(self, inputs: Tensor, labels: Tensor, *, soft: bool = False) -> tuple[Tensor, ...]:
        """Return the same as `differentiate_twice`, by first derivatives at two points of the weights."""
        variables = inputs, labels = _variables(inputs, labels, soft)
        wanted, kinks = variables[: 1 + soft], Kinks()
        names = list(self.observation.gradients)
        with kinks:
            here = self.observation.loss(inputs, labels, self._leaves)
            weights = [self._leaves[name] for name in names]
            found = torch.autograd.grad(here, [*wanted, *weights], allow_unused=True, materialize_grads=True)
        simulated = dict(zip(names, found[len(wanted) :], strict=True))
        loss, direction = self.objective.value_and_gradient(simulated, self.observation.gradients)
        beside, step = move_weights(self._leaves, direction, self._step_length)
        with self._activations() as seen, kinks.repeated():
            there = self.observation.loss(inputs, labels, beside)
            penalties = self._penalties(inputs, seen)
            further = input_gradient(
                [there, *penalties], wanted, [there.new_ones(()) / step, *(torch.ones_like(p) for p in penalties)]
            )
        gradients = (b - a / step for a, b in zip(found, further, strict=False))
        return loss + sum(p.detach() for p in penalties), *gradients

    def _activations(self) -> AbstractContextManager[dict[str, list[Tensor]]]:
        return activations(self.observation, {n for _, targets in self._activation_penalties for n in targets})

    def _penalties(self, inputs: Tensor, seen: dict[str, list[Tensor]]) -> list[Tensor]:
        return [r(inputs) for r in self._image_penalties] + [
            r(seen, targets) for r, targets in self._activation_penalties
        ]

    def calibrate(self, references: Sequence[Tensors]) -> None:
        """Show the objective gradients of noise images."""
        self.objective = self.objective.calibrated(references, self.observation.gradients).of(
            self.observation.gradients
        )
        self._prepare()

    def simulate(self, inputs: Tensor, labels: Tensor) -> dict[str, Tensor]:
        """Return the simulated gradient, with its graph if the images require one.

        The first gradient with a graph is checked for second derivatives.
        """
        if self._has_second_derivatives or not inputs.requires_grad:
            return self.observation.simulate(inputs, labels, self._leaves)
        try:
            simulated = self.observation.simulate(inputs, labels, self._leaves)
        except Exception as error:
            if labels.requires_grad:  # any error of a loss that gets probabilities in place of classes
                raise SoftLabelsRefusedError(error) from error
            raise
        check_second_derivatives(simulated)
        self._has_second_derivatives = True
        return simulated


def _variables(inputs: Tensor, labels: Tensor, soft: bool) -> tuple[Tensor, Tensor]:
    return inputs.detach().requires_grad_(), labels.detach().requires_grad_(soft)


@contextmanager
def activations(observation: Observation, names: Iterable[str]) -> Iterator[dict[str, list[Tensor]]]:
    """Collect what goes into the named modules during simulated forward passes, call by call, with its graph."""
    wanted = set(names)
    if not wanted:
        yield {}
        return
    # The hooks are on the shared replica.
    with observation.client.lock, record_inputs(observation.client.module, wanted) as seen:
        yield seen

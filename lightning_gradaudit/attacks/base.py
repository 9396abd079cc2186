"""The interface of an attack, validated in one place."""

from __future__ import annotations

import math
import re
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, final

import torch
from torch import Tensor

from lightning_gradaudit.attacks.budget import Budget
from lightning_gradaudit.attacks.reconstruction import Outcome, Reconstruction
from lightning_gradaudit.errors import DoubleBackwardError, InvalidInputError
from lightning_gradaudit.simulation.observation import Observation
from lightning_gradaudit.utils.tensors import Tensors

_NO_SECOND_DERIVATIVE = r"derivative for (\S+) is not implemented|double backwards? on (\S+) not supported"


class Attack(ABC):
    """Reconstruct a batch from an observation, within a budget.

    An author writes one method, `run`, and makes the class a frozen keyword-only dataclass so that its settings
    are visible in its repr. Randomness comes from the generator alone: the same generator state gives the same
    reconstruction on the same machine.
    """

    @final
    def __call__(self, observation: Observation, *, budget: Budget, generator: torch.Generator) -> Reconstruction:
        """Run the attack.

        Args:
            observation: All that the adversary knows.
            budget: Largest effort.
            generator: Source of all randomness, on the CPU.

        Raises:
            InvalidInputError: When an argument is of the wrong type (a Snapshot holds the truth, for one).
            DoubleBackwardError: When the model has an operation without a second derivative.
        """
        if not isinstance(observation, Observation):
            raise InvalidInputError(
                f"observation: expected an Observation, got {type(observation).__name__}. "
                "From a Snapshot, pass snapshot.observation: an attack must not hold the truth."
            )
        if not isinstance(budget, Budget):
            raise InvalidInputError(f"budget: expected Budget(evaluations=...), got {budget!r}.")
        if not isinstance(generator, torch.Generator) or generator.device.type != "cpu":
            raise InvalidInputError(f"generator: expected a torch.Generator on the CPU, got {generator!r}.")
        result = self.run(observation, budget=budget, generator=generator)
        if tuple(result.inputs.shape) != observation.shape:
            raise InvalidInputError(
                f"{type(self).__name__}.run: expected inputs of shape {observation.shape}, "
                f"got {tuple(result.inputs.shape)}."
            )
        if not bool(torch.isfinite(result.inputs).all()):
            result = replace(result, outcome=Outcome.NONFINITE, matching_loss=math.inf, certified=None)
        elif math.isnan(result.matching_loss):
            result = replace(result, matching_loss=math.inf)
        inputs = result.inputs.detach()
        inputs = inputs.to(torch.promote_types(inputs.dtype, observation.input_dtype))  # of the model's inputs
        return replace(result, attack=result.attack or self.name, inputs=inputs)

    @property
    def name(self) -> str:
        """Short name for tables and records."""
        return type(self).__name__

    @abstractmethod
    def run(self, observation: Observation, *, budget: Budget, generator: torch.Generator) -> Reconstruction:
        """Reconstruct the batch; called with validated arguments."""


def input_gradient(
    outputs: Sequence[Tensor], inputs: Sequence[Tensor], weights: Sequence[Tensor], *, keep: bool = False
) -> list[Tensor]:
    """Return the vector-Jacobian product Σ_i weights_iᵀ ∂outputs_i/∂inputs; zero where nothing depends on an input.

    Args:
        keep: Keep the graph for further products.

    Raises:
        DoubleBackwardError: Naming the operation that has no second derivative.
    """
    pairs = [(output, weight) for output, weight in zip(outputs, weights, strict=True) if output.requires_grad]
    if not pairs:
        return [torch.zeros_like(each) for each in inputs]
    try:
        gradients = torch.autograd.grad(
            [output for output, _ in pairs],
            inputs,
            [weight for _, weight in pairs],
            retain_graph=keep,
            allow_unused=True,
            materialize_grads=True,
        )
    except RuntimeError as error:
        found = re.search(_NO_SECOND_DERIVATIVE, str(error))
        if not found:
            raise
        raise DoubleBackwardError(_explain_no_second_derivative(found.group(1) or found.group(2))) from error
    return list(gradients)


def check_second_derivatives(gradients: Tensors) -> None:
    """Refuse simulated gradients that depend on the images through a function without a second derivative.

    Autograd prunes such a node instead of failing. The attack would then follow an incomplete derivative and find
    nothing, which would look like safety.

    Raises:
        DoubleBackwardError: Naming the function.
    """
    seen: set[Any] = set()
    queue = [g.grad_fn for g in gradients.values() if g.grad_fn is not None]
    while queue:
        node = queue.pop()
        if node in seen:
            continue
        seen.add(node)
        if "Error" in node.name():
            raise DoubleBackwardError(_explain_no_second_derivative("an autograd.Function marked once_differentiable"))
        queue += [following for following, _ in node.next_functions if following is not None]


def _explain_no_second_derivative(operation: str) -> str:
    return (
        f"The model uses {operation}, which has no second derivative, so no gradient-matching attack can run. "
        "Replace it while auditing by a composition of differentiable operations, or audit with "
        "attack=LinearLayerInversion(): closed forms need no second derivative."
    )

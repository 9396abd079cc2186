"""The interface of an attack, validated in one place."""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from dataclasses import replace
from typing import final

import torch
from torch import Tensor

from lightning_gradaudit.budget import Budget
from lightning_gradaudit.errors import DoubleBackwardError, InvalidInputError
from lightning_gradaudit.observation import Observation
from lightning_gradaudit.reconstruction import Reconstruction


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
            observation: All the attack may see.
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
        return replace(result, attack=result.attack or self.name, inputs=result.inputs.detach())

    @property
    def name(self) -> str:
        """Short name for tables and records."""
        return type(self).__name__

    @abstractmethod
    def run(self, observation: Observation, *, budget: Budget, generator: torch.Generator) -> Reconstruction:
        """Reconstruct the batch; called with validated arguments."""


def input_gradient(loss: Tensor, inputs: list[Tensor]) -> tuple[Tensor, ...]:
    """Differentiate a matching loss with respect to the candidates.

    Raises:
        DoubleBackwardError: Naming the operation that has no second derivative.
    """
    try:
        return torch.autograd.grad(loss, inputs)
    except (RuntimeError, NotImplementedError) as error:
        text = str(error)
        operation = re.search(r"derivative for (\S+) is not implemented", text)
        once = "once_differentiable" in text
        if not operation and not once:
            raise
        name = operation.group(1) if operation else "an autograd.Function marked once_differentiable"
        raise DoubleBackwardError(
            f"The model uses {name}, which has no second derivative, so no gradient-matching attack can run. "
            "Replace it while auditing (for fused attention: torch.nn.attention.sdpa_kernel(SDPBackend.MATH) in the "
            "forward pass; for grid_sample or a custom Function: a composition of differentiable operations). "
            "Closed-form attacks still apply."
        ) from error

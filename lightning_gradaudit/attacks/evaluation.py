"""One evaluation of a matching problem: the loss of a candidate, and its derivative.

The derivative takes the vector-Jacobian form: the objective gives its value and its derivative v with respect to the
simulated gradient g', then one product vᵀ ∂g'/∂x carries it to the images. No graph of the objective is recorded.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from lightning_gradaudit.attacks.base import check_second_derivatives, input_gradient
from lightning_gradaudit.attacks.compilation import WholeStep
from lightning_gradaudit.attacks.objectives import Objective
from lightning_gradaudit.attacks.regularizers import ActivationRegularizer, Penalty, Regularizer
from lightning_gradaudit.defences import Tensors
from lightning_gradaudit.observation import Observation


class SoftLabelsRefusedError(Exception):
    """The loss needs class indices."""


@dataclass(frozen=True)
class Evaluated:
    """A candidate's loss and its derivatives, without a graph.

    Attributes:
        loss: Objective plus penalties, a scalar.
        inputs_gradient: (B, C, H, W).
        labels_gradient: (B, classes) where soft labels are optimised, else None.
    """

    loss: Tensor
    inputs_gradient: Tensor
    labels_gradient: Tensor | None


class Evaluation:
    """Evaluate candidates against one observation.

    Args:
        observation: What is matched; its labels serve regularizers that need them.
        objective: Distance between gradients.
        regularizers: Penalties on the images or on what they activate.
    """

    def __init__(self, observation: Observation, objective: Objective, regularizers: tuple[Penalty, ...] = ()) -> None:
        self.observation = observation
        self.objective = objective
        self._on_images = [r for r in regularizers if isinstance(r, Regularizer)]
        self._on_activations = [
            (r, r.targets(observation)) for r in regularizers if isinstance(r, ActivationRegularizer)
        ]
        self._prepare()

    def _prepare(self) -> None:
        protocol = self.observation.protocol
        passes = sum(len(each.indices) if protocol.private else 1 for each in protocol.micro_batches)
        refused = "" if passes == 1 else f"{passes} forward passes make too large a graph"
        self._leaves = self.observation.leaves()
        self._checked = False
        self._whole = {soft: WholeStep(partial(self._evaluated, soft=soft), refused) for soft in (False, True)}

    def __getstate__(self) -> dict[str, Any]:
        return {k: v for k, v in self.__dict__.items() if k not in ("_leaves", "_checked", "_whole")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._prepare()

    def __call__(self, inputs: Tensor, labels: Tensor, *, soft: bool = False) -> Evaluated:
        """Evaluate images (B, C, H, W) with labels (B, ...).

        Args:
            soft: Whether the labels are probabilities (B, classes) to be optimised too.

        Raises:
            DoubleBackwardError: When the model has an operation without a second derivative.
            SoftLabelsRefusedError: When the loss does not accept soft labels.
        """
        loss, inputs_gradient, *others = self._whole[soft](inputs, labels)
        return Evaluated(loss, inputs_gradient, others[0] if others else None)

    def _evaluated(self, inputs: Tensor, labels: Tensor, *, soft: bool) -> tuple[Tensor, ...]:
        inputs = inputs.detach().requires_grad_()
        labels = labels.detach().requires_grad_(soft)
        with activations(self.observation, {n for _, targets in self._on_activations for n in targets}) as seen:
            simulated = self.simulate(inputs, labels)
        loss, direction = self.objective.value_and_gradient(simulated, self.observation.gradients)
        penalties = [r(inputs) for r in self._on_images] + [r(seen, targets) for r, targets in self._on_activations]
        gradients = input_gradient(
            [*simulated.values(), *penalties],
            [inputs, labels] if soft else [inputs],
            [*(direction[name] for name in simulated), *(torch.ones_like(p) for p in penalties)],
        )
        return loss + sum(p.detach() for p in penalties), *(g.detach() for g in gradients)

    def calibrate(self, references: Sequence[Tensors]) -> None:
        """Show the objective gradients of noise images."""
        self.objective = self.objective.calibrated(references, self.observation.gradients)
        self._prepare()

    def simulate(self, inputs: Tensor, labels: Tensor) -> dict[str, Tensor]:
        """Return the simulated gradient, with its graph if the images require it.

        The first one that has a graph is checked for second derivatives.
        """
        if self._checked or not inputs.requires_grad:
            return self.observation.simulate(inputs, labels, self._leaves)
        try:
            simulated = self.observation.simulate(inputs, labels, self._leaves)
        except Exception as error:
            if labels.requires_grad:  # whatever a loss makes of probabilities in place of classes
                raise SoftLabelsRefusedError(error) from error
            raise
        check_second_derivatives(simulated)
        self._checked = True
        return simulated


@contextmanager
def activations(observation: Observation, names: Iterable[str]) -> Iterator[dict[str, Tensor]]:
    """Collect what goes into the named modules during simulated forward passes, with its graph."""
    seen: dict[str, Tensor] = {}
    wanted = set(names)
    if not wanted:
        yield seen
        return

    def hook(name: str) -> object:
        def record(_: nn.Module, args: tuple[Tensor, ...]) -> None:
            seen[name] = args[0]

        return record

    with observation.client.lock:  # the hooks are on the shared replica
        modules = {n: m for n, m in observation.client.module.named_modules() if n in wanted}
        handles = [m.register_forward_pre_hook(hook(n)) for n, m in modules.items()]  # type: ignore[arg-type]
        try:
            yield seen
        finally:
            for handle in handles:
                handle.remove()

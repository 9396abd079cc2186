"""The optimizer of a client that takes several local steps."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lightning_gradaudit.errors import UnsupportedError
from lightning_gradaudit.utils.tensors import Tensors

_NOT_DIFFERENTIABLE = ("foreach", "fused", "capturable", "differentiable")


@dataclass(frozen=True, kw_only=True, eq=False)
class LocalOptimizer:
    """The optimizer of a client that shares its weights only after several steps of its own.

    Attributes:
        kind: A torch optimizer that can be differentiated through.
        groups: Names of the parameters in each group.
        settings: For every step, the hyperparameters of each group.
        state: Optimizer state of each parameter before the first step; empty for a fresh optimizer.
    """

    kind: type[torch.optim.Optimizer]
    groups: tuple[tuple[str, ...], ...]
    settings: tuple[tuple[dict[str, Any], ...], ...]
    state: Mapping[str, dict[str, Any]]

    @staticmethod
    def check(optimizer: torch.optim.Optimizer) -> None:
        """Refuse optimizers that torch cannot differentiate.

        Raises:
            UnsupportedError: Naming the optimizer.
        """
        if "differentiable" not in optimizer.defaults:
            raise UnsupportedError(
                f"view='delta' needs an optimizer that torch can differentiate (SGD, Adam, AdamW and others with "
                f"differentiable=), got {type(optimizer).__name__}. Audit view='local' or 'update' instead."
            )

    @staticmethod
    def settings_of(optimizer: torch.optim.Optimizer) -> tuple[dict[str, Any], ...]:
        """Return the present hyperparameters of each group."""
        return tuple({k: v for k, v in group.items() if k != "params"} for group in optimizer.param_groups)

    @classmethod
    def of(cls, optimizer: torch.optim.Optimizer, names: Mapping[int, str]) -> LocalOptimizer:
        """Read a live optimizer before its first step; `names` maps the id of a parameter to its name."""
        cls.check(optimizer)
        return cls(
            kind=type(optimizer),
            groups=tuple(tuple(names[id(p)] for p in group["params"]) for group in optimizer.param_groups),
            settings=(),
            state={names[id(p)]: copy.deepcopy(state) for p, state in optimizer.state.items()},
        )

    def step(
        self, number: int, weights: Tensors, gradients: Tensors, state: Mapping[str, dict[str, Any]]
    ) -> tuple[dict[str, Tensor], dict[str, dict[str, Any]]]:
        """Return weights and state after one step, with a graph to `gradients`.

        Torch's own optimizer does the arithmetic, on copies: its in-place updates must not reach tensors that the
        graph of an earlier step has saved.
        """
        moved = {name: weight.clone() for name, weight in weights.items()}
        groups = []
        for names, settings in zip(self.groups, self.settings[number], strict=True):
            kept = {k: v for k, v in settings.items() if k not in _NOT_DIFFERENTIABLE}
            groups.append({"params": [moved[n] for n in names if n in moved], **kept})
        optimizer = self.kind([g for g in groups if g["params"]], differentiable=True, foreach=False)  # type: ignore[call-arg]
        for name, entries in state.items():
            if name in moved:
                optimizer.state[moved[name]] = {
                    k: v.clone() if isinstance(v, Tensor) else v for k, v in entries.items()
                }
        for name, gradient in gradients.items():
            if gradient.requires_grad:
                # Where Adam's v is 0, √v has an infinite derivative; such weights have no gradient and no information.
                gradient.register_hook(torch.nan_to_num)
            moved[name].grad = gradient
        if self.kind is torch.optim.SGD:
            _start_momentum(optimizer)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="The .grad attribute of a Tensor that is not a leaf")
            optimizer.step()
        return moved, {name: dict(optimizer.state[weight]) for name, weight in moved.items()}


def _start_momentum(optimizer: torch.optim.Optimizer) -> None:
    """Set the momentum buffer b of fresh parameters so that the first step uses the gradient g: mb + (1 - d)g = g.

    Otherwise torch starts from a detached copy of g, and the first step would have no derivative by the images.
    """
    for group in optimizer.param_groups:
        momentum, dampening = group["momentum"], group["dampening"]
        for parameter in group["params"] if momentum else ():
            if optimizer.state[parameter].get("momentum_buffer") is None:
                sign = -1 if group["maximize"] else 1
                gradient = sign * parameter.grad + group["weight_decay"] * parameter
                optimizer.state[parameter]["momentum_buffer"] = gradient * (dampening / momentum)

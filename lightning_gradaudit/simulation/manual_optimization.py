"""Replay a training step with manual optimization: its losses are recorded instead of differentiated."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from lightning_gradaudit.errors import ReplayError


class _StepReached(Exception):  # noqa: N818 - not an error: ends the replay at the optimizer's step
    """The audited optimizer stepped."""


class ManualOptimization:
    """What a LightningModule's manual optimization needs, without a Trainer.

    The loss behind the audited optimizer's gradient is the sum of the losses that were differentiated since its
    gradients were last zeroed, while it was not toggled off. The step ends where that optimizer first steps. Other
    optimizers do not change the replica's weights, so a loss that depends on their step is not reproduced and fails the
    self-test.

    Args:
        module: The replica.
        optimizers: How many optimizers the module has.
        audited: Index of the one whose gradient was captured.
    """

    def __init__(self, module: nn.Module, *, optimizers: int, audited: int) -> None:
        self.audited = audited
        self.losses: list[Tensor] = []
        self.active = True
        self.handles = [_ReplicaOptimizer(self, index) for index in range(optimizers)]
        for name, stand_in in {
            "optimizers": self._optimizers,
            "manual_backward": self.backward,
            "toggle_optimizer": self._toggle,
            "untoggle_optimizer": self._untoggle,
            "zero_grad": self._zero_all,
            "clip_gradients": _ignore,
            "lr_schedulers": lambda: _InertScheduler(),
        }.items():
            object.__setattr__(module, name, stand_in)

    @contextmanager
    def record_losses(self) -> Iterator[None]:
        """Record `loss.backward()` too, and end without an error at the audited optimizer's step."""
        self.losses, self.active = [], True
        with _BackwardRecorder(self), suppress(_StepReached):
            yield

    @property
    def loss(self) -> Tensor:
        """The loss behind the audited optimizer's gradient.

        Raises:
            ReplayError: When nothing was differentiated for it.
        """
        if not self.losses:
            raise ReplayError(
                f"training_step (manual optimization) differentiated no loss for optimizer {self.audited}, so its "
                "gradient cannot be simulated. Audit another one with ThreatModel(optimizer=...), or pass loss=."
            )
        return torch.stack([loss.reshape(()) for loss in self.losses]).sum()

    def backward(self, loss: Tensor, *args: Any, **kwargs: Any) -> None:
        """Record a loss."""
        if self.active:
            self.losses.append(loss)

    def _optimizers(self, use_pl_optimizer: bool = True) -> Any:
        return self.handles[0] if len(self.handles) == 1 else self.handles

    def _toggle(self, optimizer: _ReplicaOptimizer) -> None:
        self.active = optimizer.index == self.audited

    def _untoggle(self, optimizer: _ReplicaOptimizer) -> None:
        self.active = True

    def _zero_all(self, *args: Any, **kwargs: Any) -> None:
        self.losses.clear()


class _ReplicaOptimizer:
    """What `self.optimizers()` returns in a replica."""

    def __init__(self, owner: ManualOptimization, index: int) -> None:
        self.owner, self.index = owner, index
        self.param_groups: Sequence[dict[str, Any]] = [{"lr": 0.0, "params": []}]
        self.state: dict[Any, Any] = {}
        self.optimizer = self

    def zero_grad(self, *args: Any, **kwargs: Any) -> None:
        if self.index == self.owner.audited:
            self.owner.losses.clear()

    def step(self, closure: Any = None, **kwargs: Any) -> None:
        if closure is not None:
            closure()
        if self.index == self.owner.audited:
            raise _StepReached

    @contextmanager
    def toggle_model(self, sync_grad: bool = True) -> Iterator[None]:
        self.owner._toggle(self)
        yield
        self.owner._untoggle(self)


class _InertScheduler:
    """A learning-rate scheduler that does nothing."""

    def step(self, *args: Any, **kwargs: Any) -> None:
        pass

    def __iter__(self) -> Iterator[_InertScheduler]:
        return iter([self] * 8)


class _BackwardRecorder(TorchFunctionMode):
    """Record the loss of `loss.backward()` instead of running it."""

    def __init__(self, owner: ManualOptimization) -> None:
        super().__init__()
        self.owner = owner

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is Tensor.backward:
            self.owner.backward(*args, **(kwargs or {}))
            return None
        return func(*args, **(kwargs or {}))


def _ignore(*args: Any, **kwargs: Any) -> None:
    pass

"""What lies between a batch and what the adversary holds: micro-batches, clipping, local optimizer steps.

A protocol is public (the adversary knows how the client trains); the random states in it are not, unless the threat
model includes them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from lightning_gradaudit.simulation.batch_entries import OtherEntries
from lightning_gradaudit.simulation.defences import Defence
from lightning_gradaudit.simulation.local_optimizer import LocalOptimizer
from lightning_gradaudit.simulation.replay import ProcessRandomness
from lightning_gradaudit.utils.tensors import Tensors, global_norm


@dataclass(frozen=True, eq=False)
class MicroBatch:
    """One forward and backward pass of one process.

    Attributes:
        indices: Positions of its images in the candidate batch.
        rank: The process; each has buffers of its own.
        rng_state: Random state of the CPU before its forward pass; None: not known.
        process_rng: The same of Python's and numpy's generators.
        other: What its batch holds beside images and labels, as far as it is known.
    """

    indices: tuple[int, ...]
    rank: int = 0
    rng_state: Tensor | None = None
    process_rng: ProcessRandomness | None = None
    other: OtherEntries | None = None

    def only(self, position: int) -> MicroBatch:
        """Return one of its samples as a micro-batch of its own."""
        other = None if self.other is None else self.other.take([position])
        return replace(self, indices=(self.indices[position],), other=other)


@dataclass(frozen=True, kw_only=True)
class PrivateSum:
    """DP-SGD (Abadi et al., arXiv:1607.00133): per-sample clipping, a sum, Gaussian noise, a division.

    Attributes:
        max_norm: C, the largest norm of one sample's gradient over all tensors.
        noise_multiplier: σ; every coordinate of the sum gets noise of standard deviation σC.
        divisor: What the noised sum is divided by (the expected batch size, times accumulated batches).
    """

    max_norm: float
    noise_multiplier: float
    divisor: float

    @property
    def noise_std(self) -> float:
        """Standard deviation of the noise in every coordinate of what is shared."""
        return self.noise_multiplier * self.max_norm / self.divisor

    def add(self, total: Tensors, sample: Tensors) -> dict[str, Tensor]:
        """Return `total` plus the clipped gradient of one sample over the divisor."""
        # 1e-6 as in Opacus, because the client's own rounding is part of the simulation.
        factor = (self.max_norm / (global_norm(sample) + 1e-6)).clamp(max=1.0) / self.divisor
        return {name: total[name] + factor * g for name, g in sample.items()}


@dataclass(frozen=True, kw_only=True, eq=False)
class SharingProtocol:
    """How a client, or several, turn images into what is shared.

    Attributes:
        steps: For every optimizer step, the micro-batches behind it; one step for all views but "delta".
        scale: Factor of each micro-batch's mean gradient in the sum (1/(N·W) under accumulation and reduction).
        clip: Clipping of the summed gradient.
        private: Per-sample clipping and noise in its place.
        optimizer: For "delta": what is shared is the change of the weights.
    """

    steps: tuple[tuple[MicroBatch, ...], ...]
    scale: float = 1.0
    clip: Defence | None = None
    private: PrivateSum | None = None
    optimizer: LocalOptimizer | None = None

    @classmethod
    def one_batch(
        cls,
        size: int,
        rng_state: Tensor | None = None,
        other: OtherEntries | None = None,
        process_rng: ProcessRandomness | None = None,
    ) -> SharingProtocol:
        """The gradient of one batch, unchanged."""
        return cls(steps=((MicroBatch(tuple(range(size)), 0, rng_state, process_rng, other),),))

    @property
    def micro_batches(self) -> tuple[MicroBatch, ...]:
        """All of them, in order."""
        return tuple(each for step in self.steps for each in step)

    @property
    def batch_size(self) -> int:
        """Number of images behind what is shared."""
        return 1 + max(index for each in self.micro_batches for index in each.indices)

    @property
    def is_one_gradient(self) -> bool:
        """Whether what is shared is the gradient of one loss, the scaled sum over the micro-batches."""
        return self.optimizer is None and self.clip is None and self.private is None

    def without_randomness(self) -> SharingProtocol:
        """Return the protocol as known to an adversary who cannot repeat the random numbers of the forward pass."""
        return self._change_each(lambda each: replace(each, rng_state=None, process_rng=None))

    def with_known_entries(self, known: Sequence[str] | None, image: torch.Size) -> SharingProtocol:
        """Return the protocol of an adversary who knows some entries of the batches (`OtherEntries`)."""

        def change(each: MicroBatch) -> MicroBatch:
            if each.other is None or not each.other.entries:
                return each
            return replace(each, other=each.other.known_to_adversary(known, image))

        return self._change_each(change)

    @property
    def epochs(self) -> tuple[tuple[MicroBatch, ...], ...]:
        """The micro-batches of each pass over the images: a new one begins where an image is repeated."""
        epochs: list[list[MicroBatch]] = []
        seen: set[int] = set()
        for each in self.micro_batches:
            if not epochs or seen & set(each.indices):
                epochs.append([])
                seen = set()
            epochs[-1].append(each)
            seen |= set(each.indices)
        return tuple(tuple(epoch) for epoch in epochs)

    def without_order(self) -> SharingProtocol:
        """Return the protocol as known to an adversary who knows only the sizes of the batches.

        The images of each epoch are numbered in order, so that the protocol does not tell where an image of the first
        epoch occurs again.
        """
        return self._renumber(offset=0)

    def unrolled(self) -> SharingProtocol:
        """Return the protocol of a client with different images in every epoch."""
        return self._renumber(offset=1)

    def _renumber(self, *, offset: int) -> SharingProtocol:
        changed: dict[int, MicroBatch] = {}
        start = 0
        for epoch in self.epochs:
            position = start
            for each in epoch:
                changed[id(each)] = replace(each, indices=tuple(range(position, position + len(each.indices))))
                position += len(each.indices)
            start = position * offset
        return self._change_each(lambda each: changed[id(each)])

    def undefended(self) -> SharingProtocol:
        """Return the protocol without clipping and noise."""
        return replace(self, clip=None, private=None)

    def to(self, device: torch.device | str) -> SharingProtocol:
        """Move the optimizer's state and the entries of batches; random states stay on the CPU."""
        moved = self._change_each(
            lambda each: each if each.other is None else replace(each, other=each.other.to(device))
        )
        if self.optimizer is None:
            return moved
        state = {
            name: {k: v.to(device) if isinstance(v, Tensor) else v for k, v in entries.items()}
            for name, entries in self.optimizer.state.items()
        }
        return replace(moved, optimizer=replace(self.optimizer, state=state))

    def _change_each(self, change: Callable[[MicroBatch], MicroBatch]) -> SharingProtocol:
        return replace(self, steps=tuple(tuple(change(each) for each in step) for step in self.steps))

    def to_dict(self) -> dict[str, object]:
        """Return plain JSON."""
        ranks = {each.rank for each in self.micro_batches}
        return {
            "micro_batches": len(self.steps[0]) // len(ranks),
            "ranks": len(ranks),
            "local_steps": len(self.steps) if self.optimizer is not None else 0,
            "clip": None if self.clip is None else repr(self.clip),
            "private": None if self.private is None else repr(self.private),
        }

    def share(
        self, weights: Tensors, names: Sequence[str], gradient: Callable[[Tensors, Sequence[MicroBatch]], Tensors]
    ) -> dict[str, Tensor]:
        """Return what is shared, before noise.

        Args:
            weights: All weights at the start.
            names: Those that are trained.
            gradient: Returns the gradient of the summed, scaled loss of some micro-batches at given weights.
        """
        if self.optimizer is None:
            return self._one_step(weights, self.steps[0], gradient)
        moved = {name: weights[name] for name in names}
        state: Mapping[str, dict[str, Any]] = self.optimizer.state
        for number, step in enumerate(self.steps):
            gradients = self._one_step({**weights, **moved}, step, gradient)
            moved, state = self.optimizer.step(number, moved, gradients, state)
        return {name: moved[name] - weights[name] for name in names}

    def _one_step(
        self,
        weights: Tensors,
        step: Sequence[MicroBatch],
        gradient: Callable[[Tensors, Sequence[MicroBatch]], Tensors],
    ) -> dict[str, Tensor]:
        if self.private is None:
            summed = dict(gradient(weights, step))
            return summed if self.clip is None else self.clip(summed, generator=torch.Generator())
        total: dict[str, Tensor] = {}
        for each in step:
            for position in range(len(each.indices)):
                sample = gradient(weights, [each.only(position)])
                total = self.private.add(total or {n: torch.zeros_like(g) for n, g in sample.items()}, sample)
        return total

"""Exact recovery of a whole batch from a linear layer that is fed by the image.

dL/dW = D Xᵀ has one column of D and of X per image, so its rows span the batch. Two facts separate the images in that
span: their features must lie in the span of the next linear layer's gradient (`consecutive_layers`), and a ReLU puts
zeros into D (`row_space`; SPEAR, Dimitrov et al., arXiv:2403.03945, and SPEAR++, arXiv:2510.24200).
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor
from torch.nn.modules.dropout import _DropoutNd

from lightning_gradaudit.attacks.base import Attack
from lightning_gradaudit.attacks.budget import Budget, Meter
from lightning_gradaudit.attacks.closed_form.consecutive_layers import (
    SETTINGS,
    find_chains,
    shared_space,
    solve_chain,
)
from lightning_gradaudit.attacks.closed_form.image_layer import ImageLayer, image_layers, output_gradients
from lightning_gradaudit.attacks.closed_form.row_space import (
    RowSpace,
    are_unmixed,
    compare_zeros,
    implied_columns,
    inputs_from_columns,
    sparse_columns,
)
from lightning_gradaudit.attacks.closed_form.verification import VERIFIED_SQUARED_ERROR, simulated_error, solution
from lightning_gradaudit.attacks.labels.head import placeholder_labels
from lightning_gradaudit.attacks.labels.recovery import LabelEstimate, recover_labels
from lightning_gradaudit.attacks.reconstruction import Reconstruction
from lightning_gradaudit.errors import InvalidInputError
from lightning_gradaudit.simulation.observation import Observation
from lightning_gradaudit.utils.time_limit import time_left

CONSISTENT_COLUMN_ERROR = 1e-2
"""Relative error of a column of D below which its image and label explain it."""


@dataclass(frozen=True, kw_only=True)
class SpanInversion(Attack):
    """Solve for all images of a batch, whatever their labels, from a linear layer that is fed by them.

    Applies where each unit of the layer passes through an activation into another linear layer whose gradient has rank
    B too (a classification head has at most classes - 1), or else where the derivative of the activation has enough
    exact zeros to separate the images: up to about B = 12 for an untrained ReLU layer, far fewer after training. Images
    that switch the same units on cannot be told from their mixtures; then nothing is certified.

    Needs the gradient to single precision: noise, reduced precision or a batch larger than assumed show in its rank,
    and the attack does not apply. An image whose share of the gradient is lost in rounding (a saturated softmax), or
    that is present twice, lowers the rank: the different images that remain are recovered and `certified`. For one
    image use `LinearLayerInversion`.

    Args:
        starts: Descents in each round of the search.
        rounds: Rounds of each search.
        seconds: Longest search, whatever the budget says. The search simulates no gradient; the proof does.
        max_batch: Largest batch tried; memory grows with its square times the width of the layer.
    """

    starts: int = 128
    rounds: int = 40
    seconds: float = 10.0
    max_batch: int = 32

    def __post_init__(self) -> None:
        for name in ("starts", "rounds", "seconds", "max_batch"):
            if not getattr(self, name) > 0:
                raise InvalidInputError(f"{name}: expected a positive number, got {getattr(self, name)!r}.")

    def run(self, observation: Observation, *, budget: Budget, generator: torch.Generator) -> Reconstruction:
        meter = Meter(budget)
        size = observation.batch_size

        def not_applicable(reason: str) -> Reconstruction:
            return Reconstruction.not_applicable(observation, reason, evaluations=meter.evaluations)

        if not 1 < size <= self.max_batch:
            return not_applicable(f"made for batches of 2 to {self.max_batch} images, got {size}")
        layers = image_layers(observation, generator)
        if not layers:
            return not_applicable("no linear layer that shares its gradient is fed by the image")
        layer = layers[0]
        space = shared_space(observation, layer.weight, layer.bias, generator)
        if space is None:
            return not_applicable(
                f"the gradient of {layer.name!r} is not of rank {size} or less to single precision: "
                "noise, reduced precision or a larger batch"
            )
        if meter.remaining < 2:
            return not_applicable("the budget is too small to verify a batch")
        prove = _Prover(observation, layer, space, meter, recover_labels(observation, generator=generator))
        best = _Proof(space.s.new_zeros((0, space.rank)), torch.zeros(0, dtype=torch.bool), None)
        for found in self._candidates(observation, layer, space, budget, generator):
            proof = prove(found)
            if int(proof.certified.sum()) > int(best.certified.sum()):
                best = proof
            if (len(best.inputs) == space.rank and bool(best.certified.all())) or meter.remaining < 2:
                break
        if not bool(best.certified.any()):
            return not_applicable("no image of the batch could be told from mixtures of them")
        return prove.conclude(best)

    def _candidates(
        self, observation: Observation, layer: ImageLayer, space: RowSpace, budget: Budget, generator: torch.Generator
    ) -> Iterator[Tensor]:
        """Yield inputs (K, r), in terms of `space.v`, that may be the batch."""
        limit = self.seconds if budget.seconds is None else min(self.seconds, budget.seconds)
        deadline = time.monotonic() + min(limit, time_left())
        for chain in find_chains(observation, layer.name, space, generator):
            yield solve_chain(chain, generator, starts=self.starts, rounds=self.rounds, deadline=deadline)
        previous = space.s.new_zeros((0, space.rank))
        for _, columns in zip(range(self.rounds), sparse_columns(space, self.starts, generator), strict=False):
            if len(columns) == space.rank and not torch.equal(columns, previous):
                previous = columns
                inputs = inputs_from_columns(space, columns)
                if inputs is not None and bool(inputs.isfinite().all()):
                    yield inputs
            if time.monotonic() > deadline:
                break


@dataclass(frozen=True)
class _Proof:
    """What is known of a set of inputs.

    Attributes:
        inputs: (K, r) in terms of the rows of the span.
        certified: (K,) whether each is proven.
        labels: (K,) the labels that explain their columns of D best, or None.
    """

    inputs: Tensor
    certified: Tensor
    labels: Tensor | None


@dataclass(frozen=True)
class _Prover:
    """Prove inputs without the truth: the columns of D they imply must be those that the network gives them."""

    observation: Observation
    layer: ImageLayer
    space: RowSpace
    meter: Meter
    estimate: LabelEstimate

    def __call__(self, inputs: Tensor) -> _Proof:
        space = self.space
        if self._has_dropout and len(inputs) == self.observation.batch_size:
            inputs = self._put_in_place(inputs)
        lengths = (inputs @ space.v).norm(dim=1)
        possible_error = space.noise * space.v.shape[1] ** 0.5 * (inputs / space.s).norm(dim=1)
        precise = possible_error < SETTINGS.most_input_error * lengths
        nothing = _Proof(inputs, torch.zeros_like(precise), None)
        implied = implied_columns(space, inputs)
        if implied is None:
            return nothing
        columns, noise = implied
        proven = torch.zeros_like(precise)
        error, best = torch.full_like(lengths, torch.inf), torch.zeros_like(lengths, dtype=torch.long)
        candidates = self._candidates()
        sign = -1.0 if self.observation.protocol.optimizer is not None else 1.0
        for number, label in enumerate(candidates):
            if self.meter.remaining < 2:  # one evaluation is kept for the matching loss
                break
            simulated = self._columns(inputs, label)
            if not number:  # which units are off does not depend on the label
                agreed, refuted = compare_zeros(columns, noise, simulated)
                if refuted:
                    return nothing
                proven = agreed & are_unmixed(columns, noise)
            misfit = _scaled_error(columns, sign * simulated)
            best[misfit < error] = number
            error = torch.minimum(error, misfit)
            if bool((error < CONSISTENT_COLUMN_ERROR).all()):
                break
        labels = None if self._named is None else candidates[best]
        return _Proof(inputs, precise & (proven | (error < CONSISTENT_COLUMN_ERROR)), labels)

    @property
    def _has_dropout(self) -> bool:
        modules = self.observation.client.module.modules()
        return any(isinstance(each, _DropoutNd) and each.training for each in modules)

    def _put_in_place(self, inputs: Tensor) -> Tensor:
        """Order a whole batch's inputs (B, r) as the client had them: dropout switches other units off at each place.

        Every input is simulated once at every place, and stands where its column of D has the zeros that the network
        gives it there.
        """
        implied, size = implied_columns(self.space, inputs), len(inputs)
        if implied is None or self.meter.remaining < size + 2:  # the proof takes one more, and the matching loss
            return inputs
        columns, noise = implied
        fits = torch.zeros((size, size))  # (input, place)
        for shift in range(size):
            order = (torch.arange(size) + shift) % size
            simulated = self._columns(inputs[order], self._candidates()[0])
            agreed, _ = compare_zeros(columns[:, order], noise[order], simulated)
            fits[order, torch.arange(size)] = agreed.float().cpu()
        _, chosen = linear_sum_assignment(fits.T.numpy(), maximize=True)
        return inputs[torch.from_numpy(chosen)]

    @property
    def _named(self) -> Tensor | None:
        """The batch's labels (B, ...) as known or recovered, in any order; None if neither."""
        return self.estimate.labels if self.observation.labels is None else self.observation.labels

    def _candidates(self) -> Tensor:
        """Return the labels to try (N, ...): those known or recovered, then all other classes."""
        if self._named is None:
            label = placeholder_labels(self.observation)[:1].clone()
            label.view(-1)[0] = 1  # probabilities that are all zero would have no gradient
            return label
        first = self._named.unique(dim=0)
        if self.observation.labels is not None:
            return first
        others = torch.arange(self.estimate.classes, device=first.device)
        return torch.cat([first, others[~torch.isin(others, first)]])

    def _columns(self, inputs: Tensor, label: Tensor) -> Tensor:
        images = self.layer.image((inputs @ self.space.v).float(), self.observation)
        simulated = output_gradients(self.observation, self.layer, images, label, self.meter)
        return simulated.T.double()[self.space.rows] / self.space.norms[:, None]

    def conclude(self, proof: _Proof) -> Reconstruction:
        """Simulate the gradient of what was found, and return it as an answer."""
        observation, size = self.observation, self.observation.batch_size
        found, rank = len(proof.inputs), self.space.rank
        images = observation.normalization.from_pixels(torch.full(observation.shape, 0.5, device=observation.device))
        images[:found] = self.layer.image((proof.inputs @ self.space.v).float(), observation)
        certified = torch.zeros(size, dtype=torch.bool, device=observation.device)
        certified[:found] = proof.certified
        labels = self._named
        if labels is not None and proof.labels is not None:
            labels = _with_leftovers(proof.labels, labels)
        error = simulated_error(observation, images, labels, self.meter)
        verified = bool(certified.all()) and error < VERIFIED_SQUARED_ERROR
        reason = "verified" if verified else f"{int(certified.sum())} image(s) certified"
        if rank < size:
            reason += (
                f"; the gradient holds {rank} different images of {size}: the others are repeated or lost in rounding"
            )
        return solution(images, labels, error, certified, self.meter, reason)


def _scaled_error(columns: Tensor, simulated: Tensor) -> Tensor:
    """Return the relative error (K,) of columns (m, K) after fitting a positive factor to each."""
    energy = simulated.square().sum(0).clamp_min(1e-300)
    factor = ((columns * simulated).sum(0) / energy).clamp_min(0)
    return (columns - factor * simulated).norm(dim=0) / columns.norm(dim=0).clamp_min(1e-300)


def _with_leftovers(found: Tensor, everyone: Tensor) -> Tensor:
    """Complete the labels found (K, ...) to the batch's (B, ...) with those that are not among them."""
    left = list(everyone)
    for label in found:
        left.pop(next((index for index, other in enumerate(left) if torch.equal(other, label)), -1))
    return torch.cat([found, torch.stack(left)]) if left else found

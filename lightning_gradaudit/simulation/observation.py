"""Everything the adversary holds: nothing else is passed to an `Attack`."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

import torch
from torch import Tensor, nn

from lightning_gradaudit.errors import InvalidInputError
from lightning_gradaudit.simulation.batch_statistics import LayerStatistics, solve_statistics
from lightning_gradaudit.simulation.defences import GaussianNoise
from lightning_gradaudit.simulation.layer_trace import LayerCall, join_calls, record_calls
from lightning_gradaudit.simulation.normalization import Normalization
from lightning_gradaudit.simulation.sharing import MicroBatch, SharingProtocol
from lightning_gradaudit.simulation.threat_model import ThreatModel
from lightning_gradaudit.simulation.training_step import TrainingStep
from lightning_gradaudit.utils.tensors import Tensors, global_norm


@dataclass(frozen=True, kw_only=True, eq=False)
class Observation:
    """What an honest-but-curious adversary holds about one training step, and a simulator for candidate images.

    Attributes:
        gradients: What was shared, after the client's defences, keyed by parameter name.
        parameters: All weights the gradient was taken at, frozen ones included.
        buffers: Buffers before the forward pass.
        buffers_after: Buffers after the step, where they leave too (`ThreatModel.buffers_shared`); None: they do not.
        threat_model: Who sees what.
        input_shape: (C, H, W).
        batch_size: Number of images behind the gradient.
        normalization: Map between pixels and model inputs.
        label_shape: Shape of one sample's label: () for class indices.
        label_dtype: Integer for class indices.
        labels: (B, ...) when the threat model gives them away, else None.
        public_images: (M, C, H, W) pixels in [0, 1] of the same kind that the adversary holds, none of them private;
            None: none. Labels are recovered with their help.
        client: The training step as a pure function.
        protocol: How images become what is shared; random states only when the threat model gives them away.
        computed_on: Kind of device that the gradient was computed on; empty: the kind it lies on.
    """

    gradients: Tensors
    parameters: Tensors
    buffers: Tensors
    threat_model: ThreatModel
    input_shape: torch.Size
    batch_size: int
    normalization: Normalization
    label_shape: torch.Size = torch.Size(())
    label_dtype: torch.dtype = torch.int64
    input_dtype: torch.dtype = torch.float32
    labels: Tensor | None = None
    public_images: Tensor | None = field(default=None, repr=False)
    buffers_after: Tensors | None = None
    client: TrainingStep = field(repr=False)
    protocol: SharingProtocol = field(repr=False)
    computed_on: str = ""

    def __post_init__(self) -> None:
        missing = [name for name in self.gradients if name not in self.parameters]
        if missing or not self.gradients:
            raise InvalidInputError(
                f"gradients: every key must name a parameter; unknown: {missing[:3]}, given: {len(self.gradients)}."
            )

    def __getstate__(self) -> dict[str, object]:
        return {k: v for k, v in self.__dict__.items() if k not in ("box", "statistics")}

    @property
    def device(self) -> torch.device:
        """Where the tensors lie."""
        return next(iter(self.gradients.values())).device

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of a candidate batch, (B, C, H, W)."""
        return (self.batch_size, *self.input_shape)

    @cached_property
    def box(self) -> tuple[Tensor, Tensor]:
        """Smallest and largest model input a pixel in [0, 1] can give, each (C, 1, 1).

        Computed once: a copy of constants to a device makes the host wait for it.
        """
        zeros = torch.zeros((self.input_shape[0], 1, 1), device=self.device)
        return self.normalization.from_pixels(zeros), self.normalization.from_pixels(zeros + 1)

    @cached_property
    def statistics(self) -> dict[str, LayerStatistics]:
        """What shared buffers give away about the batch, by BatchNorm layer; empty where none are shared or moved."""
        if self.buffers_after is None:
            return {}
        own = sum(each.rank == 0 for each in self.protocol.micro_batches)
        return solve_statistics(self.client.module, self.buffers, self.buffers_after, passes=own)

    def passes(self, calls: Sequence[Tensor]) -> list[Tensor]:
        """Return, of the calls of one layer in all micro-batches, those of the process whose buffers are shared."""
        parts = self.protocol.micro_batches
        each, rest = divmod(len(calls), len(parts))
        return [call for at, call in enumerate(calls) if rest or parts[at // each].rank == 0]

    def leaves(self) -> dict[str, Tensor]:
        """Return the observed weights as fresh leaves; those with a shared gradient require one."""
        return {name: p.detach().requires_grad_(name in self.gradients) for name, p in self.parameters.items()}

    @property
    def noise_std(self) -> float:
        """Standard deviation of the noise that the adversary knows to be on every coordinate, >= 0."""
        declared = sum(d.std**2 for d in self.threat_model.defences if isinstance(d, GaussianNoise) and d.std)
        private = 0.0 if self.protocol.private is None else self.protocol.private.noise_std
        return math.sqrt(declared + private**2)

    def loss(self, inputs: Tensor, labels: Tensor, leaves: Tensors | None = None) -> Tensor:
        """Return the client's training loss on candidate data, a scalar.

        Over several micro-batches it is the scaled sum whose gradient is the client's; over several local steps it is
        that sum at the first step's weights. A batch of another size than the client's counts as one micro-batch.
        """
        weights = self.leaves() if leaves is None else leaves
        return self._loss(weights, inputs, labels, self._micro_batches(inputs))

    def _micro_batches(self, inputs: Tensor) -> tuple[MicroBatch, ...]:
        if len(inputs) != self.batch_size:
            return (MicroBatch(tuple(range(len(inputs))), other=self.protocol.micro_batches[0].other),)
        seen: set[int] = set()
        kept = []
        for each in self.protocol.micro_batches:  # a second epoch has the same images
            if not seen & set(each.indices):
                kept.append(each)
                seen |= set(each.indices)
        return tuple(kept)

    def _loss(
        self,
        weights: Tensors,
        inputs: Tensor,
        labels: Tensor,
        parts: Sequence[MicroBatch],
        held: dict[int, dict[str, Tensor]] | None = None,
    ) -> Tensor:
        # Every process has its own buffers, which each of its micro-batches updates; `held` are those of earlier steps.
        before = {} if held is None else held
        buffers = {
            part.rank: {name: b.detach().clone() for name, b in before.get(part.rank, self.buffers).items()}
            for part in parts
        }
        before.update(buffers)
        weights = self._protected(weights)
        losses = []
        with torch.enable_grad():
            for number, part in enumerate(parts):
                at = list(part.indices)
                whole = at == list(range(len(inputs)))
                # A copy: training steps may change their batch in place.
                images = inputs.to(self.input_dtype, copy=True) if whole else inputs[at].to(self.input_dtype)
                targets = labels if whole else labels[at]
                generator = self._generator(part.rng_state, number)
                loss = self.client.forward(
                    weights,
                    buffers[part.rank],
                    images,
                    targets,
                    generator,
                    other=part.other,
                    process_rng=part.process_rng,
                )
                losses.append(loss)
            scale = self.protocol.scale if len(inputs) == self.batch_size else 1.0
            total = losses[0] if len(losses) == 1 else torch.stack(losses).sum()
            return total if scale == 1.0 else total * scale

    def _protected(self, weights: Tensors) -> Tensors:
        """Copy weights, which the step may change in place; only where it does, once that is known.

        A change of a copy passes the gradient on to the weight: what it is at the changed value, as in training.
        """
        if self.client.changes_weights is False:
            return weights
        return {name: w.clone() for name, w in weights.items()}

    def simulate(
        self,
        inputs: Tensor,
        labels: Tensor,
        leaves: Tensors | None = None,
        *,
        buffers_after: dict[str, Tensor] | None = None,
    ) -> dict[str, Tensor]:
        """Return what the client would have shared on candidate data, before random defences.

        Differentiable in `inputs` (and in soft `labels`) when they require a gradient. A batch of another size than
        the client's gives the plain gradient of its mean loss.

        Args:
            inputs: (B, C, H, W) in the model's input space.
            labels: (B,) class indices, or (B, classes) probabilities where the loss accepts them.
            leaves: The result of `leaves()`, to build it once for many calls.
            buffers_after: Gets the buffers that the (first) process has after the step.

        Returns:
            Keyed and shaped as `gradients`; zero for weights that the loss does not reach.
        """
        start = self.leaves() if leaves is None else leaves
        graph = inputs.requires_grad or labels.requires_grad
        held: dict[int, dict[str, Tensor]] = {}

        def gradient(weights: Tensors, parts: Sequence[MicroBatch]) -> dict[str, Tensor]:
            # Per-sample gradients are each taken at the buffers of the start.
            loss = self._loss(weights, inputs, labels, parts, held if self.protocol.private is None else None)
            wanted = [weights[name] for name in self.gradients]
            gradients = torch.autograd.grad(loss, wanted, create_graph=graph, allow_unused=True, materialize_grads=True)
            return dict(zip(self.gradients, gradients, strict=True))

        if len(inputs) != self.batch_size:
            return gradient(start, self._micro_batches(inputs))
        shared = self.protocol.share(start, list(self.gradients), gradient)
        if buffers_after is not None:
            buffers_after.update(held.get(0, {}))
        return shared if graph else {name: tensor.detach() for name, tensor in shared.items()}

    def trace(
        self,
        inputs: Tensor,
        labels: Tensor,
        *,
        gradients: bool = False,
        kinds: tuple[type[nn.Module], ...] | None = (nn.Linear,),
    ) -> list[LayerCall]:
        """Run one simulated forward pass and report every layer of some kinds in the order of execution.

        Args:
            gradients: Also return the gradient of the loss with respect to each layer's output.
            kinds: Classes of the layers; None: every module without children. Calls that do not map one tensor to
                another are left out.
        """
        # The hooks are on the replica that all threads share.
        with self.client.lock, record_calls(self.client.module, kinds) as (calls, outputs):
            loss = self.loss(inputs, labels)
        if gradients and calls:
            calls = _with_gradients(calls, loss, outputs)
        return join_calls(calls, len(self._micro_batches(inputs)))

    def relative_error(self, simulated: Tensors) -> float:
        """Return ‖simulated - observed‖ / ‖observed‖ over all tensors, >= 0."""
        difference = {name: simulated[name] - g for name, g in self.gradients.items()}
        return float(global_norm(difference) / global_norm(self.gradients).clamp_min(1e-30))

    def to(self, device: torch.device | str) -> Observation:
        """Return the observation on another device."""

        def move(tensors: Tensors) -> dict[str, Tensor]:
            return {name: t.to(device) for name, t in tensors.items()}

        return replace(
            self,
            gradients=move(self.gradients),
            parameters=move(self.parameters),
            buffers=move(self.buffers),
            buffers_after=None if self.buffers_after is None else move(self.buffers_after),
            labels=None if self.labels is None else self.labels.to(device),
            public_images=None if self.public_images is None else self.public_images.to(device),
            protocol=self.protocol.to(device),
            computed_on=self.computed_on or self.device.type,
        )

    @property
    def was_computed_on_other_device(self) -> bool:
        """Whether the gradient was computed on another kind of device, whose arithmetic rounds differently."""
        return self.computed_on not in ("", self.device.type)

    def _generator(self, rng_state: Tensor | None, number: int) -> torch.Generator:
        # One fixed draw per micro-batch: the objective of an attack must not change between evaluations.
        generator = torch.Generator(device=self.device)
        if rng_state is not None and self.device.type == "cpu":
            generator.set_state(rng_state)
        else:
            generator.manual_seed(number)
        return generator


def _with_gradients(calls: list[LayerCall], loss: Tensor, outputs: list[Tensor]) -> list[LayerCall]:
    """Return the calls with the gradient of a loss at their outputs: 0 where the loss does not depend on them."""
    tracked = [output for output in outputs if output.requires_grad]  # frozen layers come before all that is trained
    found = iter(torch.autograd.grad(loss, tracked, allow_unused=True, materialize_grads=True) if tracked else ())
    at_outputs = [next(found) if output.requires_grad else torch.zeros_like(output) for output in outputs]
    return [replace(call, outputs_gradient=g) for call, g in zip(calls, at_outputs, strict=True)]

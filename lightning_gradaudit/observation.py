"""Everything the adversary holds. Nothing else reaches an `Attack`: the threat model is a type."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

import torch
from torch import Tensor, nn

from lightning_gradaudit.client import Client
from lightning_gradaudit.defences import Defence, Tensors, global_norm
from lightning_gradaudit.errors import InvalidInputError

View = Literal["local", "step", "reduced", "update", "delta"]


@dataclass(frozen=True, kw_only=True)
class ThreatModel:
    """Who sees what. The batch size, the architecture, the weights and the train/eval mode are always known.

    Attributes:
        view: Which gradient the adversary holds. "local": of one rank and one micro-batch, before any reduction,
            accumulation or clipping (what a FedSGD client sends).
        labels_known: Whether the labels are given. Otherwise attacks must recover them.
        dropout_known: Whether the adversary can repeat the random numbers of the forward pass (a shared seed).
            True is the stronger adversary, hence the default.
        precision: Arithmetic of the training step, by Lightning's name.
        defences: What the client does to the gradient before it leaves; the adversary knows kind and strength.
    """

    view: View = "local"
    labels_known: bool = False
    dropout_known: bool = True
    precision: str = "32-true"
    defences: tuple[Defence, ...] = ()

    def to_dict(self) -> dict[str, object]:
        """Return plain JSON."""
        return {
            "view": self.view,
            "labels_known": self.labels_known,
            "dropout_known": self.dropout_known,
            "precision": self.precision,
            "defences": [repr(defence) for defence in self.defences],
        }


@dataclass(frozen=True)
class Normalization:
    """The public affine map between pixels in [0, 1] and the model's input space, per channel.

    Attributes:
        mean, std: One value per channel, or a single one for all; `input = (pixel - mean) / std`.
    """

    mean: tuple[float, ...] = (0.0,)
    std: tuple[float, ...] = (1.0,)

    @classmethod
    def of(cls, mean: float | Sequence[float] | None, std: float | Sequence[float] | None) -> Normalization:
        """Build from what users write: a number, a sequence, or None for the identity."""
        return cls(_floats(mean, 0.0), _floats(std, 1.0))

    def __post_init__(self) -> None:
        if any(not s > 0 for s in self.std):
            raise InvalidInputError(f"std: every channel's standard deviation must be > 0, got {self.std}.")

    def to_pixels(self, inputs: Tensor) -> Tensor:
        """Map model inputs (..., C, H, W) to pixels, without clipping."""
        return inputs * self._column(self.std, inputs) + self._column(self.mean, inputs)

    def from_pixels(self, pixels: Tensor) -> Tensor:
        """Map pixels (..., C, H, W) to model inputs."""
        return (pixels - self._column(self.mean, pixels)) / self._column(self.std, pixels)

    @staticmethod
    def _column(values: tuple[float, ...], like: Tensor) -> Tensor:
        channels = like.shape[-3]
        if len(values) not in (1, channels):
            raise InvalidInputError(
                f"mean/std: expected 1 or {channels} values (the images have {channels} channels), got {len(values)}."
            )
        return torch.tensor(values, dtype=like.dtype, device=like.device).reshape(-1, 1, 1)


def _floats(value: float | Sequence[float] | Tensor | None, default: float) -> tuple[float, ...]:
    if value is None:
        return (default,)
    return tuple(torch.as_tensor(value, dtype=torch.float64).reshape(-1).tolist())


@dataclass(frozen=True)
class LayerCall:
    """One call of a layer during a simulated forward pass.

    Attributes:
        name: The module's name; its parameters are `name.weight` and `name.bias`.
        inputs, outputs: What went in and came out, detached.
        outputs_gradient: Gradient of the loss with respect to `outputs`, when asked for.
    """

    name: str
    module: nn.Module
    inputs: Tensor
    outputs: Tensor
    outputs_gradient: Tensor | None = None

    @property
    def weight(self) -> str:
        """Name of the weight parameter."""
        return f"{self.name}.weight" if self.name else "weight"

    @property
    def bias(self) -> str:
        """Name of the bias parameter, whether or not the layer has one."""
        return f"{self.name}.bias" if self.name else "bias"


@dataclass(frozen=True, kw_only=True, eq=False)
class Observation:
    """What an honest-but-curious adversary holds about one training step, and a way to try candidates.

    Attributes:
        gradients: What was shared, after the client's defences, keyed by parameter name.
        parameters: All weights the gradient was taken at, frozen ones included.
        buffers: Buffers before the forward pass.
        threat_model: Who sees what.
        input_shape: (C, H, W).
        batch_size: Number of images behind the gradient.
        normalization: Map between pixels and model inputs.
        label_shape: Shape of one sample's label: () for class indices.
        label_dtype: Integer for class indices.
        labels: (B, ...) when the threat model gives them away, else None.
        client: The training step as a pure function.
        rng_state: Random state before the forward pass, when the threat model gives it away, else None.
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
    client: Client = field(repr=False)
    rng_state: Tensor | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        missing = [name for name in self.gradients if name not in self.parameters]
        if missing or not self.gradients:
            raise InvalidInputError(
                f"gradients: every key must name a parameter; unknown: {missing[:3]}, given: {len(self.gradients)}."
            )

    @property
    def device(self) -> torch.device:
        """Where the tensors lie."""
        return next(iter(self.gradients.values())).device

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of a candidate batch, (B, C, H, W)."""
        return (self.batch_size, *self.input_shape)

    @property
    def box(self) -> tuple[Tensor, Tensor]:
        """Smallest and largest model input a pixel in [0, 1] can give, each (C, 1, 1)."""
        zeros = torch.zeros((self.input_shape[0], 1, 1), device=self.device)
        return self.normalization.from_pixels(zeros), self.normalization.from_pixels(zeros + 1)

    def leaves(self) -> dict[str, Tensor]:
        """Return the observed weights as fresh leaves; those with a shared gradient require one."""
        return {name: p.detach().requires_grad_(name in self.gradients) for name, p in self.parameters.items()}

    def loss(self, inputs: Tensor, labels: Tensor, leaves: Tensors | None = None) -> Tensor:
        """Return the client's training loss on candidate data, a scalar."""
        weights = self.leaves() if leaves is None else leaves
        with torch.enable_grad():
            # A copy: training steps may work in place on their batch.
            images = inputs.to(self.input_dtype, copy=True)
            return self.client.forward(weights, self.buffers, images, labels, self._generator())

    def simulate(self, inputs: Tensor, labels: Tensor, leaves: Tensors | None = None) -> dict[str, Tensor]:
        """Return the gradient the client would have taken on candidate data, before random defences.

        Differentiable in `inputs` (and in soft `labels`) when they require a gradient.

        Args:
            inputs: (B, C, H, W) in the model's input space.
            labels: (B,) class indices, or (B, classes) probabilities where the loss accepts them.
            leaves: The result of `leaves()`, to build it once for many calls.

        Returns:
            Keyed and shaped as `gradients`; zero for weights that the loss does not reach.
        """
        weights = self.leaves() if leaves is None else leaves
        loss = self.loss(inputs, labels, weights)
        wanted = [weights[name] for name in self.gradients]
        gradients = torch.autograd.grad(
            loss,
            wanted,
            create_graph=inputs.requires_grad or labels.requires_grad,
            allow_unused=True,
            materialize_grads=True,
        )
        return dict(zip(self.gradients, gradients, strict=True))

    def trace(self, inputs: Tensor, labels: Tensor, *, gradients: bool = False) -> list[LayerCall]:
        """Run one simulated forward pass and report every linear layer in the order of execution.

        Args:
            gradients: Also return the gradient of the loss with respect to each layer's output.
        """
        calls: list[LayerCall] = []
        outputs: list[Tensor] = []

        def record(name: str, module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
            calls.append(LayerCall(name, module, args[0].detach(), output.detach()))
            outputs.append(output)

        with self.client.lock:  # the hooks are on the shared replica
            linear = [(n, m) for n, m in self.client.module.named_modules() if isinstance(m, nn.Linear)]
            handles = [m.register_forward_hook(lambda m, a, o, n=n: record(n, m, a, o)) for n, m in linear]
            try:
                loss = self.loss(inputs, labels)
            finally:
                for handle in handles:
                    handle.remove()
        if not gradients or not calls:
            return calls
        at_outputs = torch.autograd.grad(loss, outputs, allow_unused=True, materialize_grads=True)
        return [replace(call, outputs_gradient=g) for call, g in zip(calls, at_outputs, strict=True)]

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
            labels=None if self.labels is None else self.labels.to(device),
        )

    def _generator(self) -> torch.Generator:
        # One fixed draw per observation: the objective an attack minimises must not move under it.
        generator = torch.Generator(device=self.device)
        if self.rng_state is not None and self.device.type == "cpu":
            generator.set_state(self.rng_state)
        else:
            generator.manual_seed(0)
        return generator

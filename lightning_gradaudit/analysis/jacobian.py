"""Products with J = ∂g/∂x, the derivative of a training gradient by the images behind it, without J itself.

The loss is differentiated once by weights and images together. As J = ∂²ℓ/∂θ∂x, its products are first derivatives
of what that pass left: Jᵀu = ∇_x⟨∇_θℓ, u⟩ and Jv = ∇_θ⟨∇_xℓ, v⟩ (Pearlmutter, 1994).
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from lightning_gradaudit.analysis.image_covariance import Prior
from lightning_gradaudit.analysis.spectrum import LinearMap, rademacher
from lightning_gradaudit.attacks.base import check_second_derivatives, input_gradient
from lightning_gradaudit.errors import InvalidInputError, UnsupportedError
from lightning_gradaudit.simulation.normalization import Normalization
from lightning_gradaudit.simulation.observation import Observation
from lightning_gradaudit.utils.tensors import Tensors
from lightning_gradaudit.utils.time_limit import require_time

LOCAL = "local: the gradient is linearised at the true images; labels and mode are known to the attacker"
AGREEMENT = 1e-2
"""Largest relative difference of two ways to the same number that is rounding."""


class Jacobian(LinearMap):
    """J of a whole batch, (p, B·C·H·W): rows are the shared gradient's coordinates in the order of its tensors.

    Train-mode BatchNorm couples the images of a batch, so all of them are columns of one matrix. Mode, dropout mask
    and loss are the observation's. Images are in the model's input space, labels are taken as known. Piecewise linear
    networks (ReLU) have J only inside a linear region, which is where a batch lies almost surely.

    Args:
        observation: Weights, buffers and training step.
        inputs: (B, C, H, W), floating point, where J is taken.
        labels: As the training step gets them.
        tensors: Names of the gradient tensors to keep, in the order of the observation; None: all that are shared.
        double: Compute in float64, whatever the model's precision.

    Attributes:
        names: The tensors kept.
        gradient: (p,) their gradient at `inputs`, flat.
        products: Products computed so far.
        note: What was changed for the analysis ("" for nothing): bfloat16 and float16 models are analysed in float32.

    Raises:
        InvalidInputError: When images are not floating point or a name is unknown.
        DoubleBackwardError: When the model has an operation without a second derivative.
        UnsupportedError: When what is shared is not the gradient of one loss (several local steps).
    """

    def __init__(
        self,
        observation: Observation,
        inputs: Tensor,
        labels: Tensor,
        *,
        tensors: Sequence[str] | None = None,
        double: bool = False,
    ) -> None:
        if not inputs.is_floating_point():
            raise InvalidInputError(
                f"inputs: expected floating-point images (their derivative is asked for), got {inputs.dtype}. "
                "Convert them with x.float() / 255."
            )
        unknown = [name for name in tensors or () if name not in observation.gradients]
        if unknown:
            raise InvalidInputError(
                f"tensors: {unknown[:3]} have no shared gradient; known: use observation.gradients."
            )
        exact, self.note = in_full_precision(observation, double=double)
        self.names = tuple(n for n in exact.gradients if tensors is None or n in tensors)
        self.dtype, self.device = exact.input_dtype, inputs.device
        self._shape = inputs.shape
        self._exact = exact
        labels = labels.to(self.dtype) if labels.is_floating_point() else labels
        self._labels = labels
        leaves = exact.leaves()
        self._inputs = inputs.detach().to(self.dtype).requires_grad_(True)
        self._weights = [leaves[name] for name in self.names]
        loss = exact.loss(self._inputs, labels, leaves)
        self._by_inputs, *by_weights = torch.autograd.grad(
            loss, [self._inputs, *self._weights], create_graph=True, allow_unused=True, materialize_grads=True
        )
        check_second_derivatives(dict(zip(self.names, by_weights, strict=True)))
        self._by_weights = by_weights
        self.gradient = _flat(by_weights).detach()
        self.rows, self.columns = self.gradient.numel(), inputs.numel()
        self.products = 0
        self._require_gradient_of_loss()

    @property
    def batch_size(self) -> int:
        """Number of images."""
        return self._shape[0]

    def gradient_at(self, images: Tensor) -> Tensor:
        """Return the gradient (p,) of other images (B, C, H, W) with the same labels, in the same precision."""
        require_time()
        with torch.no_grad():
            simulated = self._exact.simulate(images.to(self.dtype), self._labels)
        return _flat([simulated[name] for name in self.names]).detach()

    def matvec(self, v: Tensor) -> Tensor:
        require_time()
        self.products += 1
        along = v.reshape(self._shape).to(self.dtype)
        return _flat(input_gradient([self._by_inputs], self._weights, [along], keep=True))

    def rmatvec(self, u: Tensor) -> Tensor:
        require_time()
        self.products += 1
        parts = u.to(self.dtype).split([w.numel() for w in self._weights])
        along = [part.reshape(g.shape) for g, part in zip(self._by_weights, parts, strict=True)]
        return _flat(input_gradient(self._by_weights, [self._inputs], along, keep=True))

    def split(self, u: Tensor) -> dict[str, Tensor]:
        """Cut a row vector (p,) into the parts of its tensors, flat."""
        return dict(zip(self.names, u.split([w.numel() for w in self._weights]), strict=True))

    def check_adjoint(self, generator: torch.Generator) -> None:
        """Show with two products that both directions describe one matrix.

        They do not where a hand-written backward pass is not the derivative of any function, and every number would
        then be wrong.

        Raises:
            UnsupportedError: When they disagree.
        """
        v = rademacher(self, generator)
        image = self.matvec(v)
        left, right = float(image.double() @ image.double()), float(self.rmatvec(image).double() @ v.double())
        if abs(left - right) > AGREEMENT * max(abs(left), abs(right)):
            raise UnsupportedError(
                f"The model's second derivatives are not symmetric ({left:.3e} against {right:.3e}): some operation's "
                "hand-written backward pass is no function's derivative, so the gradient has no Jacobian. Audit with "
                "analysis=False."
            )

    def _require_gradient_of_loss(self) -> None:
        shared = self.gradient_at(self._inputs.detach())
        if float((shared - self.gradient).norm()) > AGREEMENT * max(float(shared.norm()), 1e-30):
            raise UnsupportedError(
                "What is shared here is not the gradient of one training loss (several local steps?), so its Jacobian "
                "is not implemented. Audit with analysis=False."
            )


class InPixels(LinearMap):
    """A = J S: the Jacobian by images in pixels, [0, 1], in units in which the prior is white.

    With Σ = S Sᵀ the prior's covariance, tr(S h(AᵀA) Sᵀ) sums over what the gradient resolves, weighted by how much
    images vary there.

    Args:
        jacobian: By images in the model's input space.
        normalization: Of that space.
        prior: Of the pixels; None: S is the identity.
    """

    def __init__(
        self, jacobian: LinearMap, shape: torch.Size, normalization: Normalization, prior: Prior | None
    ) -> None:
        self._jacobian, self._shape, self._prior = jacobian, shape, prior
        self.rows, self.columns = jacobian.rows, jacobian.columns
        self.dtype, self.device = jacobian.dtype, jacobian.device
        ones = torch.ones(shape[-3:], dtype=self.dtype, device=self.device)
        self._scale = normalization.from_pixels(ones) - normalization.from_pixels(torch.zeros_like(ones))

    def matvec(self, v: Tensor) -> Tensor:
        return self._jacobian.matvec((self.root(v).reshape(self._shape) * self._scale).reshape(-1))

    def rmatvec(self, u: Tensor) -> Tensor:
        return self.root((self._jacobian.rmatvec(u).reshape(self._shape) * self._scale).reshape(-1))

    def root(self, v: Tensor) -> Tensor:
        """Apply S, flat."""
        return v if self._prior is None else self._prior.root(v.reshape(self._shape)).reshape(-1)


def in_full_precision(observation: Observation, *, double: bool = False) -> tuple[Observation, str]:
    """Return the observation in float32 or better and without autocast, and what had to be changed for it."""
    first = next(iter(observation.parameters.values())).dtype
    dtype = torch.float64 if double else torch.promote_types(first, torch.float32)
    mixed = observation.client.precision.endswith("-mixed")

    def cast(tensors: Tensors) -> dict[str, Tensor]:
        return {name: t.to(dtype) if t.is_floating_point() else t for name, t in tensors.items()}

    client = copy.copy(observation.client)
    client.lock = observation.client.lock  # both use one replica
    client.precision = "32-true"
    exact = replace(
        observation,
        gradients=cast(observation.gradients),
        parameters=cast(observation.parameters),
        buffers=cast(observation.buffers),
        input_dtype=dtype,
        client=client,
    )
    reduced = mixed or torch.finfo(first).bits < 32
    was = observation.client.precision if mixed else str(first).removeprefix("torch.")
    return exact, f"trained in {was}, analysed in {str(dtype).removeprefix('torch.')}" if reduced else ""


def _flat(tensors: Sequence[Tensor]) -> Tensor:
    return torch.cat([t.reshape(-1) for t in tensors])

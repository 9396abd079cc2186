"""Signs of leakage that are read off a gradient and a forward pass, without any derivative of the gradient."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from lightning_gradaudit.defences import Tensors
from lightning_gradaudit.errors import UnsupportedError
from lightning_gradaudit.observation import Observation
from lightning_gradaudit.snapshot import Snapshot

_ACTIVE = 1e-7
_RANK = 1e-5


def numerical_ranks(gradients: Tensors, *, tolerance: float = _RANK) -> dict[str, int]:
    """Return the rank of every matrix among the gradients, to compare with the batch size.

    The gradient of a linear layer is a sum of one outer product for each sample (and position): its rank is at most
    that number, and where it is smaller than both sides of the matrix the layer's inputs lie in a known subspace,
    from which exact inversions start (arXiv:2403.03945).

    Args:
        tolerance: Singular values below this share of the largest count as 0.
    """
    ranks = {}
    for name, gradient in gradients.items():
        if gradient.ndim == 2:
            singular = torch.linalg.svdvals(gradient.double())
            ranks[name] = int((singular > tolerance * singular[0]).sum()) if float(singular[0]) > 0 else 0
    return ranks


def sole_activation_shares(snapshot: Snapshot) -> dict[str, float]:
    """Return for every linear layer the share of images that activate one of its rows alone.

    Such a row of the gradient is that image's input to the layer, times a number (`attacks.linear`). Layers over
    token sequences, and layers that run several times, are left out. The truth is used; noise is not looked at.
    """
    calls = snapshot.observation.trace(snapshot.truth.inputs, snapshot.truth.labels, gradients=True)
    names = [call.name for call in calls]
    shares = {}
    for call in calls:
        assert call.outputs_gradient is not None
        if call.outputs_gradient.ndim == 2 and names.count(call.name) == 1:
            size = call.outputs_gradient.abs()
            active = size > _ACTIVE * size.max()
            sole = active & (active.sum(0) == 1)
            shares[call.name] = float(sole.any(1).float().mean())
    return shares


def d_snr(snapshot: Snapshot) -> float:
    """Return max over tensors and images of ‖g_i‖ / Σ_{j≠i}‖g_j‖, how far one image drowns the others.

    A disaggregation signal-to-noise ratio: large values are a sign of a manipulated model; some attacks evade it
    (Garov et al., arXiv:2306.03013). Infinite for a batch of one, whose gradient is one image's. Costs a simulated
    gradient for each image.

    Raises:
        UnsupportedError: When BatchNorm in train mode couples the images, so that none has a gradient of its own.
    """
    observation, truth = snapshot.observation, snapshot.truth
    if any(isinstance(m, nn.modules.batchnorm._BatchNorm) and m.training for m in observation.client.module.modules()):
        raise UnsupportedError("d_snr: BatchNorm in train mode couples the images; audit with mode='eval'.")
    leaves = observation.leaves()
    norms = _norms(observation, truth.inputs, truth.labels, leaves)
    rest = norms.sum(0, keepdim=True) - norms
    return float(torch.where(norms > 0, norms / rest.clamp_min(0.0), torch.zeros_like(norms)).max())


def _norms(observation: Observation, inputs: Tensor, labels: Tensor, leaves: dict[str, Tensor]) -> Tensor:
    """Return ‖g_i‖ of every image and tensor, (B, tensors)."""
    rows = []
    for x, y in zip(inputs.split(1), labels.split(1), strict=True):
        gradients = observation.simulate(x, y, leaves)
        rows.append(torch.stack([g.double().norm() for g in gradients.values()]))
    return torch.stack(rows)


def transmit_snr(module: nn.Module, parameters: Tensors) -> float:
    """Return the largest max|w| / (Σ|w| - max|w|) over the kernels of the first convolution, >= 0; NaN without one.

    Near infinity a kernel copies one pixel through, which no training makes (arXiv:2306.03013): a sign of a model that
    was built to leak.
    """
    for name, layer in module.named_modules():
        if isinstance(layer, (nn.Conv1d, nn.Conv2d, nn.Conv3d)):
            weight = parameters[f"{name}.weight" if name else "weight"].double().abs().flatten(1)
            top = weight.max(1).values
            return float((top / (weight.sum(1) - top).clamp_min(1e-30)).max())
    return float("nan")

"""Structural certificates: layers that give images away by algebra alone."""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_gradaudit.attacks.linear import image_layers
from lightning_gradaudit.metrics.functional.similarity import psnr
from lightning_gradaudit.snapshot import Snapshot

CERTIFIED_PSNR = 30.0
"""dB from which an algebraically recovered image counts as given away."""
_ACTIVE = 1e-7


def exact_leaks(snapshot: Snapshot, *, generator: torch.Generator) -> Tensor:
    """Tell which images a linear layer fed by the image gives away exactly in the shared gradient.

    A row of such a layer that one image alone activates holds that image (see `attacks.linear`). Here the truth
    says which rows those are, and the *shared* gradient must really give the image back (PSNR >= 30 dB), so noise
    and other defences count. This is the auditor's instrument, not an attack: it shows what is there even when
    every attack fails.

    Returns:
        (B,) True where an exact leak exists.
    """
    observation = snapshot.observation
    leaks = torch.zeros(observation.batch_size, dtype=torch.bool)
    layers = image_layers(observation, generator)
    if not layers:
        return leaks
    calls = observation.trace(snapshot.truth.inputs, snapshot.truth.labels, gradients=True)
    for layer in layers:
        call = next(call for call in calls if call.name == layer.name)
        assert call.outputs_gradient is not None
        active = call.outputs_gradient.abs() > _ACTIVE * call.outputs_gradient.abs().max()
        sole = active & (active.sum(0) == 1)
        weight = observation.gradients[layer.weight].float()
        # Without a bias the rows still hold the images up to factors, which the truth supplies here.
        delta = call.outputs_gradient.float() if layer.bias is None else observation.gradients[layer.bias].float()
        energy = (sole * delta**2).sum(1)
        ratio = (sole * delta) @ weight / energy.clamp_min(1e-30)[:, None]
        pixels = observation.normalization.to_pixels(layer.image(ratio, observation)).clamp(0, 1)
        recovered = psnr(pixels, snapshot.truth_pixels) >= CERTIFIED_PSNR
        leaks |= (recovered & (energy > 0)).cpu()
    return leaks

"""Structural certificates: layers whose gradient holds images exactly, so that closed forms recover them."""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_gradaudit.attacks.closed_form.image_layer import ImageLayer, image_layers
from lightning_gradaudit.attacks.closed_form.patch_embedding import choose_embedding, patch_layers, solve
from lightning_gradaudit.metrics.functional.similarity import psnr
from lightning_gradaudit.simulation.snapshot import Snapshot

CERTIFIED_PSNR = 30.0
"""dB from which an image that a closed form recovers counts as given away."""
ACTIVE_SHARE = 1e-7
"""Gradient of a unit, relative to the largest, from which the image activates it."""


def exact_leaks(snapshot: Snapshot, *, generator: torch.Generator) -> Tensor:
    """Tell which images a layer fed by the image gives away exactly in the shared gradient.

    A row of a linear layer that one image alone activates holds that image (see `attacks.LinearLayerInversion`); the
    truth says which rows those are. The embedding of patches and its positions hold the only image of a batch of one
    (see `attacks.PatchEmbeddingInversion`). The *shared* gradient must really give the image back (PSNR >= 30 dB), so
    noise and other defences count. It uses the truth, so it is no attack: it shows what is there even when every
    attack fails.

    Returns:
        (B,) True where an exact leak exists.
    """
    observation = snapshot.observation
    leaks = torch.zeros(observation.batch_size, dtype=torch.bool)
    if layers := image_layers(observation, generator):
        calls = observation.trace(snapshot.truth.inputs, snapshot.truth.labels, gradients=True)
        for layer in layers:
            call = next(call for call in calls if call.name == layer.name)
            assert call.outputs_gradient is not None
            leaks |= _sole_rows(snapshot, layer, call.outputs_gradient)
    if observation.batch_size == 1:
        leaks |= _patches(snapshot, generator)
    return leaks


def _sole_rows(snapshot: Snapshot, layer: ImageLayer, outputs_gradient: Tensor) -> Tensor:
    """Return (B,) whether rows that an image alone activates hold a copy of it."""
    observation = snapshot.observation
    active = outputs_gradient.abs() > ACTIVE_SHARE * outputs_gradient.abs().max()
    sole = active & (active.sum(0) == 1)
    weight = observation.gradients[layer.weight].float()
    # Without a bias the rows still hold the images up to factors, which the truth supplies here.
    delta = outputs_gradient.float() if layer.bias is None else observation.gradients[layer.bias].float()
    energy = (sole * delta**2).sum(1)
    ratio = (sole * delta) @ weight / energy.clamp_min(1e-30)[:, None]
    return _copied(snapshot, layer.image(ratio, observation)) & (energy > 0).cpu()


def _patches(snapshot: Snapshot, generator: torch.Generator) -> Tensor:
    """Return (1,) whether the gradients of patch embedding and positions hold a copy of the only image."""
    layers = patch_layers(snapshot.observation, generator)
    embedding = choose_embedding(layers, snapshot.observation, generator) if layers else None
    if embedding is None:
        return torch.tensor([False])
    return _copied(snapshot, solve(embedding, snapshot.observation).image)


def _copied(snapshot: Snapshot, images: Tensor) -> Tensor:
    pixels = snapshot.observation.normalization.to_pixels(images).clamp(0, 1)
    return (psnr(pixels, snapshot.truth_pixels) >= CERTIFIED_PSNR).cpu()

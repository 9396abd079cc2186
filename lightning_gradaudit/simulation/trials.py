"""Trials of a training step: which images it uses, how it converts integers, which optimizer sees images."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from copy import copy
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from lightning_gradaudit.errors import UnsupportedError
from lightning_gradaudit.simulation.batch import Batch, BatchLayout, ImageUse, SampleId
from lightning_gradaudit.simulation.batch_entries import Path, name_of
from lightning_gradaudit.simulation.training_step import TrainingStep
from lightning_gradaudit.utils.tensors import Tensors

log = logging.getLogger(__name__)

SAME_GRADIENT = 1e-2
"""Largest relative difference of two gradients of one step that is rounding, in reduced precision too."""


def find_image_use(
    batch: Any,
    sample_id: SampleId | None,
    make_step: Callable[[BatchLayout, Batch], TrainingStep],
    parameters: Tensors,
    buffers: Tensors,
) -> ImageUse:
    """Try a training step on a batch where it matters: with integer images, and with several entries of images.

    Weights, buffers, the batch and random states stay as they are.

    Args:
        batch, sample_id: See `BatchLayout.of`.
        make_step: Makes the step for a layout and the batch in it.
        parameters, buffers: By name.

    Raises:
        InvalidInputError: When no images are found in the batch.
        ReplayError: When the step cannot be replayed.
    """
    layout = BatchLayout.of(batch, sample_id)
    is_integer = not layout.images[0].dtype.is_floating_point
    if not is_integer and (len(layout.images) == 1 or layout.views == 1):
        return ImageUse()
    truth = layout.split(batch).copy()
    step, use = make_step(layout, truth), ImageUse()
    if is_integer:
        use = _find_divisor(step, parameters, buffers, truth)
        if use.refusal:
            return use
        step = _with_divisor(step, use.divisor)
    return replace(use, unused=frozenset(_unused_images(step, parameters, buffers, truth)))


def find_optimizer(
    module: nn.Module, optimizers: Sequence[torch.optim.Optimizer], steps: Sequence[TrainingStep], batch: Batch
) -> int:
    """Return the index of the first optimizer whose gradient depends on the images; a generator's gradient does not.

    Args:
        module: With manual optimization.
        optimizers: Of the module.
        steps: The training step up to the step of each optimizer.
        batch: To try them on.

    Raises:
        UnsupportedError: When there is none.
    """
    buffers = {name: buffer.detach() for name, buffer in module.named_buffers()}
    found = []
    for index, (optimizer, step) in enumerate(zip(optimizers, steps, strict=True)):
        own = {id(p) for group in optimizer.param_groups for p in group["params"]}
        weights = {n: p.detach().clone().requires_grad_(id(p) in own) for n, p in module.named_parameters()}
        if _depends_on_images(step, weights, buffers, batch):
            found.append(index)
    if not found:
        raise UnsupportedError("optimizer: no optimizer's gradient depends on the images; there is nothing to audit.")
    if len(found) > 1:
        log.warning(
            "GradAudit: the gradients of optimizers %s depend on the images; auditing %d. Add a "
            "GradAudit(threat_model=ThreatModel(optimizer=...), name=...) for each of the others.",
            found,
            found[0],
        )
    return found[0]


def _depends_on_images(step: TrainingStep, weights: Tensors, buffers: Tensors, batch: Batch) -> bool:
    inputs = batch.inputs.detach().clone().requires_grad_(True)
    with torch.enable_grad():
        loss = _loss(step, weights, buffers, batch, inputs)
        wanted = [w for w in weights.values() if w.requires_grad]
        gradients = torch.autograd.grad(loss, wanted, create_graph=True, allow_unused=True, materialize_grads=True)
        total = torch.stack([(g**2).sum() for g in gradients]).sum()
        if not total.requires_grad:
            return False
        sensitivity = torch.autograd.grad(total, inputs, allow_unused=True)[0]
    return sensitivity is not None and bool(sensitivity.any())


def _find_divisor(step: TrainingStep, parameters: Tensors, buffers: Tensors, batch: Batch) -> ImageUse:
    """Return which floating-point numbers give the gradient that the integer images give.

    Steps convert integers with or without scaling them to [0, 1], some only where they find integers. Gradients are
    compared, for the loss of an untrained head may not depend on its images.
    """
    entry = step.layout.images[0]
    try:
        wanted = _gradient(_with_divisor(step, None), parameters, buffers, batch)
    except Exception:  # a model may refuse integers, with any error: what it can be given is floats
        _gradient(_with_divisor(step, 1.0), parameters, buffers, batch)
        return ImageUse(divisor=1.0)
    largest = float(torch.iinfo(entry.dtype).max)
    errors = {}
    for divisor in dict.fromkeys((1.0, largest, 255.0)):
        try:
            found = _gradient(_with_divisor(step, divisor), parameters, buffers, batch)
        except Exception:  # noqa: S112 - a step may refuse floating-point numbers, with any error
            continue
        errors[divisor] = float((found - wanted).norm() / wanted.norm().clamp_min(1e-30))
    if not torch.isfinite(wanted).all():  # nothing can be compared, and the audit says so
        return ImageUse()
    best = min(errors, key=errors.__getitem__, default=None)
    if best is not None and errors[best] <= SAME_GRADIENT:
        return ImageUse(divisor=best)
    return ImageUse(
        refusal=f"batch: expected floating-point images, got {entry.dtype} in {name_of(entry.path)}, on which the "
        f"training step computes something else than on the same numbers as floats in [0, {largest:.0f}] or [0, 1], so "
        "that no attack can search for them. Convert them to floats in the data set or in on_after_batch_transfer."
    )


def _with_divisor(step: TrainingStep, divisor: float | None) -> TrainingStep:
    other = copy(step)
    images = tuple(replace(entry, divisor=divisor) for entry in step.layout.images)
    other.layout = replace(step.layout, images=images)
    return other


def _gradient(step: TrainingStep, parameters: Tensors, buffers: Tensors, batch: Batch) -> Tensor:
    """Return the gradient at a batch as one vector."""
    weights = _copies(parameters)
    trained = [w for w in weights.values() if w.requires_grad]
    with torch.enable_grad():
        loss = _loss(step, weights, buffers, batch, batch.inputs)
        gradients = torch.autograd.grad(loss, trained, allow_unused=True, materialize_grads=True)
    return torch.cat([g.flatten().float() for g in gradients])


def _unused_images(step: TrainingStep, parameters: Tensors, buffers: Tensors, batch: Batch) -> set[Path]:
    """Return the entries with images that the training loss does not depend on."""
    entries = step.layout.images
    if len(entries) == 1 or step.layout.views == 1:
        return set()

    def loss(inputs: Tensor) -> Tensor:
        return _loss(step, _copies(parameters), buffers, batch, inputs).detach()

    before, unused = loss(batch.inputs), set()
    samples = len(batch.inputs) // step.layout.views
    parts = batch.inputs.split([entry.views * samples for entry in entries])
    for at, entry in enumerate(entries):
        changed = [part.flip(-1) * 0.5 if number == at else part for number, part in enumerate(parts)]
        if torch.equal(loss(torch.cat(changed)), before):
            unused.add(entry.path)
    return unused if len(unused) < len(entries) else set()


def _copies(parameters: Tensors) -> dict[str, Tensor]:
    """Return copies of weights, which the step may change."""
    return {name: w.detach().clone().requires_grad_(w.requires_grad) for name, w in parameters.items()}


def _loss(step: TrainingStep, weights: Tensors, buffers: Tensors, batch: Batch, inputs: Tensor) -> Tensor:
    moved = {name: buffer.clone() for name, buffer in buffers.items()}
    generator = torch.Generator(device=inputs.device).manual_seed(0)
    return step.forward(weights, moved, inputs / step.unit, batch.labels, generator, other=batch.other)

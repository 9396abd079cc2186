"""What linear layers inside a network reveal of their inputs: features, not images.

The algebra is that of a layer fed by the image (`linear_layer`). Features are exposed even where no image can be
rebuilt from them; they serve membership and attribute inference, and regularize an inversion.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from lightning_gradaudit.attacks.closed_form.image_layer import image_layers
from lightning_gradaudit.attacks.closed_form.row_space import RANK_ONE_MISFIT, divide_by_bias
from lightning_gradaudit.attacks.grouping import agreeing_groups
from lightning_gradaudit.attacks.labels.head import placeholder_labels
from lightning_gradaudit.attacks.labels.recovery import noise_images
from lightning_gradaudit.simulation.observation import Observation

RECOVERED = 1e-2
"""Relative error below which a feature vector counts as recovered."""


@dataclass(frozen=True)
class FeatureSettings:
    """Settings of `recover_features` for batches."""

    compared_rows: int = 512  # those with the largest bias gradient
    least_relative_bias: float = 1e-6  # of a row's bias gradient, relative to the largest
    same_vector_distance: float = 1e-4  # relative to the median distance between rows


SETTINGS = FeatureSettings()


def recover_features(observation: Observation, *, generator: torch.Generator) -> dict[str, Tensor]:
    """Recover the inputs of linear layers inside the network from the shared gradient, exact ones only.

    One image: division by the bias gradient. A batch: rows that one image alone activates, which agree on the same
    quotient. Rows agree on mixtures too where all images excite the units in the same proportion: layers in front of
    two classes are left out, and so is the head, in which a softmax leaves no row to one image.

    Args:
        observation: What the adversary holds.
        generator: Draws the noise images that find the layers.

    Returns:
        (K, d) by the layer's name, 0 < K <= B, in no particular order; layers that reveal nothing are absent, and so
        are layers fed by the image itself and those that see more than one vector per image.
    """
    with torch.no_grad():
        calls = observation.trace(noise_images(observation, generator), placeholder_labels(observation))
    names = [call.name for call in calls]
    skipped = {layer.name for layer in image_layers(observation, generator)}
    outputs = calls[-1].outputs.shape[-1] if calls else 0
    gradients, found = observation.gradients, {}
    for call in calls:
        once = call.inputs.ndim == 2 and len(call.inputs) == observation.batch_size and names.count(call.name) == 1
        if not once or call.name in skipped or call.weight not in gradients or call.bias not in gradients:
            continue
        weight, bias = gradients[call.weight].float(), gradients[call.bias].float()
        if observation.batch_size == 1:
            features = divide_by_bias(weight, bias)[None]
            misfit = (weight - bias[:, None] * features).norm()
            proven = bool(bias.any() and misfit < RANK_ONE_MISFIT * weight.norm())
            features = features if proven else features[:0]
        elif outputs > 2 and call is not calls[-1]:
            features = _sole_rows(weight, bias, observation.batch_size)
        else:
            continue
        if len(features):
            found[call.name] = features
    return found


def _sole_rows(weight: Tensor, bias: Tensor, size: int) -> Tensor:
    """Return the quotients (K, d) that several rows agree on, at most one for each image of the batch."""
    rows = bias.abs().topk(min(SETTINGS.compared_rows, len(bias))).indices
    rows = rows[bias[rows].abs() > SETTINGS.least_relative_bias * bias.abs().max()]
    quotients = weight[rows] / bias[rows, None]
    if not len(rows):
        return quotients
    distances = torch.cdist(quotients, quotients, compute_mode="donot_use_mm_for_euclid_dist")
    found = []
    groups = agreeing_groups(distances < SETTINGS.same_vector_distance * distances.median())
    for _, (_, members) in zip(range(size), groups, strict=False):
        weights = bias[rows].abs() * members
        found.append(weights @ quotients / weights.sum())
    return torch.stack(found) if found else quotients[:0]


def true_features(observation: Observation, inputs: Tensor, labels: Tensor) -> dict[str, Tensor]:
    """Return the true inputs of each linear layer, (B, d) by name, for the auditor, who holds the batch."""
    with torch.no_grad():
        calls = observation.trace(inputs, labels)
    return {call.name: call.inputs.float() for call in calls if call.inputs.ndim == 2}


def feature_errors(recovered: Tensor, truth: Tensor) -> Tensor:
    """Return the relative error of each true vector's recovered counterpart, one to one.

    Args:
        recovered: (K, d) in any order.
        truth: (B, d).

    Returns:
        (B,) >= 0; infinite for those without a counterpart.
    """
    relative = torch.cdist(truth, recovered, compute_mode="donot_use_mm_for_euclid_dist")
    relative = relative / truth.norm(dim=1, keepdim=True).clamp_min(1e-30)
    own, other = linear_sum_assignment(relative.clamp_max(1e3).cpu().numpy())
    errors = torch.full((len(truth),), math.inf)
    errors[own] = relative.cpu()[own, other]
    return errors


def feature_exposure(recovered: Mapping[str, Tensor], truth: Mapping[str, Tensor]) -> dict[str, float]:
    """Return for each layer the share in [0, 1] of the batch's feature vectors recovered to `RECOVERED`."""
    return {
        name: float((feature_errors(features, truth[name]) < RECOVERED).float().mean())
        for name, features in recovered.items()
    }

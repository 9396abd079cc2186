"""What linear layers inside a network give away of their inputs: features, not images.

The algebra is that of a layer fed by the image (`attacks.linear`, `attacks.span`). Features are exposed even where no
image can be rebuilt from them; they serve membership and attribute inference, and regularize an inversion.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping

import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from lightning_gradaudit.attacks.closed_form.consecutive_layers import Chain, find_chains, shared_space, solve_chain
from lightning_gradaudit.attacks.closed_form.linear_layer import image_layers
from lightning_gradaudit.attacks.closed_form.row_space import implied_columns, zeros_agree
from lightning_gradaudit.attacks.labels.recovery import noise_images, placeholder_labels
from lightning_gradaudit.simulation.layer_trace import LayerCall
from lightning_gradaudit.simulation.observation import Observation

_RANK_ONE = 1e-3  # relative misfit of dL/dW = dL/db hᵀ up to which one feature vector is proven
_AGREE = 1e-4  # of the median distance between rows: rows that are nearer than this hold the same vector
_ROWS = 512  # rows compared pairwise, those with the largest bias gradient
_STARTS, _ROUNDS = 128, 20
RECOVERED = 1e-2
"""Relative error below which a feature vector counts as recovered."""


def recover_features(
    observation: Observation, *, generator: torch.Generator, search: bool = True, seconds: float = 10.0
) -> dict[str, Tensor]:
    """Recover the inputs of linear layers inside the network from the shared gradient, exact ones only.

    One image: division by the bias gradient. A batch: rows that one image alone activates, which agree on the same
    quotient. Rows agree on mixtures too where all images excite the units in the same proportion: layers in front of
    two classes are left out, and so is the head, in which a softmax leaves no row to one image.

    Args:
        observation: What the attacker holds.
        generator: Draws the noise images that find the layers, and the starts of a search.
        search: Also solve for whole batches where an activation alone leads to the next linear layer.
        seconds: Longest search for each layer.

    Returns:
        (K, d) by the layer's name, 0 < K <= B, in no particular order; layers that give nothing away are absent, and
        so are layers fed by the image itself and those that see more than one vector per image.
    """
    with torch.no_grad():
        calls = observation.trace(noise_images(observation, generator), placeholder_labels(observation))
    names = [call.name for call in calls]
    skipped = {layer.name for layer in image_layers(observation, generator)}
    outputs = calls[-1].outputs.shape[-1] if calls else 0
    found: dict[str, Tensor] = {}
    for call in calls:
        alone = outputs > 2 and call is not calls[-1]
        shared = call.weight in observation.gradients and call.bias in observation.gradients
        once = call.inputs.ndim == 2 and len(call.inputs) == observation.batch_size and names.count(call.name) == 1
        if not (shared and once) or call.name in skipped:
            continue
        features = call.inputs[:0]
        if search and observation.batch_size > 1:
            features = _searched(observation, call, generator, seconds)
        if not len(features):
            features = _divided(observation, call, sole_rows=alone)
        if len(features):
            found[call.name] = features
    return found


def _divided(observation: Observation, call: LayerCall, *, sole_rows: bool) -> Tensor:
    weight, bias = observation.gradients[call.weight].float(), observation.gradients[call.bias].float()
    nothing = weight[:0]
    if not float(bias.norm()) > 0:
        return nothing
    if observation.batch_size == 1:
        features = (bias @ weight / (bias @ bias))[None]
        misfit = (weight - bias[:, None] * features).norm()
        return features if bool(misfit < _RANK_ONE * weight.norm()) else nothing
    if not sole_rows:
        return nothing
    rows = bias.abs().topk(min(_ROWS, len(bias))).indices
    rows = rows[bias[rows].abs() > 1e-6 * bias.abs().max()]
    quotients = weight[rows] / bias[rows, None]
    distances = torch.cdist(quotients, quotients, compute_mode="donot_use_mm_for_euclid_dist")
    same = distances < _AGREE * distances.median()
    left = torch.ones(len(rows), dtype=torch.bool, device=rows.device)
    found: list[Tensor] = []
    while len(found) < observation.batch_size:
        sizes = (same & left).sum(1) * left
        leader = int(sizes.argmax())
        if int(sizes[leader]) < 2:  # a lone row has nothing to agree with
            break
        group = same[leader] & left
        weights = bias[rows].abs() * group
        found.append(weights @ quotients / weights.sum())
        left &= ~group
    return torch.stack(found) if found else nothing


def _searched(observation: Observation, call: LayerCall, generator: torch.Generator, seconds: float) -> Tensor:
    space = shared_space(observation, call.weight, call.bias, generator)
    if space is not None:
        for chain in find_chains(observation, call.name, space, generator):
            deadline = time.monotonic() + seconds
            inputs = solve_chain(chain, generator, starts=_STARTS, rounds=_ROUNDS, deadline=deadline)
            columns = implied_columns(space, inputs)
            if columns is not None and _switched(chain, inputs, *columns):
                return (inputs @ space.v).float()
    return call.inputs[:0]


def _switched(chain: Chain, inputs: Tensor, columns: Tensor, noise: Tensor) -> bool:
    """Tell whether D vanishes just where the inputs switch units off; smooth activations switch none."""
    z = inputs @ chain.first.v @ chain.weight.double().T + (0 if chain.bias is None else chain.bias.double())
    slopes = chain.slopes(z)[:, chain.first.rows].T
    return bool((slopes != 0).all()) or bool(zeros_agree(columns, noise, slopes)[0].all())


def true_features(observation: Observation, inputs: Tensor, labels: Tensor) -> dict[str, Tensor]:
    """Return what really goes into each linear layer, (B, d) by name: for the scorer, who holds the batch."""
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

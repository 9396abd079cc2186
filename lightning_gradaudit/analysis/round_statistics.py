"""What received weights look like, and what they make of a client's batch: the numbers that `check_server` judges."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from lightning_gradaudit.errors import InvalidInputError
from lightning_gradaudit.simulation.layer_trace import LayerCall
from lightning_gradaudit.simulation.snapshot import Snapshot

LINEAR_KINDS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)


@dataclass(frozen=True)
class StatisticsSettings:
    """Settings of the statistics of a round."""

    parallel_cosine: float = 0.98  # from which two rows measure alike
    fewest_inputs: int = 16  # of a layer whose rows are compared
    fewest_mirrored_inputs: int = 64  # of a layer whose rows' signs are compared
    most_rows: int = 1024  # of a layer that are looked at, evenly spaced
    negligible_row: float = 1e-3  # norm of a row, relative to the layer's largest, below which it has no direction
    one_hot_energy: float = 0.99  # share of a row's squared norm in one entry
    mirrored_quantile: float = 0.05  # of the rows of a layer
    learning_sample: float = 0.1  # gradient at the logits, relative to the largest, of a sample that still learns
    power_iterations: int = 6  # for the largest singular value
    least_scale: float = 0.01  # added to sizes, so that a bias that leaves zero is no jump
    least_rate: float = 0.005  # by which rates of activation are kept from 0 and 1
    fewest_units: int = 16  # of a layer whose activations are counted


SETTINGS = StatisticsSettings()


@dataclass(frozen=True)
class RoundStatistics:
    """Statistics of one round: received weights, and one batch of the client's own.

    Attributes:
        values: One number for each test that looks at this round alone; larger is more suspicious.
        layers: The layer that gave each of them.
        traced: For each test against the history a number for each layer.
    """

    values: Mapping[str, float] = field(default_factory=dict)
    layers: Mapping[str, str] = field(default_factory=dict)
    traced: Mapping[str, Mapping[str, float]] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON."""
        traced = {test: dict(each) for test, each in self.traced.items()}
        return {"values": dict(self.values), "layers": dict(self.layers), "traced": traced}

    @classmethod
    def from_dict(cls, values: Any) -> RoundStatistics:
        """Read what `to_dict` wrote.

        Raises:
            InvalidInputError: When it is of another shape.
        """
        try:
            numbers = {str(test): float(value) for test, value in values["values"].items()}
            layers = {str(test): str(layer) for test, layer in values["layers"].items()}
            traced = {str(test): {str(k): float(v) for k, v in each.items()} for test, each in values["traced"].items()}
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise InvalidInputError(f"history: expected RoundStatistics as JSON ({error!r}).") from error
        return cls(numbers, layers, traced)


def measure_round(snapshot: Snapshot) -> RoundStatistics:
    """Measure a round.

    Args:
        snapshot: Of the received weights and one batch of the client's (`Snapshot.from_batch`).
    """
    observation, truth = snapshot.observation, snapshot.truth
    calls = observation.trace(truth.inputs, truth.labels, gradients=True, kinds=LINEAR_KINDS)
    calls = list({call.name: call for call in calls}.values())
    head = next((call for call in reversed(calls) if _is_head(call, truth.labels)), None)
    found: dict[str, tuple[float, str]] = {}

    def note(test: str, value: float, layer: str) -> None:
        if math.isfinite(value) and value > found.get(test, (-math.inf, ""))[0]:
            found[test] = (value, layer)

    for call in calls:
        weight = observation.parameters.get(call.weight)
        if weight is not None and call is not head:
            for test, value in _of_hidden_weight(call.module, weight.detach().float().flatten(1)).items():
                note(test, value, call.name)
    if head is not None and head.weight in observation.parameters:
        weight = observation.parameters[head.weight].detach().float()
        values = _of_head_weight(weight) | _of_head(head, weight, truth.labels)
        first = next((call for call in calls if call.weight in observation.gradients), head)
        if first is not head and len(first.outputs) == len(head.outputs):
            values |= _of_first_layer(first, head)
        for test, value in values.items():
            note(test, value, head.name)
    return RoundStatistics(
        {test: value for test, (value, _) in found.items()},
        {test: layer for test, (_, layer) in found.items()},
        _traced(snapshot, calls, head),
    )


def _is_head(call: LayerCall, labels: Tensor) -> bool:
    classes = labels.ndim == 1 and not labels.is_floating_point()
    return (
        classes
        and isinstance(call.module, nn.Linear)
        and call.outputs.ndim == 2
        and len(call.outputs) == len(labels)
        and call.outputs.shape[1] > int(labels.max())
        and call.outputs_gradient is not None
    )


def _spaced(rows: Tensor) -> Tensor:
    return rows[:: max(1, -(-len(rows) // SETTINGS.most_rows))]


def _of_hidden_weight(module: nn.Module, weight: Tensor) -> dict[str, float]:
    """Return the tests of a layer's rows, (out, inputs): parallel, mirrored and one-hot ones."""
    rows = _spaced(weight)
    norms = rows.norm(dim=1)
    rows = rows[norms > SETTINGS.negligible_row * norms.max()]
    values: dict[str, float] = {}
    if len(rows) < 2 or rows.shape[1] < SETTINGS.fewest_inputs:
        return values
    energy = (rows.abs().amax(1) / rows.norm(dim=1)).square()
    values["one_hot_rows"] = float((energy > SETTINGS.one_hot_energy).float().mean())
    if isinstance(module, nn.Linear):
        units = nn.functional.normalize(rows, dim=1)
        alike = (units @ units.T > SETTINGS.parallel_cosine).sum(1).max()
        values["parallel_rows"] = math.log2(float(alike))
        if rows.shape[1] >= SETTINGS.fewest_mirrored_inputs:
            values["mirrored_rows"] = -math.log10(_mirror_error(rows) + 1e-6)
    return values


def _mirror_error(rows: Tensor) -> float:
    """Return how far the positive entries of rows are from being the negative ones times a factor, times √inputs.

    Of the rows' errors the lower quantile is taken. Entries drawn alike give about 1, whatever their number.
    """
    half = rows.shape[1] // 2
    ordered = rows.sort(1).values
    negative, positive = -ordered[:, :half], ordered[:, -half:].flip(1)
    factor = (negative * positive).sum(1) / negative.square().sum(1).clamp_min(1e-30)
    error = (positive - factor[:, None] * negative).norm(dim=1) / positive.norm(dim=1).clamp_min(1e-30)
    return float((error * half**0.5).quantile(SETTINGS.mirrored_quantile))


def _of_head_weight(weight: Tensor) -> dict[str, float]:
    """Return the tests of a head's rows, (classes, features): one far larger than the others, copies of each other."""
    norms = weight.norm(dim=1)
    if len(weight) < 3 or weight.shape[1] < 2 or not bool(norms.max() > 0):
        return {}
    values = {"head_rows": math.log10(float(norms.max() / norms.median().clamp_min(1e-9 * norms.max())))}
    live = _spaced(weight[norms > SETTINGS.negligible_row * norms.max()])
    if len(live) > 1 and weight.shape[1] >= SETTINGS.fewest_inputs:
        units = nn.functional.normalize(live, dim=1)
        cosine = (units @ units.T).fill_diagonal_(-1.0).max()
        values["duplicated_head"] = -math.log10(max(1 - float(cosine), 1e-6))
    return values


def _of_head(head: LayerCall, weight: Tensor, labels: Tensor) -> dict[str, float]:
    """Return the tests of what a batch sends through its head: the loss, and each sample's gradient at the features."""
    assert head.outputs_gradient is not None
    logits, residual = head.outputs.float(), head.outputs_gradient.float()
    values = {}
    if logits.shape[1] > 1:
        loss = float(nn.functional.cross_entropy(logits, labels.long()))
        values["loss"] = math.log10(max(loss / math.log(logits.shape[1]), 1e-3))
    size = residual.norm(dim=1)
    learns = size > SETTINGS.learning_sample * size.max()
    if bool(size.max() > 0) and bool(weight.any()) and int(learns.sum()) > 1:
        features = (residual @ weight).norm(dim=1)
        rms = weight.norm() / min(weight.shape) ** 0.5
        passed = (features / (size.clamp_min(1e-30) * rms))[learns]
        values["blocked_samples"] = -math.log10(float(passed.min()) + 1e-12)
        shares = features / features.sum().clamp_min(1e-30), size / size.sum()
        values["gradient_share"] = math.log2(float((shares[0][learns] / shares[1][learns]).max()) + 1e-12)
    return values


def _of_first_layer(first: LayerCall, head: LayerCall) -> dict[str, float]:
    """Return how little of a typical sample's gradient arrives at the first layer."""
    assert first.outputs_gradient is not None
    assert head.outputs_gradient is not None
    at_head = head.outputs_gradient.float().norm(dim=1)
    learns = at_head > SETTINGS.learning_sample * at_head.max()
    if not bool(at_head.max() > 0):
        return {}
    arrived = first.outputs_gradient.float().flatten(1).norm(dim=1)[learns] / at_head[learns]
    return {"dead_gradient": -math.log10(float(arrived.median()) + 1e-20)}


def _traced(snapshot: Snapshot, calls: list[LayerCall], head: LayerCall | None) -> dict[str, dict[str, float]]:
    """Return what is compared with the history, for each layer."""
    observation = snapshot.observation
    scale = {
        name: math.log10(float(p.detach().float().square().mean().sqrt()) + SETTINGS.least_scale)
        for name, p in observation.parameters.items()
        if p.is_floating_point() and p.ndim > 1 and p.numel()  # biases and gains move too much at first
    }
    spectrum, active, alone = {}, {}, {}
    for call in calls:
        if call.weight in observation.parameters:
            spectrum[call.name] = _top_share(observation.parameters[call.weight].detach().float().flatten(1))
        if call is head or call.outputs.shape[1] < SETTINGS.fewest_units:
            continue
        fires = call.outputs > 0
        active[call.name] = _logit(float(fires.float().mean()))
        if fires.ndim == 2 and len(fires) > 2:
            alone[call.name] = _logit(float((fires.sum(0) == 1).float().mean()))
    return {"weight_scale": scale, "spectrum": spectrum, "activation": active, "sole_activation": alone}


def _top_share(weight: Tensor) -> float:
    """Return log10 of the share of the largest squared singular value in a matrix' squared norm."""
    total = float(weight.square().sum())
    if not total > 0:
        return 0.0
    start = torch.linspace(1.0, 2.0, weight.shape[1], device=weight.device)
    vector = start / start.norm()
    value = 0.0
    for _ in range(SETTINGS.power_iterations):
        product = weight.T @ (weight @ vector)
        value = float(product.norm())
        vector = product / max(value, 1e-30)
    return math.log10(max(value / total, 1e-6))


def _logit(rate: float) -> float:
    kept = min(max(rate, SETTINGS.least_rate), 1 - SETTINGS.least_rate)
    return math.log(kept / (1 - kept))

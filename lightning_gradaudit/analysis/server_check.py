"""Whether a server's weights look manipulated: tests with p-values against honest rounds, before a step is made."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any, Literal

from torch import Tensor, nn

from lightning_gradaudit.analysis.round_statistics import RoundStatistics, measure_round
from lightning_gradaudit.errors import InvalidInputError
from lightning_gradaudit.simulation.batch import BatchLayout
from lightning_gradaudit.simulation.snapshot import Snapshot
from lightning_gradaudit.simulation.training_step import Loss

TAIL_START = 0.1
"""Share of honest rounds beyond the point where the fitted tail of a test begins."""
FEWEST_ROUNDS = 3
"""Rounds of a history that later ones are compared with."""
MOST_ROUNDS = 20
"""Newest rounds of a history that count."""


@dataclass(frozen=True)
class Reference:
    """The upper tail of a test's statistic over honest rounds: P(T > t) = 0.1 exp(-(t - start) / scale).

    Attributes:
        start: Its 90th percentile.
        scale: Mean excess beyond it, with a margin of half of it for networks that were not among them.
        sign: What the test looks at, for the message of a finding.
    """

    start: float
    scale: float
    sign: str

    def p_value(self, value: float) -> float:
        """Return P(T >= value) in honest rounds; 1 below the tail."""
        return 1.0 if value <= self.start else TAIL_START * math.exp(-min((value - self.start) / self.scale, 700.0))


REFERENCES = {
    "parallel_rows": Reference(0.0, 0.25, "rows of a linear layer are parallel, as the bins of an imprint are"),
    "mirrored_rows": Reference(0.34, 0.04, "the positive entries of rows mirror the negative ones, as in trap weights"),
    "one_hot_rows": Reference(0.0, 0.01, "rows of a layer pass a single input on"),
    "head_rows": Reference(0.11, 0.12, "one class has far larger weights in the head than the others"),
    "duplicated_head": Reference(0.27, 0.3, "rows of the head are copies of each other"),
    "loss": Reference(0.03, 0.07, "the loss is far above that of a guess"),
    "blocked_samples": Reference(0.12, 0.08, "the head keeps samples that it misjudges from the layers below"),
    "gradient_share": Reference(0.35, 0.34, "one sample makes the gradient, and its loss does not explain it"),
    "dead_gradient": Reference(3.0, 1.0, "the gradient does not arrive at the first layer"),
    "weight_scale": Reference(1.0, 0.3, "the size of one layer's weights has jumped, and that of others has not"),
    "spectrum": Reference(0.86, 0.4, "the spectrum of a layer's weights has jumped"),
    "activation": Reference(0.79, 0.36, "the activations of a layer have become sparser or denser"),
    "sole_activation": Reference(0.95, 0.35, "units fire for one sample alone far more or less often than before"),
}
"""Measured by `benchmarks/quality/server_check.py --calibrate`, on other networks, images and seeds than its figures.

Set by hand: the scales of parallel and one-hot rows, of which the 400 rounds had none; the tail of the size of weights,
which was measured with biases among them; and the tail of the gradient at the first layer, which leaves out networks
that had died. Such a network is a finding: its gradients are zero, and say nothing about later ones.
"""
FLOORS = {"weight_scale": 0.05, "spectrum": 0.1, "activation": 0.5, "sole_activation": 0.5}
"""Changes against the history that are taken for nothing, in the units of each test."""


@dataclass(frozen=True)
class Finding:
    """A sign of manipulated weights.

    Attributes:
        test: Name of the test, a key of `REFERENCES`; "architecture" where layers came or went.
        layer: Where it was seen.
        value: The test's statistic.
        p_value: Of the statistic in honest rounds, in [0, 1].
        message: In words.
    """

    test: str
    layer: str
    value: float
    p_value: float
    message: str


@dataclass(frozen=True)
class ServerReport:
    """What a check found.

    Attributes:
        findings: Smallest p-value first; none when nothing is suspicious.
        values: The statistic of every test that was made.
        p_values: Their p-values.
        statistics: What was measured; belongs into the history of later checks when nothing was found.
    """

    findings: tuple[Finding, ...]
    values: dict[str, float]
    p_values: dict[str, float]
    statistics: RoundStatistics

    def __str__(self) -> str:
        return "; ".join(finding.message for finding in self.findings) or "No sign of manipulated weights."


def check_server(
    model: nn.Module,
    batch: Any,
    *,
    loss: Loss | None = None,
    mode: Literal["train", "eval", "as_is"] = "as_is",
    history: Sequence[RoundStatistics] = (),
    false_alarm_rate: float = 1e-3,
) -> ServerReport:
    """Test received weights for the known manipulations, before a step is made on them.

    The model, its buffers, its gradients and the random state stay as they are. Tests look at the weights, at what they
    make of the batch, and at the changes against the history. A finding is a p-value below `false_alarm_rate` over the
    number of tests (Bonferroni), so that the rate is that of the whole check in rounds like those of the reference.

    Args:
        model: Holds the received weights; a LightningModule needs no `loss`.
        batch: Of the client's own, as for `Snapshot.from_batch`; at least 2 images, better 8 or more.
        loss: `loss(model(images), labels)`, a scalar.
        mode: In which the client computes.
        history: `ServerReport.statistics` of earlier rounds, oldest first; from 3 on, the newest 20 are compared with.
        false_alarm_rate: Of the check, in (0, 1).

    Raises:
        InvalidInputError: On a batch, loss or model that cannot be replayed, naming the argument.

    Example:
        >>> import torch
        >>> model = nn.Sequential(nn.Flatten(), nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 4))
        >>> batch = torch.rand(8, 1, 8, 8), torch.arange(8) % 4
        >>> print(check_server(model, batch, loss=nn.functional.cross_entropy))
        No sign of manipulated weights.
    """
    if not 0 < false_alarm_rate < 1:
        raise InvalidInputError(f"false_alarm_rate: expected a number in (0, 1), got {false_alarm_rate!r}.")
    images = BatchLayout.of(batch).split(batch).inputs
    mean, std = _range(images)
    snapshot = Snapshot.from_batch(model, batch, loss=loss, mean=mean, std=std, mode=mode)
    return judge_round(measure_round(snapshot), history, false_alarm_rate=false_alarm_rate)


def judge_round(
    statistics: RoundStatistics, history: Sequence[RoundStatistics] = (), *, false_alarm_rate: float = 1e-3
) -> ServerReport:
    """Judge what was measured of a round; see `check_server`."""
    values = dict(statistics.values)
    layers = dict(statistics.layers)
    findings = []
    if len(history) >= FEWEST_ROUNDS:
        recent = list(history)[-MOST_ROUNDS:]
        for test, (value, layer) in compare_with_history(statistics, recent).items():
            values[test], layers[test] = value, layer
        findings += _changed_architecture(statistics, recent[-1])
    tested = {test: value for test, value in values.items() if test in REFERENCES}
    p_values = {test: REFERENCES[test].p_value(value) for test, value in tested.items()}
    limit = false_alarm_rate / len(REFERENCES)
    for test in sorted(p_values, key=lambda each: p_values[each]):
        if p_values[test] < limit:
            where = f" ({layers[test]})" if layers[test] else ""
            said = f"{REFERENCES[test].sign}{where}, p = {p_values[test]:.1e} in honest rounds"
            findings.append(Finding(test, layers[test], tested[test], p_values[test], said))
    return ServerReport(tuple(findings), values, p_values, statistics)


def compare_with_history(
    statistics: RoundStatistics, history: Sequence[RoundStatistics]
) -> dict[str, tuple[float, str]]:
    """Return the largest change of each traced number against its median in the history, and its layer.

    A change is measured in the spread of the history, with a floor: log2(1 + |change| / (floor + spread)). Of the sizes
    of weights the largest change counts beyond the median of all layers: other weights change all of them.
    """
    found = {}
    for test, now in statistics.traced.items():
        changes = []
        for layer, value in now.items():
            past = [each.traced[test][layer] for each in history if layer in each.traced.get(test, {})]
            if len(past) >= FEWEST_ROUNDS:
                middle = median(past)
                spread = max(abs(each - middle) for each in past)
                changes.append((math.log2(1 + abs(value - middle) / (FLOORS[test] + spread)), layer))
        if changes:
            largest, layer = max(changes)
            usual = median(value for value, _ in changes) if test == "weight_scale" else 0.0
            found[test] = (largest - usual, layer)
    return found


def _changed_architecture(statistics: RoundStatistics, last: RoundStatistics) -> list[Finding]:
    now, before = (set(each.traced.get("weight_scale", ())) for each in (statistics, last))
    if now == before:
        return []
    layer = min(now ^ before)
    said = f"the model has other layers than before ({layer})"
    return [Finding("architecture", layer, float(len(now ^ before)), 0.0, said)]


def _range(images: Tensor) -> tuple[float, float]:
    """Return a mean and a deviation under which the images are pixels in [0, 1]."""
    low, high = float(images.min()), float(images.max())
    width = max(high - low, 1e-6)
    return -low / width, 1 / width

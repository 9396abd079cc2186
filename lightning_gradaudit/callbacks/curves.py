"""The logged curves: one row for every finished audit."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence

from torchmetrics import Metric

from lightning_gradaudit.analysis.ceiling import layer_of
from lightning_gradaudit.audit.record import AuditRecord
from lightning_gradaudit.audit.summary import MEASURES, measured
from lightning_gradaudit.risk.verdict import Verdict

VERDICT_CURVES = ("risk", "risk_low", "risk_high", "excess_identification", "verdict")
COUNTERS = ("lag_steps", "age_steps", "dropped", "skipped", "failed")
CURVES = (*VERDICT_CURVES, *MEASURES, *COUNTERS)
"""Names of the curves; `verdict` is 0 pass, 1 block, 2 unknown; what was not measured is NaN.

With the analysis on there is also `layer/<name>` for every layer with a shared gradient.
"""


def user_metrics(metrics: Mapping[str, Metric], record: AuditRecord) -> dict[str, float]:
    """Evaluate torchmetrics metrics of (reconstructions, truth), pixels in [0, 1], on one audit."""
    values = {}
    if record.pixels is not None and record.truth is not None:
        for name, metric in metrics.items():
            metric.reset()
            metric.update(record.pixels, record.truth)
            values[name] = float(metric.compute())
    return values


def row(
    record: AuditRecord,
    verdict: Verdict,
    *,
    lag_steps: int,
    age_steps: int,
    dropped: int,
    skipped: int,
    failed: int,
    layers: Sequence[str] = (),
) -> dict[str, float]:
    """Return one value for each of `CURVES`, and each layer's share of the leak-R².

    Args:
        record: The audit; its images are averaged.
        verdict: On the run, this audit included.
        lag_steps: Training steps between capture and now.
        age_steps: Training steps since the newest valid audit was captured.
        dropped, skipped, failed: Counters of the run.
        layers: Names of the layers, as `layer_names` gives them.
    """
    judged = (verdict.risk, verdict.low, verdict.high, verdict.excess_identification, verdict.status.exit_code)
    counted = (lag_steps, age_steps, dropped, skipped, failed)
    shares = {} if record.leakage is None else record.leakage.layers
    return {
        **dict(zip(VERDICT_CURVES, map(float, judged), strict=True)),
        **measured(record.published(verdict.limit)),
        **dict(zip(COUNTERS, map(float, counted), strict=True)),
        **{layer_curve(name): shares.get(name, math.nan) for name in layers},
    }


def layer_names(parameters: Iterable[str]) -> list[str]:
    """Return the layers that parameters belong to, each once, in their order."""
    return list(dict.fromkeys(layer_of(name) for name in parameters))


def layer_curve(name: str) -> str:
    """Return the name of a layer's curve."""
    return f"layer/{name}"

"""The logged curves: one row for every finished audit."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from torchmetrics import Metric

from lightning_gradaudit.analysis.ceiling import layer_of
from lightning_gradaudit.audit.record import AuditRecord
from lightning_gradaudit.metrics import Ceiling, Effort, NoiseToHide
from lightning_gradaudit.risk.verdict import Verdict

CURVES = (
    "risk", "risk_low", "risk_high", "exposure", "exposure_max", "null", "psnr", "ssim", "mse",
    "identified", "excess_identification", "confirmed", "label_accuracy", "matching_loss", "gradient_similarity",
    "ceiling", "reach", "noise_to_hide", "effort",
    "self_test", "defence_gap", "evaluations", "seconds", "lag_steps", "age_steps", "dropped", "skipped", "failed",
    "verdict",
)  # fmt: skip
"""Names of the curves; `verdict` is 0 pass, 1 block, 2 unknown; what was not measured is NaN.

`ceiling` and `reach` are means over the batch; `noise_to_hide` would hide its most stubborn image; `effort` is that of
its quickest. With the analysis on there is also `layer/<name>` for every layer with a shared gradient.
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
    """Return one value for each of `CURVES`, and each layer's share of what the gradient gives away.

    Args:
        record: The audit; its images are averaged.
        verdict: How the run was judged with it.
        lag_steps: Training steps between capture and now.
        age_steps: Training steps since the newest valid audit was captured.
        dropped, skipped, failed: Counters of the run.
        layers: Names of the layers, as `layer_names` gives them.
    """
    leakage = record.leakage
    record = record.published(verdict.limit)
    values = {
        "risk": verdict.risk,
        "risk_low": verdict.low,
        "risk_high": verdict.high,
        "exposure": float(record.exposure.mean()),
        "exposure_max": float(record.exposure.max()),
        "null": float(record.null.mean()),
        "psnr": float(record.psnr.mean()),
        "ssim": float(record.ssim.mean()),
        "mse": float(record.mse.mean()),
        "identified": float(record.identified.nanmean()),
        "excess_identification": verdict.excess_identification,
        "confirmed": math.nan if record.confirmed is None else float(record.confirmed.mean()),
        "label_accuracy": record.label_accuracy,
        "matching_loss": record.matching_loss,
        "gradient_similarity": record.gradient_similarity,
        "ceiling": math.nan if record.ceiling is None else _value(Ceiling, record.ceiling),
        "reach": math.nan if leakage is None else float(leakage.reach.mean()),
        "noise_to_hide": math.nan if leakage is None else _value(NoiseToHide, leakage.noise_to_hide),
        "effort": math.nan if record.effort is None else _quickest(record),
        "self_test": record.self_test,
        "defence_gap": record.defence_gap,
        "evaluations": float(record.evaluations),
        "seconds": record.seconds,
        "lag_steps": float(lag_steps),
        "age_steps": float(age_steps),
        "dropped": float(dropped),
        "skipped": float(skipped),
        "failed": float(failed),
        "verdict": float(verdict.status.exit_code),
    }
    assert tuple(values) == CURVES
    shares = {} if leakage is None else leakage.layers
    return values | {layer_curve(name): shares.get(name, math.nan) for name in layers}


def layer_names(parameters: Iterable[str]) -> list[str]:
    """Return the layers that parameters belong to, each once, in their order."""
    return list(dict.fromkeys(layer_of(name) for name in parameters))


def layer_curve(name: str) -> str:
    """Return the name of a layer's curve."""
    return f"layer/{name}"


def _value(kind: Callable[..., Metric], *arguments: Any, **settings: Any) -> float:
    """Evaluate a metric of one audit, in this process alone."""
    metric = kind(**settings, sync_on_compute=False)
    metric.update(*arguments)
    return float(metric.compute())


def _quickest(record: AuditRecord) -> float:
    """Return the effort of the image that fell first; NaN, a gap in the curve, when none did (censored)."""
    least = _value(Effort, record.effort, record.followed, share=0.0)
    return least if math.isfinite(least) else math.nan

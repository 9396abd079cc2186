"""The HTML report: one file, no network."""

from __future__ import annotations

import base64
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined, select_autoescape
from markupsafe import Markup

from lightning_gradaudit.report.charts import exposure_chart, risk_chart, similarity_chart
from lightning_gradaudit.report.run import Row, Run
from lightning_gradaudit.risk import RiskGate

CAVEATS = (
    "PASS is demonstrated, not proven: valid audits showed no exposure above the limit for an attacker of this "
    "capacity and budget. A stronger attack may get more.",
    "Exposure 0 means no better than a guess without the gradient; 1 means a copy. Identification asks whether a "
    "reconstruction names its image among at least 100, which survives noise that hides the image from the eye.",
    "UNKNOWN never releases by default: too few audits, stale or failed ones, or a leak that algebra shows and the "
    "attack did not reach.",
    "Only sampled steps were audited, under the threat model stated here. Other views of the gradient (after "
    "aggregation, several local steps) need their own audit.",
)
_MOST_EXPOSED = 10


def write_report(runs: Sequence[Run], path: str | Path, *, title: str = "Gradient leakage audit") -> Path:
    """Write one self-contained HTML file.

    Pairs of true and reconstructed images appear when the run kept them (`log_images=True`); the file is then as
    private as they are.

    Args:
        runs: Runs to show, in this order.
        path: File to write; its folder is made.
        title: Heading.
    """
    environment = Environment(
        loader=PackageLoader("lightning_gradaudit", "report"),
        autoescape=select_autoescape(),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["number"] = number
    page = environment.get_template("template.html").render(
        title=title, runs=[_section(run) for run in runs], caveats=CAVEATS
    )
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(page, encoding="utf-8")
    return path


def number(value: Any, digits: int = 2) -> str:
    """Format a number, or a dash for what was not measured."""
    if value is None or (isinstance(value, float) and not math.isfinite(value)):
        return "–"
    return f"{float(value):.{digits}f}"


def _section(run: Run) -> dict[str, Any]:
    limit = run.limit if run.limit is not None else RiskGate().max_risk
    verdict = run.verdict(RiskGate(limit)).to_dict()
    charts = []
    if run.rows:
        for name, draw, text in (
            ("Risk over training", risk_chart, "Risk with 95% bounds, the limit, and the gate's decisions."),
            ("Images", exposure_chart, "Exposure of every audited image and the share that was identified."),
            ("Similarity and null", similarity_chart, "What the attack reached against the best guess without it."),
        ):
            charts.append({"name": name, "svg": Markup(draw(run)), "text": text})  # noqa: S704 - our own SVG
    seconds = sum(row.record.seconds for row in run.rows)
    return {
        "name": run.name,
        "verdict": verdict,
        "charts": charts,
        "rows": [_row(row) for row in run.rows],
        "pairs": [_pair(row) for row in _worth_showing(run.rows)],
        "exposed": [
            {"step": step, "index": index, "exposure": value, "psnr": float(record.psnr[index]),
             "identified": float(record.identified[index])}
            for step, index, value, record in run.most_exposed(_MOST_EXPOSED)
        ],
        "decisions": run.decisions,
        "settings": run.evidence.settings,
        "threat_model": run.rows[-1].record.threat_model if run.rows else {},
        "faults": run.evidence.faults,
        "engine": str(run.evidence.engine) if run.evidence.engine else "engine check: no result",
        "cost": f"{len(run.rows)} audits in {seconds:.0f} s of worker time, {run.evidence.dropped} samples dropped",
    }  # fmt: skip


def _row(row: Row) -> dict[str, Any]:
    record = row.record
    return {
        "step": record.step,
        "risk": row.risk,
        "exposure": float(record.exposure.mean()),
        "exposure_max": float(record.exposure.max()),
        "psnr": float(record.psnr.mean()),
        "ssim": float(record.ssim.mean()),
        "identified": float(record.identified.nanmean()),
        "labels": record.label_accuracy,
        "null": float(record.null.mean()),
        "outcome": str(record.outcome),
        "lag": row.lag,
    }


def _worth_showing(rows: Sequence[Row], count: int = 6) -> list[Row]:
    """Return the audits with pictures whose worst image is most exposed, in the order of training."""
    pictured = [row for row in rows if row.pairs is not None and row.pairs.is_file()]
    worst = sorted(pictured, key=lambda row: -float(row.record.exposure.max()))[:count]
    return sorted(worst, key=lambda row: row.record.step)


def _pair(row: Row) -> dict[str, Any]:
    assert row.pairs is not None
    exposures = sorted((float(e) for e in row.record.exposure), reverse=True)
    return {
        "step": row.record.step,
        "png": base64.b64encode(row.pairs.read_bytes()).decode(),
        "exposures": exposures,
    }

"""Charts of a run as inline SVG."""

from __future__ import annotations

import io
import math
from typing import Any

import matplotlib as mpl
from matplotlib.figure import Figure

from lightning_gradaudit.report.run import Run

mpl.rcParams["svg.fonttype"] = "none"  # text stays text: searchable, and readable to a screen reader
_BLUE, _ORANGE, _GREY, _RED, _GREEN = "#2563eb", "#d97706", "#6b7280", "#b91c1c", "#15803d"


def risk_chart(run: Run) -> str:
    """Draw risk over steps with its bounds, the limit, and what gates decided."""
    figure, axes = _axes("training step", "risk")
    steps = [row.record.step for row in run.rows]
    risk = [_number(row.risk.get("risk")) for row in run.rows]
    low = [_number(row.risk.get("low"), 0.0) for row in run.rows]
    high = [_number(row.risk.get("high"), 1.0) for row in run.rows]
    axes.fill_between(steps, low, high, color=_BLUE, alpha=0.15, linewidth=0, label="95% bounds")
    axes.plot(steps, risk, color=_BLUE, marker="o", markersize=4, label="risk")
    if run.limit is not None:
        axes.axhline(run.limit, color=_RED, linestyle="--", linewidth=1.2, label=f"limit {run.limit:.2f}")
    for released, color, label in ((False, _RED, "refused"), (True, _GREEN, "released")):
        chosen = [d for d in run.decisions if bool(d["released"]) is released and d.get("step") is not None]
        if chosen:
            heights = [_number(d.get("risk"), 1.0) for d in chosen]
            axes.scatter(
                [d["step"] for d in chosen],
                heights,
                color=color,
                marker="x" if not released else "D",
                s=45,
                zorder=3,
                label=f"checkpoint {label}",
            )
    axes.set_ylim(-0.03, 1.03)
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, 1.22), ncol=5, frameon=False, fontsize=9)
    return _svg(figure)


def exposure_chart(run: Run) -> str:
    """Draw the exposure of every audited image, and the share identified per audit."""
    figure, axes = _axes("training step", "exposure (images), identified (share)")
    xs = [row.record.step for row in run.rows for _ in row.record.exposure]
    ys = [float(value) for row in run.rows for value in row.record.exposure]
    axes.scatter(xs, ys, s=16, color=_BLUE, alpha=0.5, linewidths=0, label="exposure of an image")
    steps = [row.record.step for row in run.rows]
    axes.plot(steps, [float(row.record.exposure.max()) for row in run.rows], color=_BLUE, label="worst of the batch")
    identified = [float(row.record.identified.nanmean()) for row in run.rows]
    axes.plot(steps, identified, color=_ORANGE, linestyle="-.", marker="s", markersize=3, label="identified")
    axes.set_ylim(-0.03, 1.03)
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, 1.22), ncol=3, frameon=False, fontsize=9)
    return _svg(figure)


def similarity_chart(run: Run) -> str:
    """Draw what the attack reached against what a guess reaches."""
    figure, axes = _axes("training step", "SSIM (mean of the batch)")
    steps = [row.record.step for row in run.rows]
    reached = [float(row.record.ssim.mean()) for row in run.rows]
    guessed = [float(row.record.null.mean()) for row in run.rows]
    axes.plot(steps, reached, color=_BLUE, marker="o", markersize=4, label="reconstruction")
    axes.plot(steps, guessed, color=_GREY, linestyle="--", label="null: best guess without this gradient")
    axes.set_ylim(-0.03, 1.03)
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, 1.22), ncol=2, frameon=False, fontsize=9)
    return _svg(figure)


def _axes(x: str, y: str) -> tuple[Figure, Any]:
    figure = Figure(figsize=(8.0, 3.2))
    axes = figure.subplots()
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    axes.grid(visible=True, color="#e5e7eb", linewidth=0.8)
    axes.spines[["top", "right"]].set_visible(False)
    return figure, axes


def _svg(figure: Figure) -> str:
    buffer = io.StringIO()
    figure.savefig(
        buffer, format="svg", bbox_inches="tight", metadata=dict.fromkeys(("Date", "Creator", "Format", "Type"))
    )
    text = buffer.getvalue()
    return text[text.index("<svg") :]


def _number(value: Any, default: float = math.nan) -> float:
    return default if value is None else float(value)

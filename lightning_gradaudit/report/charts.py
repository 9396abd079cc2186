"""The chart of a comparison of models, as SVG."""

from __future__ import annotations

import io
import math

import matplotlib as mpl
from matplotlib.figure import Figure

from lightning_gradaudit.audit.comparison import Comparison
from lightning_gradaudit.utils.formatting import printable

mpl.rcParams["svg.fonttype"] = "none"  # text stays text: searchable, and readable to a screen reader
_BLUE, _RED = "#2563eb", "#b91c1c"


def comparison_chart(comparison: Comparison) -> str:
    """Draw the exposure of every image by model, its mean, and the mean ceiling; return SVG."""
    names = [_text(each.name) for each in comparison.contenders]
    figure = Figure(figsize=(8.0, 0.9 + 0.36 * len(names)))
    axes = figure.subplots()
    axes.set_xlabel("exposure (dots: images, bar: mean) and ceiling (line)")
    axes.grid(visible=True, color="#e5e7eb", linewidth=0.8)
    axes.spines[["top", "right"]].set_visible(False)
    for row, each in enumerate(comparison.contenders):
        exposures = each.exposure.tolist()
        axes.barh(row, sum(exposures) / len(exposures), height=0.5, color=_BLUE, alpha=0.25)
        axes.scatter(exposures, [row] * len(exposures), s=14, color=_BLUE, alpha=0.6, linewidths=0)
        ceiling = float(each.ceiling.nanmean())
        if math.isfinite(ceiling):
            axes.plot([ceiling, ceiling], [row - 0.35, row + 0.35], color=_RED, linewidth=2)
    axes.set_yticks(range(len(names)), names)
    axes.invert_yaxis()
    axes.set_xlim(-0.03, 1.03)
    return _svg(figure)


def _text(name: str) -> str:
    """Return a name of others without what XML cannot hold, and without formulas."""
    return printable(name, 100).replace("$", r"\$")


def _svg(figure: Figure) -> str:
    buffer = io.StringIO()
    figure.savefig(
        buffer, format="svg", bbox_inches="tight", metadata=dict.fromkeys(("Date", "Creator", "Format", "Type"))
    )
    text = buffer.getvalue()
    return text[text.index("<svg") :]

"""Charts of the analysis and of comparisons as SVG."""

from __future__ import annotations

import io
import math
from collections.abc import Mapping, Sequence
from itertools import cycle
from typing import Any

import matplotlib as mpl
from matplotlib.figure import Figure

from lightning_gradaudit.analysis.basin import Basin
from lightning_gradaudit.analysis.effort import EXPOSED, KnowledgeLevel
from lightning_gradaudit.analysis.gradient_similarity import ALL, SimilarityRelation
from lightning_gradaudit.audit.comparison import Comparison
from lightning_gradaudit.utils.formatting import printable

mpl.rcParams["svg.fonttype"] = "none"  # text stays text: searchable, and readable to a screen reader
_BLUE, _ORANGE, _GREY, _RED, _GREEN = "#2563eb", "#d97706", "#6b7280", "#b91c1c", "#15803d"
_COLORS = (_BLUE, _ORANGE, _GREEN, _RED, "#7c3aed", "#0e7490")


def relation_chart(relation: SimilarityRelation) -> str:
    """Draw distances of gradients against distances of images, both on logarithmic axes."""
    figure, axes = _axes("distance of images: root mean square pixel", "distance of gradients: ‖Δg‖")
    for over, color, marker in (("pairs", _GREY, "."), ("rays", _BLUE, "o"), ("path", _ORANGE, "s")):
        drawn = [(mse**0.5, l2) for mse, _, l2, _ in relation.points.get(over, ()) if mse > 0 and l2 > 0]
        if drawn:
            rho = relation.rho(over).value
            label = f"{over}: Spearman {rho:.2f}"
            axes.scatter(*zip(*drawn, strict=True), s=14, color=color, marker=marker, alpha=0.6, label=label)
    axes.set_xscale("log")
    axes.set_yscale("log")
    slope = relation.slopes[ALL].value
    axes.set_title(
        f"slope along rays {slope:.2f}; ‖Δg‖/‖Δx‖ from {relation.least.value:.3g} to {relation.largest.value:.3g}",
        fontsize=9,
    )
    axes.legend(frameon=False, fontsize=9)
    return _svg(figure)


def effort_chart(rungs: Sequence[KnowledgeLevel], *, level: float = EXPOSED) -> str:
    """Draw the mean exposure of the batch against simulated gradients, one line for each rung of the ladder."""
    figure, axes = _axes("simulated gradients", "exposure (mean of the batch)")
    styles = ("-", "--", "-.", ":")
    knowledge = list(dict.fromkeys(rung.knowledge for rung in rungs))
    starts = list(dict.fromkeys(rung.restarts for rung in rungs))
    for rung in rungs:
        axes.plot(
            rung.curve.evaluations,
            rung.curve.exposure.mean(1).tolist(),
            color=_COLORS[knowledge.index(rung.knowledge) % len(_COLORS)],
            linestyle=styles[starts.index(rung.restarts) % len(styles)],
            marker="o",
            markersize=3,
            label=f"{_text(rung.knowledge)}, {rung.restarts} start{'s' if rung.restarts > 1 else ''}",
        )
    axes.axhline(level, color=_RED, linestyle="--", linewidth=1, label=f"exposed ({level:.2f})")
    axes.set_xscale("log")
    axes.set_ylim(-0.03, 1.03)
    axes.legend(frameon=False, fontsize=8, loc="upper left", bbox_to_anchor=(1.01, 1))
    return _svg(figure)


def basin_chart(basins: Mapping[str, Basin]) -> str:
    """Draw similarity after a search against similarity before it, one line for each named state."""
    first = next(iter(basins.values()))
    figure, axes = _axes(f"{first.measure} of the start", f"{first.measure} after the search")
    axes.plot([0, 1], [0, 1], color=_GREY, linestyle=":", label="no gain")
    for (name, found), color in zip(basins.items(), cycle(_COLORS)):
        before, after = found.initial.mean(1).tolist(), found.final.mean(1).tolist()
        axes.plot(before, after, color=color, marker="o", markersize=4, label=_text(name))
    axes.set_xlim(-0.03, 1.03)
    axes.set_ylim(-0.03, 1.03)
    axes.legend(frameon=False, fontsize=8, loc="upper left", bbox_to_anchor=(1.01, 1))
    return _svg(figure)


def comparison_chart(comparison: Comparison) -> str:
    """Draw for each model what was got of every image, and the ceiling."""
    figure, axes = _axes("exposure (dots: images, bar: mean) and ceiling (line)", "")
    names = [_text(each.name) for each in comparison.contenders]
    figure.set_figheight(0.9 + 0.36 * len(names))
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

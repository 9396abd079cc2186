"""Charts of a run as Plotly figures: plain dictionaries, drawn by Plotly's script in the reader's browser."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from html import escape
from typing import Any

import numpy as np

from lightning_gradaudit.audit.summary import MEASURES
from lightning_gradaudit.metrics.functional.correlation import spearman
from lightning_gradaudit.metrics.functional.effort import exposed_share
from lightning_gradaudit.report.content import effort_sentence, efforts, groups, layer_shares, plain, worst_of
from lightning_gradaudit.report.run import Row, Run
from lightning_gradaudit.utils.formatting import number, numbers_beside

DRAWN = 400
"""Groups of audits that a chart draws at most; each stands for its worst audit, and bands cover the whole group."""
DOTS = 2000
"""Images that a chart draws at most, as far as each group shows three."""
_BLUE, _ORANGE, _GREY, _RED, _GREEN, _VIOLET = "#3b82f6", "#d97706", "#8b929e", "#dc2626", "#16a34a", "#8b5cf6"
Figure = dict[str, Any]


def charts(run: Run) -> list[dict[str, Any]]:
    """Return name, text and figure of every chart that the run has data for."""
    drawn = []
    if run.rows:
        for name, draw in _CHARTS.items():
            found = draw(run, groups(run.rows, DRAWN))
            if found is not None:
                text, figure = found
                drawn.append({"name": name, "text": text, "figure": figure})
    return drawn


def _risk(run: Run, parts: Sequence[Sequence[Row]]) -> tuple[str, Figure]:
    """Draw the risk with its bounds, the ceiling, the limit and the gate's decisions."""
    worst = [max(part, key=lambda row: _number(row.risk.get("risk"), -1.0)) for part in parts]
    steps = [row.record.step for row in worst]
    low = [min(_number(row.risk.get("low"), 0.0) for row in part) for part in parts]
    high = [max(_number(row.risk.get("high"), 1.0) for row in part) for part in parts]
    risk = [row.risk.get("risk") for row in worst]
    hover = "step %{x}: %{y:.2f}"
    chosen = {kind: _decided(run, released=kind) for kind in (False, True)}
    risks = {kind: [_number(d.get("risk"), 1.0) for d in each] for kind, each in chosen.items()}
    limit, *said = numbers_beside(run.limit, *risk, *risks[False], *risks[True])  # they share the digits
    texts = iter(said)
    data = [
        _line("upper bound", steps, high, _BLUE, width=0, hoverinfo="skip", showlegend=False),
        _line("95% bounds", steps, low, _BLUE, width=0, fill="tonexty", fillcolor="rgba(59,130,246,.22)",
              hoverinfo="skip"),
        _line("risk", steps, risk, _BLUE, markers=True, hovertemplate="step %{x}: %{text}",
              text=[next(texts) for _ in risk]),
    ]  # fmt: skip
    ceilings = _measured(worst, "ceiling")
    if any(value is not None for value in ceilings):
        data.append(_line("ceiling (estimate)", steps, ceilings, _VIOLET, dash="dot", hovertemplate=hover))
    if run.limit is not None:
        ends = [min(steps), max((*steps, *(d["step"] for d in run.decisions if d.get("step") is not None)))]
        data.append(_line(f"limit {limit}", ends, [run.limit] * 2, _RED, dash="dash", hoverinfo="skip"))
    for released, color, symbol in ((False, _RED, "x"), (True, _GREEN, "diamond")):
        if chosen[released]:
            name = f"checkpoint {'released' if released else 'refused'}"
            decided = [d["step"] for d in chosen[released]]
            marker = {"color": color, "symbol": symbol, "size": 11}
            labels = [_text(f"{d['status']}: {d['checkpoint']}") for d in chosen[released]]
            shown, told = [next(texts) for _ in labels], "step %{x}: risk %{customdata}<br>%{text}"
            data.append(_dots(name, decided, risks[released], marker, told, text=labels, customdata=shown))
    text = f"Risk with 95% bounds, the ceiling, the limit, and the decisions of the gate. {_thinned(run, parts)}"
    return text, _figure(data, "training step", "risk", y_range=(-0.03, 1.05))


def _decided(run: Run, *, released: bool) -> list[dict[str, Any]]:
    """Return the gate's decisions of one kind that have a step."""
    return [d for d in run.decisions if bool(d["released"]) is released and d.get("step") is not None]


def _images(run: Run, parts: Sequence[Sequence[Row]]) -> tuple[str, Figure]:
    """Draw the exposure of images, the worst of each audit, and the share identified."""
    each = max(3, DOTS // len(parts))
    dots = [(row.record.step, value) for part in parts for row, value in _spread(part, each)]
    worst = [worst_of(part) for part in parts]
    steps = [row.record.step for row in worst]
    dot_steps, exposures = [step for step, _ in dots], [value for _, value in dots]
    marker = {"color": _BLUE, "size": 6, "opacity": 0.5}
    data = [
        _dots("an image", dot_steps, exposures, marker, "step %{x}: exposure %{y:.2f}"),
        _line("worst of the batch", steps, _measured(worst, "exposure_max"), _BLUE),
        _line("share identified", steps, _measured(worst, "identified"), _ORANGE, dash="dashdot"),
    ]
    total = sum(row.record.batch_size for row in run.rows)
    text = f"Exposure of the {total} audited images and the share that was identified. {_thinned(run, parts)}"
    return text, _figure(data, "training step", "exposure, share", y_range=(-0.03, 1.05))


def _reached(run: Run, parts: Sequence[Sequence[Row]]) -> tuple[str, Figure]:
    """Draw the similarity that the attack reached, and that of the best guess without the gradient."""
    worst = [worst_of(part) for part in parts]
    steps = [row.record.step for row in worst]
    data = [
        _line("reconstruction", steps, _measured(worst, "ssim"), _BLUE, markers=True),
        _line("null: best guess", steps, _measured(worst, "null"), _GREY, dash="dash"),
    ]
    text = f"Structural similarity to the truth, mean of the batch. {_thinned(run, parts)}"
    return text, _figure(data, "training step", "SSIM", y_range=(-0.03, 1.05))


def _relation(run: Run, parts: Sequence[Sequence[Row]]) -> tuple[str, Figure] | None:
    """Draw the similarity of images against the similarity of gradients."""
    matched = [row for row in run.rows if math.isfinite(row.record.gradient_similarity)]
    shown = [row for part in parts if math.isfinite((row := worst_of(part)).record.gradient_similarity)]
    if not shown:
        return None
    rho = spearman(
        np.array([row.record.gradient_similarity for row in matched]),
        np.array([MEASURES["ssim"].of(row.record) for row in matched]),
    )
    steps = [row.record.step for row in shown]
    marker = {
        "color": steps, "colorscale": "Viridis", "size": 8, "line": {"color": _GREY, "width": 1}, "showscale": True,
        "colorbar": {"title": {"text": "step"}, "thickness": 10, "outlinewidth": 0},
    }  # fmt: skip
    cosines, hover = _measured(shown, "gradient_similarity"), "step %{customdata}: cosine %{x:.3f}, SSIM %{y:.2f}"
    data = [_dots("an audit", cosines, _measured(shown, "ssim"), marker, hover, customdata=steps)]
    text = (
        "Each dot is an audit: the similarity of reconstruction and true image, by their gradients and by their "
        f"pixels. Spearman's rank correlation {number(rho)}. This describes the run and is no risk: a matched gradient "
        f"does not imply a matched image. {_thinned(run, parts)}"
    )
    return text, _figure(data, "cosine of gradients", "SSIM of images", y_range=(-0.03, 1.05), legend=False)


def _effort(run: Run, _parts: Sequence[Sequence[Row]]) -> tuple[str, Figure] | None:
    """Draw the share of images exposed against simulated gradients; images never exposed are censored."""
    found, followed = efforts(run.rows)
    if not len(found):
        return None
    times, share = exposed_share(found, followed)
    ends = followed[followed.isfinite()]
    last = float(ends.max()) if len(ends) else max(1.0, float(times.max()) if len(times) else 1.0)
    x = [1.0, *(max(1.0, t) for t in times.tolist()), max(1.0, last)]
    y = [0.0, *share.tolist(), float(share[-1]) if len(share) else 0.0]
    hover = "%{x:.0f} simulated gradients: %{y:.0%} exposed"
    line = _line("share exposed", x, y, _BLUE, hovertemplate=hover)
    line["line"]["shape"] = "hv"
    text = f"Share of images exposed (Kaplan–Meier) after so many simulated gradients: {effort_sentence(run.rows)}."
    figure = _figure([line], "simulated gradients", "share exposed", y_range=(-0.03, 1.05), legend=False)
    figure["layout"]["xaxis"]["type"] = "log"
    return text, figure


def _layers(run: Run, _parts: Sequence[Sequence[Row]]) -> tuple[str, Figure] | None:
    """Draw each layer's share of the leakage, in the order of the architecture."""
    shares = layer_shares(run)
    if not shares:
        return None
    ordered = bool(run.evidence.settings.get("layers"))
    names = list(shares)[::-1]  # horizontal bars grow upwards
    said = [_text(name) for name in names]
    bars = {
        "type": "bar",
        "orientation": "h",
        "y": said,
        "x": [shares[name] for name in names],
        "marker": {"color": _BLUE},
        "hovertemplate": "%{y}: %{x:.1%}<extra></extra>",
    }
    most = max(shares, key=lambda name: shares[name])
    text = (
        f"Each layer's share of the leak-R², median of the audits"
        f"{', in the order of the architecture' if ordered else ''}. Largest: {most} with {shares[most]:.0%}."
    )
    figure = _figure([bars], "share", "", legend=False, height=110 + 26 * len(names))
    figure["layout"]["yaxis"] |= {"automargin": True, "type": "category"}
    figure["layout"]["xaxis"] |= {"tickformat": ".0%", "rangemode": "tozero"}
    return text, figure


_CHARTS: dict[str, Callable[[Run, Sequence[Sequence[Row]]], tuple[str, Figure] | None]] = {
    "Risk over training": _risk,
    "Images": _images,
    "Reconstruction and null": _reached,
    "Gradient and data similarity": _relation,
    "Effort": _effort,
    "Leaking layers": _layers,
}


def _line(
    name: str,
    x: Sequence[Any],
    y: Sequence[Any],
    color: str,
    *,
    dash: str = "solid",
    width: float = 2,
    markers: bool = False,
    **more: Any,
) -> dict[str, Any]:
    return {
        "type": "scatter",
        "mode": "lines+markers" if markers or len(x) == 1 else "lines",
        "name": name,
        "x": list(x),
        "y": list(y),
        "line": {"color": color, "dash": dash, "width": width},
        "marker": {"size": 6, "color": color},
        **more,
    }


def _dots(
    name: str, x: Sequence[Any], y: Sequence[Any], marker: dict[str, Any], hovertemplate: str, **more: Any
) -> dict[str, Any]:
    return {
        "type": "scatter",
        "mode": "markers",
        "name": name,
        "x": list(x),
        "y": list(y),
        "hovertemplate": hovertemplate,
        "marker": marker,
        **more,
    }


def _figure(
    data: list[dict[str, Any]],
    x: str,
    y: str,
    *,
    y_range: tuple[float, float] | None = None,
    legend: bool = True,
    height: int = 340,
) -> Figure:
    """Wrap traces in a layout without colours of its own: those of text and grid follow the page, light or dark."""
    layout = {
        "height": height,
        "margin": {"l": 52, "r": 12, "t": 8, "b": 44},
        "paper_bgcolor": "rgba(0,0,0,0)",
        "plot_bgcolor": "rgba(0,0,0,0)",
        "font": {"family": "system-ui, sans-serif", "size": 12},
        "xaxis": {"title": {"text": x}, "zeroline": False},
        "yaxis": {"title": {"text": y}, "zeroline": False},
        "showlegend": legend,
        "legend": {"orientation": "h", "y": 1.02, "yanchor": "bottom", "x": 0},
        "hoverlabel": {"bgcolor": "#111827", "bordercolor": "#111827", "font": {"color": "#ffffff"}},
        "hovermode": "closest",
    }
    if y_range is not None:
        layout["yaxis"] |= {"range": list(y_range)}  # type: ignore[operator]
    return {"data": data, "layout": layout}


def _text(text: str) -> str:
    """Escape text of unknown origin for Plotly, which reads tags and entities as HTML does."""
    return escape(plain(text), quote=False)


def _spread(part: Sequence[Row], count: int) -> list[tuple[Row, float]]:
    """Return at most `count` images of a group, evenly over their order by exposure, with the least and the most."""
    images = [(row, value) for row in part for value in row.record.exposure.tolist() if math.isfinite(value)]
    if len(images) <= count:
        return images
    images.sort(key=lambda image: image[1])
    return [images[round(at * (len(images) - 1) / (count - 1))] for at in range(count)]


def _thinned(run: Run, parts: Sequence[Sequence[Row]]) -> str:
    """Return a sentence about audits that the drawing groups, or nothing."""
    if len(parts) == len(run.rows):
        return ""
    return (
        f"{len(run.rows)} audits are drawn as {len(parts)} groups of {len(parts[0])}: the worst audit of each, with "
        "bounds that cover the group."
    )


def _measured(rows: Sequence[Row], name: str) -> list[float | None]:
    values = [MEASURES[name].of(row.record) for row in rows]
    return [value if math.isfinite(value) else None for value in values]


def _number(value: Any, default: float) -> float:
    return default if value is None else float(value)

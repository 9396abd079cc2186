"""The report as one HTML file that needs no network, and as a Markdown section for a model card."""

from __future__ import annotations

import base64
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup
from plotly.offline import get_plotlyjs

from lightning_gradaudit.displays import number
from lightning_gradaudit.report.content import CAVEATS, cell, section
from lightning_gradaudit.report.interactive import charts
from lightning_gradaudit.report.run import Row, Run

TITLE = "Gradient leakage audit"


def write_report(runs: Sequence[Run], path: str | Path, *, title: str = TITLE) -> Path:
    """Write one self-contained HTML file with interactive charts.

    Plotly's script is part of it, 4.8 MB however many runs are shown. Pairs of true and reconstructed images appear
    when the run kept them (`log_images=True`); the file is then as private as they are.

    Args:
        runs: Runs to show, in this order.
        path: File to write; its folder is made.
        title: Heading.
    """
    sections = [section(run) | {"charts": _charts(run), "pairs": _pairs(run.rows)} for run in runs]
    page = (
        _environment(autoescape=True)
        .get_template("template.html")
        .render(
            title=title,
            runs=sections,
            caveats=CAVEATS,
            plotly=Markup(get_plotlyjs()) if any(each["charts"] for each in sections) else "",  # noqa: S704 - the library
        )
    )
    return _write(path, page)


def write_markdown(runs: Sequence[Run], path: str | Path, *, title: str = TITLE) -> Path:
    """Write what the HTML report says, without charts and images, as a section for a model card or an assessment.

    Args:
        runs, path, title: As in `write_report`.
    """
    text = (
        _environment(autoescape=False)
        .get_template("template.md")
        .render(title=title, runs=[section(run) for run in runs], caveats=CAVEATS)
    )
    return _write(path, text)


def _environment(*, autoescape: bool) -> Environment:
    environment = Environment(
        loader=PackageLoader("lightning_gradaudit", "report"),
        autoescape=autoescape,  # noqa: S701 - Markdown is not HTML
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"number": number, "cell": cell}
    return environment


def _write(path: str | Path, text: str) -> Path:
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    return path


def _charts(run: Run) -> list[dict[str, Any]]:
    """Return the charts with their figures as JSON that can stand inside a script element."""
    return [
        {
            "name": chart["name"],
            "text": chart["text"],
            "height": chart["figure"]["layout"]["height"],
            "json": Markup(json.dumps(chart["figure"], allow_nan=False).replace("<", "\\u003c")),  # noqa: S704
        }
        for chart in charts(run)
    ]


def _pairs(rows: Sequence[Row], count: int = 6) -> list[dict[str, Any]]:
    """Return pictures of the audits whose worst image is most exposed, in the order of training."""
    pictured = [row for row in rows if row.pairs is not None and row.pairs.is_file()]
    worst = sorted(pictured, key=lambda row: -float(row.record.exposure.max()))[:count]
    return [_pair(row) for row in sorted(worst, key=lambda row: row.record.step)]


def _pair(row: Row) -> dict[str, Any]:
    assert row.pairs is not None
    record = row.record
    order = sorted(range(record.batch_size), key=lambda index: -float(record.exposure[index]))
    return {
        "step": record.step,
        "png": base64.b64encode(row.pairs.read_bytes()).decode(),
        "exposures": [float(record.exposure[index]) for index in order],
        "ids": [record.ids[index] for index in order] if record.ids else [],
    }

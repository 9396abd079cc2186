"""The report as one HTML file that needs no network, and as a Markdown section for a model card."""

from __future__ import annotations

import base64
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup
from plotly.offline import get_plotlyjs

from lightning_gradaudit.errors import InvalidInputError
from lightning_gradaudit.report.content import CAVEATS, markdown, plain, section
from lightning_gradaudit.report.interactive import charts
from lightning_gradaudit.report.run import Row, Run
from lightning_gradaudit.utils.files import read_picture
from lightning_gradaudit.utils.formatting import number, printable

TITLE = "Gradient leakage audit"


def write_report(runs: Sequence[Run], path: str | Path, *, title: str = TITLE) -> Path:
    """Write one self-contained HTML file with interactive charts.

    Plotly's script is part of it, 4.8 MB however many runs are shown. Pairs of true and reconstructed images appear
    when the run kept them (`log_images=True`); the file is then as private as they are. Only PNG files inside the run's
    folder are taken, and the report says which were left out.

    Args:
        runs: Runs to show, in this order.
        path: File to write; its folder is made.
        title: Heading.

    Raises:
        InvalidInputError: When the file cannot be written.
    """
    sections = [section(run) | {"charts": _charts(run)} | _pairs(run) for run in runs]
    page = (
        _environment(html=True)
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

    Raises:
        InvalidInputError: When the file cannot be written.
    """
    text = (
        _environment(html=False)
        .get_template("template.md")
        .render(title=title, runs=[section(run) for run in runs], caveats=CAVEATS)
    )
    return _write(path, text)


def _environment(*, html: bool) -> Environment:
    """Escape whatever a template prints for its medium; only `Markup` is printed as it is."""
    escape = plain if html else markdown
    environment = Environment(
        loader=PackageLoader("lightning_gradaudit", "report"),
        autoescape=html,  # noqa: S701 - Markdown is escaped below
        finalize=lambda value: value if isinstance(value, Markup) else escape(value),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["number"] = lambda *value: Markup(number(*value))  # noqa: S704 - digits
    return environment


def _write(path: str | Path, text: str) -> Path:
    path = Path(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise InvalidInputError(f"path: the report cannot be written to {path} ({error.strerror}).") from error
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


def _pairs(run: Run, count: int = 6) -> dict[str, list[Any]]:
    """Return pictures of the audits whose worst image is most exposed, in the order of training; and why some are not.

    A run whose pictures were deleted has none.
    """
    pictured = [row for row in run.rows if row.pairs is not None and os.path.lexists(row.pairs)]
    worst = sorted(pictured, key=lambda row: -float(row.record.exposure.max()))[:count]
    pairs, left_out = [], []
    for row in sorted(worst, key=lambda row: row.record.step):
        try:
            pairs.append(_pair(row, read_picture(run.folder, str(row.pairs))))
        except InvalidInputError as error:
            left_out.append(f"Step {row.record.step}: {printable(error)}")
    return {"pairs": pairs, "left_out": left_out}


def _pair(row: Row, png: bytes) -> dict[str, Any]:
    record = row.record
    order = sorted(range(record.batch_size), key=lambda index: -float(record.exposure[index]))
    return {
        "step": record.step,
        "png": Markup(base64.b64encode(png).decode()),  # noqa: S704 - letters, digits, "+", "/" and "="
        "exposures": [float(record.exposure[index]) for index in order],
        "ids": [record.ids[index] for index in order] if record.ids else [],
    }

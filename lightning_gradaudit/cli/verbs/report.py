"""`gradaudit report`: write a report of audited runs."""

from __future__ import annotations

import argparse
import json

from lightning_gradaudit.cli.output import import_report_module
from lightning_gradaudit.utils.formatting import printable


def run(options: argparse.Namespace) -> int:
    """Write the report and print its path; return 0."""
    html, runs = import_report_module("html"), import_report_module("run")
    loaded = [runs.load_run(folder) for folder in options.folders]
    write = html.write_markdown if options.format == "md" else html.write_report
    path = write(loaded, options.out / f"report.{options.format}")
    print(json.dumps({"report": str(path)}) if options.json else f"Report: {printable(path)}")
    return 0

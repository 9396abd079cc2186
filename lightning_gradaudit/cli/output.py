"""How the verbs print and write."""

from __future__ import annotations

import argparse
import importlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lightning_gradaudit.cli.parser import LONGEST_MESSAGE
from lightning_gradaudit.errors import InvalidInputError
from lightning_gradaudit.utils.formatting import plain_table, printable, sentences


def write_text(folder: Path, name: str, text: str) -> None:
    """Write a file into a folder that is made where it is missing.

    Raises:
        InvalidInputError: When it cannot be written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text, encoding="utf-8")
    except OSError as error:
        raise InvalidInputError(f"--out: {folder / name} cannot be written ({error.strerror}).") from error


def print_verdict(options: argparse.Namespace, verdict: dict[str, Any]) -> None:
    """Print a verdict as one line of text, or as JSON."""
    about = f" Judged: {verdict['judged']}." if "judged" in verdict else ""
    text = f"{sentences(verdict)}{about}"
    print(json.dumps(verdict) if options.json else printable(text, LONGEST_MESSAGE))


def print_table(rows: Sequence[Sequence[str]], title: str) -> None:
    """Print a table; without rich, in plain characters."""
    try:
        terminal = import_report_module("terminal")
    except InvalidInputError:
        cells = [[printable(cell) for cell in row] for row in rows]
        print(f"{printable(title, LONGEST_MESSAGE)}\n{plain_table(cells)}")
    else:
        terminal.console().print(terminal.text_table(rows, title))


def import_report_module(module: str) -> Any:
    """Import a part of the report package, whose libraries are an extra.

    Raises:
        InvalidInputError: When one of them is missing.
    """
    try:
        return importlib.import_module(f"lightning_gradaudit.report.{module}")
    except ImportError as error:
        raise InvalidInputError(
            f"{error.name} is missing: pip install 'lightning-gradaudit[report]' (demo: [demo])."
        ) from error

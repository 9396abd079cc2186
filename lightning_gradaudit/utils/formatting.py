"""How numbers and tables look, in terminals, notebooks and reports alike."""

from __future__ import annotations

import math
from collections.abc import Sequence
from html import escape
from typing import Any


def number(value: Any, digits: int = 2) -> str:
    """Format a number, or a dash for what was not measured."""
    if value is None or (isinstance(value, float) and not math.isfinite(value)):
        return "–"
    return f"{float(value):.{digits}f}"


def html_table(rows: Sequence[Sequence[str]], *, caption: str) -> str:
    """Return a header and lines of text as an HTML table, everything escaped."""
    header, *lines = rows
    head = "".join(f"<th scope='col'>{escape(cell)}</th>" for cell in header)
    body = "".join(f"<tr>{''.join(f'<td>{escape(cell)}</td>' for cell in line)}</tr>" for line in lines)
    return (
        f"<table><caption style='text-align: left'>{escape(caption)}</caption>"
        f"<thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"
    )


def plain_table(rows: Sequence[Sequence[str]]) -> str:
    """Return a header and lines of text with their columns aligned."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows)
    return "\n".join(lines)

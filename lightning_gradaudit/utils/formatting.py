"""How text, numbers and tables look, in terminals, notebooks and reports alike."""

from __future__ import annotations

import math
import re
import unicodedata
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

# What a terminal obeys: CSI ("ESC [ ... letter"), strings up to BEL or ST (titles, links), and two-byte sequences.
_ESCAPES = re.compile(
    r"(?:\x1b\[|\x9b)[0-?]*[ -/]*[@-~]"
    r"|(?:\x1b[\]PX^_]|[\x90\x98\x9d-\x9f])[^\x07\x1b\x9c]*(?:\x07|\x1b\\|\x9c)?"
    r"|\x1b[ -/]*[0-~]"
)
MOST_DIGITS = 17
"""Behind the decimal point, in figures beside a limit; what is closer is written in full."""


def number(value: Any, digits: int = 2) -> str:
    """Format a number, or a dash for what was not measured."""
    if value is None or (isinstance(value, float) and not math.isfinite(value)):
        return "–"
    return f"{float(value):.{digits}f}"


def numbers_beside(limit: float | None, *values: float | None, digits: int = 2) -> list[str]:
    """Format a limit and figures that stand beside it, with the fewest digits that show which differ from it.

    Args:
        limit: What they are compared with.
        values: The figures.
        digits: Behind the decimal point, at least.

    Returns:
        The limit's text, then those of the figures. No figure that differs from the limit has the limit's text; what
        was not measured is a dash.

    Example:
        >>> numbers_beside(0.3, 0.3004, 0.1)
        ['0.3000', '0.3004', '0.1000']
    """
    figures = (limit, *values)
    measured = [float(value) for value in figures if value is not None and math.isfinite(value)]
    if limit is None or not math.isfinite(limit):
        return [number(value, digits) for value in figures]
    for enough in range(digits, MOST_DIGITS):
        # Compared as numbers, for "-0.00" is not another number than "0.00".
        if all(value == limit or float(number(value, enough)) != float(number(limit, enough)) for value in measured):
            return [number(value, enough) for value in figures]
    return [number(value) if number(value) == "–" else repr(value) for value in figures]


def sentences(verdict: Mapping[str, Any]) -> str:
    """Return status, reasons and action of a verdict, as `Verdict.to_dict` gives them, in one line."""
    return " ".join((f"{verdict['status']}:", *verdict["reasons"], *settling(verdict)))


def settling(verdict: Mapping[str, Any]) -> list[str]:
    """Return the sentence with the action, or none; verdicts of older versions have no action."""
    action = verdict.get("action", "")
    return [f"To settle it: {action}."] if action else []


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


def printable(text: object, limit: int = 500) -> str:
    """Return text as one line that a terminal only shows, and does not obey.

    Args:
        text: Anything; an exception gives its message.
        limit: Characters at most; what is longer ends in "…".

    Returns:
        The text without escape sequences; white space of any kind becomes one space, other control and format
        characters (among them those that turn the writing direction round) become "�".
    """
    said = _ESCAPES.sub("", str(text)[: 4 * limit])
    said = " ".join("".join(" " if c in "\t\n\r\x0b\x0c\x85\u2028\u2029" else c for c in said).split())
    shown = "".join("\ufffd" if unicodedata.category(c) in ("Cc", "Cf", "Cs", "Co", "Cn") else c for c in said)
    return shown if len(shown) <= limit else f"{shown[: limit - 1]}…"

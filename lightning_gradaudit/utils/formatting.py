"""How text, numbers and tables look, in terminals, notebooks and reports alike."""

from __future__ import annotations

import math
import re
import unicodedata
from collections.abc import Sequence
from html import escape
from typing import Any

# What a terminal obeys: CSI ("ESC [ ... letter"), strings up to BEL or ST (titles, links), and two-byte sequences.
_ESCAPES = re.compile(
    r"(?:\x1b\[|\x9b)[0-?]*[ -/]*[@-~]"
    r"|(?:\x1b[\]PX^_]|[\x90\x98\x9d-\x9f])[^\x07\x1b\x9c]*(?:\x07|\x1b\\|\x9c)?"
    r"|\x1b[ -/]*[0-~]"
)


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

"""Tables for the terminal."""

from __future__ import annotations

import sys
from collections.abc import Sequence

import torch
from rich.box import SIMPLE_HEAD
from rich.color import Color
from rich.console import Console
from rich.style import Style
from rich.table import Table
from rich.text import Text
from torch import Tensor

from lightning_gradaudit.audit.summary import MEASURES
from lightning_gradaudit.report.run import Run
from lightning_gradaudit.utils.formatting import number, numbers_beside, printable, sentences

_INKS = " .:-=+*#%@"
"""Characters from white to black."""
# A line of 80 characters holds all columns.
_COLUMNS = {
    "exposure": "expos.", "exposure_max": "worst", "psnr": "PSNR", "ssim": "SSIM", "null": "null",
    "identified": "ident.", "label_accuracy": "labels",
}  # fmt: skip
_COLOURS = {"PASS": "green", "BLOCK": "red", "UNKNOWN": "yellow"}


def audits_table(run: Run) -> Table:
    """Tabulate every audit of a run."""
    table = Table(title=shown(f"{run.name}: audits"), title_justify="left", box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for column in ("step", "risk (95% bounds)", *_COLUMNS.values()):
        table.add_column(column, justify="right", no_wrap=True)
    table.add_column("verdict", no_wrap=True)
    for row in run.rows:
        risk = row.risk
        status = str(risk.get("status", ""))
        _, now, low, high = numbers_beside(*(risk.get(name) for name in ("limit", "risk", "low", "high")))
        table.add_row(
            str(row.record.step),
            f"{now} ({low}-{high})",
            *(number(MEASURES[name].of(row.record), MEASURES[name].digits) for name in _COLUMNS),
            shown(status, _COLOURS.get(status, "white")),
        )
    return table


def decisions_table(runs: Sequence[Run], *, last_only: bool = False) -> Table:
    """Tabulate the gate's decisions about checkpoints, with their reasons."""
    table = Table(title="checkpoints", title_justify="left", box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for column in ("run", "checkpoint", "decision"):
        table.add_column(column, no_wrap=True)
    table.add_column("why", overflow="fold")
    for run in runs:
        for decision in run.decisions[-1:] if last_only else run.decisions:
            outcome = shown("released", "green") if decision["released"] else shown("blocked", "red")
            table.add_row(shown(run.name), shown(decision["checkpoint"]), outcome, shown(sentences(decision)))
    return table


def text_table(rows: Sequence[Sequence[str]], title: str) -> Table:
    """Show a header and lines of text."""
    header, *lines = rows
    table = Table(title=shown(title), title_justify="left", box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for at, column in enumerate(header):
        table.add_column(shown(column), justify="right" if at else "left", overflow="fold")
    for line in lines:
        table.add_row(*map(shown, line))
    return table


def picture(pixels: Tensor, console: Console) -> Text:
    """Draw a small picture, two pixels to a character: in colours where the terminal has 256 or more, else in grey.

    Args:
        pixels: (C, H, W) in [0, 1], with one or three channels.
        console: Where it will be printed.
    """
    pixels = pixels.detach().float().cpu().clamp(0, 1)
    if pixels.shape[1] % 2:
        pixels = torch.nn.functional.pad(pixels, (0, 0, 0, 1), value=1.0)
    upper, lower = pixels[:, ::2], pixels[:, 1::2]
    if not console.is_terminal or console.color_system not in ("256", "truecolor") or console.options.ascii_only:
        ink = (1 - (upper + lower).mean(0) / 2) * (len(_INKS) - 1)
        return Text("\n".join("".join(_INKS[level] for level in row) for row in ink.round().long().tolist()))
    drawn = Text()
    upper, lower = ((255 * half).round().long().expand(3, -1, -1).permute(1, 2, 0) for half in (upper, lower))
    for above, below in zip(upper.tolist(), lower.tolist(), strict=True):
        for one, other in zip(above, below, strict=True):
            drawn.append("\N{UPPER HALF BLOCK}", Style(color=Color.from_rgb(*one), bgcolor=Color.from_rgb(*other)))
        drawn.append("\n")
    return drawn


def shown(text: str, colour: str = "") -> Text:
    """Return text of others of others, in which the terminal finds no commands and rich no markup."""
    return Text(printable(text, 5000), style=colour)


def console(*, quiet: bool = False) -> Console:
    """Return a console for people; quiet when the output is for machines."""
    return Console(quiet=quiet, highlight=False, width=None if sys.stdout.isatty() else 100)

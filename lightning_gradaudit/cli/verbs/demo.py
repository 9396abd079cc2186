"""`gradaudit demo`: audit the training of a face detector, and gate its checkpoints."""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

import torch

from lightning_gradaudit.cli.output import import_report_module
from lightning_gradaudit.cli.settings import DemoSettings

_INTRODUCTION = (
    "Training a face detector twice: with its gradient as it is, and with noise of thirty times its norm added before "
    "it leaves, which training then goes on with. Audits run beside it, in two processes."
)


def run(options: argparse.Namespace) -> int:
    """Train, audit and report; return 0."""
    started = time.monotonic()
    terminal, html = import_report_module("terminal"), import_report_module("html")
    console = terminal.console(quiet=options.json)
    console.print(_INTRODUCTION)
    from lightning_gradaudit.cli.demo import FirstFace, run_demo

    out = Path(options.out)
    for old in ("undefended", "defended"):  # what an earlier demo left
        shutil.rmtree(out / old, ignore_errors=True)
    torch.set_num_threads(1)  # audits have the other cores
    runs = run_demo(
        out,
        DemoSettings(epochs=options.epochs, audits=options.audits, evaluations=options.evaluations, seed=options.seed),
        first_face=FirstFace(out / "first_face.png", partial(_show_face, terminal, console, started)),
        loggers=_choose_loggers(options),
        progress=not (options.json or options.no_progress),
    )
    report = html.write_report(runs, out / "report.html", title="Demo: what the gradients gave away")
    for each in runs:
        console.print(terminal.audits_table(each))
    console.print(terminal.decisions_table(runs, last_only=True))
    said = ", ".join(
        f"{each.name} {json.loads((out / each.name / 'accuracy.json').read_text())['accuracy']:.0%}" for each in runs
    )
    console.print(f"Accuracy on the 200 photographs that it was trained on (half are faces): {said}.")
    curves = [out / each.name / "metrics.csv" for each in runs]
    console.print(f"Report: {report}\nCurves: {', '.join(map(str, curves))}")
    if options.json:
        print(
            json.dumps({each.name: {"decisions": each.decisions, "evidence": each.evidence.to_dict()} for each in runs})
        )
    return 0


def _show_face(terminal: Any, console: Any, started: float, record: Any, face: int, path: Path) -> None:
    """Print the first recovered face above the progress bars."""
    if console.quiet:
        return
    from tqdm import tqdm

    pair = torch.cat([record.truth[face], torch.ones_like(record.truth[face])[..., :2], record.pixels[face]], -1)
    with console.capture() as captured:
        console.print(
            f"\nThe first recovered face, {time.monotonic() - started:.0f} s after the start: a photograph of step "
            f"{record.step} (left) and what came back from its gradient (right).\n"
            f"Exposure {record.exposure[face]:.2f} of 1, PSNR {record.psnr[face]:.1f} dB. Picture: {path}"
        )
        console.print(terminal.picture(pair, console))
    tqdm.write(captured.get(), file=sys.stdout)


def _choose_loggers(options: argparse.Namespace) -> list[Any]:
    from pytorch_lightning.loggers import TensorBoardLogger, WandbLogger

    chosen: list[Any] = []
    if options.wandb:
        chosen.append(partial(WandbLogger, offline=True))
    if options.tensorboard:
        chosen.append(partial(TensorBoardLogger, version=""))
    return chosen

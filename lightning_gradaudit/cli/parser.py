"""The arguments of the `gradaudit` command, as one table; nothing here imports torch, so that `--help` is quick."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from lightning_gradaudit._version import __version__
from lightning_gradaudit.cli.settings import ARCHITECTURES, DemoSettings
from lightning_gradaudit.utils.formatting import printable

MISUSE, BROKEN = 64, 70
"""Exit status: an argument or file is not what was expected; a fault of this program."""
LONGEST_MESSAGE = 5000
"""Characters of a message on the terminal."""
_EXIT = """exit status:
  0   done; for gate: PASS, the checkpoint may leave
  1   gate: BLOCK, the risk exceeds the limit
  2   gate: UNKNOWN, the audits do not settle it; do not release
  64  misuse: an argument, file or value is not what was expected; the message names it
  70  a fault of this program; gate then says UNKNOWN and exits 2. "python -X dev -m lightning_gradaudit.cli VERB ..."
      shows where
"""
_OVERVIEW = """how it goes together:
  1. Train with GradAudit() among the Trainer's callbacks; it writes a run folder beside the logger's files.
  2. gradaudit report RUN                       look at it
  3. gradaudit gate MODEL --max-risk 0.3        decide about a checkpoint, in a pipeline

start with:
  gradaudit demo
"""
_DEMO = DemoSettings()

Argument = tuple[tuple[str, ...], dict[str, Any]]


def _argument(*names: str, **options: Any) -> Argument:
    """Keep the arguments of `ArgumentParser.add_argument` for later."""
    return names, options


_EVALUATIONS = "simulated gradients of an audit (default: %(default)s)"
_SEED = "random seed (default: %(default)s)"


@dataclass(frozen=True, kw_only=True)
class Verb:
    """One verb of the command; what it does is `run(options)` of the module of its name in `cli.verbs`.

    Attributes:
        name: As typed.
        about: One line of help.
        examples: What the end of its help shows.
        out: Default folder of its files; None: no file is written unless one is named.
        writes: Whether it has `--json` and `--out`.
        arguments: Its own.
    """

    name: str
    about: str
    examples: str
    out: str | None = None
    writes: bool = True
    arguments: Sequence[Argument] = ()


VERBS = (
    Verb(
        name="demo",
        about="Train a face detector on real photographs, audit it, gate its checkpoints.",
        out="gradaudit-demo",
        examples="""example:
  gradaudit demo --out gradaudit-demo && open gradaudit-demo/report.html

Two runs on 200 photographs, about a minute: as it is, and with noise added to the shared gradient. The first is
blocked, the second released.
""",
        arguments=(
            _argument("--epochs", type=int, default=_DEMO.epochs,
                      help="epochs of 100 steps per run (default: %(default)s)"),
            _argument("--audits", type=int, default=_DEMO.audits,
                      help="audited steps of the defended run; the other has a third (default: %(default)s)"),
            _argument("--evaluations", type=int, default=_DEMO.evaluations, help=_EVALUATIONS),
            _argument("--seed", type=int, default=_DEMO.seed, help=_SEED),
            _argument("--wandb", action="store_true", help="also log to Weights & Biases, offline"),
            _argument("--tensorboard", action="store_true", help="also log to TensorBoard"),
            _argument("--no-progress", action="store_true", help="hide progress bars"),
        ),
    ),
    Verb(
        name="audit",
        about="Attack one saved snapshot (Snapshot.save) and print the record.",
        examples="""example:
  python -c "snapshot = Snapshot.from_batch(model, batch, loss=loss); snapshot.save('step.pt')"
  gradaudit audit step.pt --trust --evaluations 2000

A snapshot holds your model as code, which loading runs: --trust says that you know who made the file.

exposure: how far a reconstruction goes beyond a guess, 0 to 1. ceiling: a local estimate of what any attacker could
get. effort: simulated gradients until the image was exposed; "> N" if the budget of N ended first.
""",
        arguments=(
            _argument("snapshot", type=Path, help="file written by Snapshot.save"),
            _argument("--trust", action="store_true", help="run the code that the snapshot holds; required"),
            _argument("--evaluations", type=int, default=800, help=_EVALUATIONS),
            _argument("--seed", type=int, default=0, help=_SEED),
        ),
    ),
    Verb(
        name="report",
        about="Write a report of one or more audited runs.",
        out=".",
        examples="""examples:
  gradaudit report lightning_logs/version_0                 writes report.html, one file with everything in it
  gradaudit report run_a run_b --out reports                several runs on one page
  gradaudit report run_a --format md --out .                a section for a model card or data-protection assessment

Images appear only if the run kept them (log_images=True), blurred until clicked; the file is then as private as they
are.
""",
        arguments=(
            _argument("folders", type=Path, nargs="+", metavar="RUN", help="run folder (holds records.jsonl)"),
            _argument("--format", choices=("html", "md"), default="html",
                      help="a page with charts, or a section for a model card (default: %(default)s)"),
        ),
    ),
    Verb(
        name="compare",
        about="Compare architectures or checkpoints on the same images.",
        examples="""examples:
  gradaudit compare                                         small built-in networks after 0, 1 and 5 epochs
  gradaudit compare --own net.py:build=weights.ckpt --data images.npz --images 16 --evaluations 1000
""",
        arguments=(
            _argument("--models", nargs="*", choices=ARCHITECTURES, default=None, metavar="NAME",
                      help=f"built-in ones: {', '.join(ARCHITECTURES)}; default: all, or none with --own"),
            _argument("--epochs", type=int, nargs="+", default=[0, 1, 5],
                      help="epochs of training of the built-in ones (default: 0 1 5)"),
            _argument("--own", nargs="+", default=[], metavar="FILE.py:NAME[=CHECKPOINT]",
                      help="your models: a callable that returns one, and its weights"),
            _argument("--data", type=Path, metavar="NPZ",
                      help="images uint8 (N, C, H, W) and labels; default: photographs of scikit-image"),
            _argument("--images", type=int, default=4, help="images to attack (default: %(default)s)"),
            _argument("--batch-size", type=int, default=1, help="images behind a gradient"),
            _argument("--train-mode", action="store_true", help="BatchNorm and dropout as in training"),
            _argument("--evaluations", type=int, default=200, help=_EVALUATIONS),
            _argument("--compile", action="store_true",
                      help="compile evaluations; pays from some thousands of them for each architecture"),
            _argument("--seed", type=int, default=0, help=_SEED),
        ),
    ),
    Verb(
        name="gate",
        about="Decide whether a checkpoint or run may be released: exit 0 pass, 1 block, 2 unknown.",
        examples="""examples:
  gradaudit gate model.ckpt --max-risk 0.3 && ./publish model.ckpt
  gradaudit gate lightning_logs/version_0 --max-risk 0.3 --json --out verdicts

PASS takes at least 29 audits of new images without a finding. What cannot be read is UNKNOWN, never PASS.
""",
        arguments=(
            _argument("path", type=Path, help="checkpoint with a stamp, its .gradaudit.json, or a run folder"),
            _argument("--max-risk", type=float, required=True, help="limit in [0, 1]"),
            _argument("--statistic", choices=("worst", "p90", "mean"), default="worst", help="default: %(default)s"),
            _argument("--memory", choices=("run", "window"), default="run",
                      help="whether exposures older than the newest window count (default: %(default)s)"),
            _argument("--independent", choices=("audits", "images"), default="audits",
                      help="what is taken to be independent; see docs/risk.md (default: %(default)s)"),
            _argument("--max-age", type=int, default=None, help="steps after which the newest audit is stale"),
            _argument("--trust", action="store_true", help="allow a checkpoint that must be unpickled"),
        ),
    ),
    Verb(
        name="completion",
        about="Print a script that completes the command in your shell.",
        examples="""examples:
  gradaudit completion bash > ~/.local/share/bash-completion/completions/gradaudit
  gradaudit completion zsh > ~/.zfunc/_gradaudit
""",
        writes=False,
        arguments=(_argument("shell", choices=("bash", "zsh", "tcsh")),),
    ),
)  # fmt: skip


class _Parser(argparse.ArgumentParser):
    """A parser whose complaints are misuse: argparse's own status, 2, would read as UNKNOWN."""

    def error(self, message: str) -> NoReturn:
        self.print_usage(sys.stderr)
        self.exit(MISUSE, f"{self.prog}: {printable(message, LONGEST_MESSAGE)}\n")


def build_parser() -> argparse.ArgumentParser:
    """Build the parser of all verbs; the options it returns name theirs as `verb`."""
    parser = _Parser(
        prog="gradaudit",
        description="Audit what a training gradient gives away.",
        epilog=f"{_OVERVIEW}\n{_EXIT}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=__version__)
    verbs = parser.add_subparsers(required=True, metavar="VERB", dest="verb")
    for verb in VERBS:
        _add_verb(verbs, verb)
    return parser


def _add_verb(verbs: Any, verb: Verb) -> None:
    parser = verbs.add_parser(
        verb.name,
        help=verb.about,
        description=verb.about,
        epilog=f"{verb.examples}\n{_EXIT}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    if verb.writes:
        parser.add_argument("--json", action="store_true", help="print the result as JSON")
        parser.add_argument(
            "--out", type=Path, default=verb.out, metavar="DIR", help="folder for files (default: %(default)s)"
        )
    for names, options in verb.arguments:
        parser.add_argument(*names, **options)

"""The `gradaudit` command."""

from __future__ import annotations

import argparse
import json
import logging
import os
import runpy
import shutil
import sys
import traceback
import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import torch

from lightning_gradaudit._version import __version__
from lightning_gradaudit.attacks.budget import Budget
from lightning_gradaudit.audit.comparison import compare
from lightning_gradaudit.audit.engine import audit_snapshot
from lightning_gradaudit.cli.architectures import BUILT_IN, training_states
from lightning_gradaudit.errors import GradAuditError, InvalidInputError
from lightning_gradaudit.risk.gate import RiskGate
from lightning_gradaudit.risk.release import judge
from lightning_gradaudit.risk.verdict import Status
from lightning_gradaudit.simulation.snapshot import Snapshot
from lightning_gradaudit.utils.files import load_checkpoint, printable, regular_file
from lightning_gradaudit.utils.formatting import plain_table

MISUSE, BROKEN = 64, 70
_DATA_LIMIT = 8 * 2**30
_LONGEST = 5000
_EXIT = """exit status:
  0   done; for gate: PASS, the checkpoint may leave
  1   gate: BLOCK, the risk exceeds the limit
  2   gate: UNKNOWN, the audits do not settle it; do not release
  64  misuse: an argument, file or value is not what was expected; the message names it
  70  a fault of this program; gate then says UNKNOWN and exits 2. "python -X dev -m lightning_gradaudit.cli VERB ..."
      shows where
"""
_TEACH = {
    "": """how it goes together:
  1. Train with GradAudit() among the Trainer's callbacks; it writes a run folder beside the logger's files.
  2. gradaudit report RUN                       look at it
  3. gradaudit gate MODEL --max-risk 0.3        decide about a checkpoint, in a pipeline

start with:
  gradaudit demo
""",
    "demo": """example:
  gradaudit demo --out gradaudit-demo && open gradaudit-demo/report.html

Two runs on 200 photographs, a minute or two: as it is, and with noise added to the shared gradient. The first is
blocked, the second released.
""",
    "audit": """example:
  python -c "snapshot = Snapshot.from_batch(model, batch, loss=loss); snapshot.save('step.pt')"
  gradaudit audit step.pt --trust --evaluations 2000

A snapshot holds your model as code, which loading runs: --trust says that you know who made the file.

exposure: how far a reconstruction goes beyond a guess, 0 to 1. ceiling: a local estimate of what any attacker could
get. effort: simulated gradients until the image was exposed; "> N" if the budget of N ended first.
""",
    "report": """examples:
  gradaudit report lightning_logs/version_0                 writes report.html, one file with everything in it
  gradaudit report run_a run_b --out reports                several runs on one page
  gradaudit report run_a --format md --out .                a section for a model card or data-protection assessment

Images appear only if the run kept them (log_images=True), blurred until clicked; the file is then as private as they
are.
""",
    "compare": """examples:
  gradaudit compare                                         small built-in networks after 0, 1 and 5 epochs
  gradaudit compare --own net.py:build=weights.ckpt --data images.npz --images 16 --evaluations 1000
""",
    "gate": """examples:
  gradaudit gate model.ckpt --max-risk 0.3 && ./publish model.ckpt
  gradaudit gate lightning_logs/version_0 --max-risk 0.3 --json --out verdicts

PASS takes at least 29 audits of new images without a finding. What cannot be read is UNKNOWN, never PASS.
""",
    "completion": """examples:
  gradaudit completion bash > ~/.local/share/bash-completion/completions/gradaudit
  gradaudit completion zsh > ~/.zfunc/_gradaudit
""",
}
CEILING_CAVEAT = (
    "exposure: what the attack got beyond a guess; ceiling: a local estimate of what any attacker could get, no "
    "guarantee; effort: simulated gradients until half of the images were exposed; exact: given away by algebra."
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command and return its exit status."""
    parser = build_parser()
    options = parser.parse_args(arguments)
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # a terminal of few characters must not end a verdict in a traceback
            stream.reconfigure(errors="backslashreplace")
    try:
        status = int(options.run(options))
        sys.stdout.flush()
    except GradAuditError as error:
        return _complain(options, str(error), MISUSE)
    except (Exception, SystemExit) as error:
        # A traceback would exit with 1, which reads as BLOCK; SystemExit comes from a user's file, and could say 0.
        if sys.flags.dev_mode:
            traceback.print_exc()
        return _fail(options, error)
    return status


def _fail(options: argparse.Namespace, error: BaseException) -> int:
    """Report a fault of this program; the gate fails closed."""
    said = f"unexpected {type(error).__name__}: {printable(error, 300)}"
    try:
        if options.run is not _gate:
            return _complain(options, said, BROKEN)
        print(f"gradaudit: {said}", file=sys.stderr)
        _say(options, {"status": str(Status.UNKNOWN), "reasons": [said], "limit": options.max_risk})
        sys.stdout.flush()
    except OSError:  # nobody listens; the interpreter would complain about that, with a status of its own
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return Status.UNKNOWN.exit_code if options.run is _gate else BROKEN


def _complain(options: argparse.Namespace, said: str, status: int) -> int:
    print(f"gradaudit: {printable(said, _LONGEST)}", file=sys.stderr)
    if getattr(options, "json", False):
        print(json.dumps({"error": said}))
    sys.stdout.flush()
    return status


def _say(options: argparse.Namespace, verdict: dict[str, Any]) -> None:
    about = f" Judged: {verdict['judged']}." if "judged" in verdict else ""
    text = f"{verdict['status']}: {' '.join(verdict['reasons'])}{about}"
    print(json.dumps(verdict) if options.json else printable(text, _LONGEST))


class _Parser(argparse.ArgumentParser):
    """A parser whose complaints are misuse: argparse's own status, 2, would read as UNKNOWN."""

    def error(self, message: str) -> NoReturn:
        self.print_usage(sys.stderr)
        self.exit(MISUSE, f"{self.prog}: {printable(message, _LONGEST)}\n")


def build_parser() -> argparse.ArgumentParser:
    """Build the parser of all verbs."""
    parser = _Parser(
        prog="gradaudit",
        description="Audit what a training gradient gives away.",
        epilog=f"{_TEACH['']}\n{_EXIT}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=__version__)
    verbs = parser.add_subparsers(required=True, metavar="VERB")

    def verb(name: str, run: Callable[[argparse.Namespace], int], about: str, out: str | None) -> Any:
        sub = verbs.add_parser(
            name,
            help=about,
            description=about,
            epilog=f"{_TEACH[name]}\n{_EXIT}",
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        sub.set_defaults(run=run)
        if name == "completion":
            return sub
        sub.add_argument("--json", action="store_true", help="print the result as JSON")
        sub.add_argument("--out", type=Path, default=out, metavar="DIR", help="folder for files (default: %(default)s)")
        return sub

    demo = verb("demo", _demo, "Train a face detector on real photographs, audit it, gate its checkpoints.",
                "gradaudit-demo")  # fmt: skip
    demo.add_argument("--epochs", type=int, default=10, help="epochs of 100 steps per run (default: %(default)s)")
    demo.add_argument("--audits", type=int, default=40, help="audited steps per run (default: %(default)s)")
    demo.add_argument("--evaluations", type=int, default=300, help="budget of an audit (default: %(default)s)")
    demo.add_argument("--executor", choices=("auto", "inline", "thread", "process"), default="auto")
    demo.add_argument("--seed", type=int, default=1, help="random seed (default: %(default)s)")
    demo.add_argument("--wandb", action="store_true", help="also log to Weights & Biases, offline")
    demo.add_argument("--tensorboard", action="store_true", help="also log to TensorBoard")
    demo.add_argument("--no-progress", action="store_true", help="hide progress bars")

    audit = verb("audit", _audit, "Attack one saved snapshot (Snapshot.save) and print the record.", None)
    audit.add_argument("snapshot", type=Path, help="file written by Snapshot.save")
    audit.add_argument("--trust", action="store_true", help="run the code that the snapshot holds; required")
    audit.add_argument("--evaluations", type=int, default=800, help="budget (default: %(default)s)")
    audit.add_argument("--seed", type=int, default=0, help="random seed (default: %(default)s)")

    report = verb("report", _report, "Write a report of one or more audited runs.", ".")
    report.add_argument("folders", type=Path, nargs="+", metavar="RUN", help="run folder (holds records.jsonl)")
    report.add_argument("--format", choices=("html", "md"), default="html",
                        help="a page with charts, or a section for a model card (default: %(default)s)")  # fmt: skip

    compare = verb("compare", _compare, "Compare architectures or checkpoints on the same images.", None)
    compare.add_argument("--models", nargs="*", choices=tuple(BUILT_IN), default=None, metavar="NAME",
                         help=f"built-in ones: {', '.join(BUILT_IN)}; default: all, or none with --own")  # fmt: skip
    compare.add_argument("--epochs", type=int, nargs="+", default=[0, 1, 5],
                         help="epochs of training of the built-in ones (default: 0 1 5)")  # fmt: skip
    compare.add_argument("--own", nargs="+", default=[], metavar="FILE.py:NAME[=CHECKPOINT]",
                         help="your models: a callable that returns one, and its weights")  # fmt: skip
    compare.add_argument("--data", type=Path, metavar="NPZ",
                         help="images uint8 (N, C, H, W) and labels; default: photographs of scikit-image")  # fmt: skip
    compare.add_argument("--images", type=int, default=4, help="images to attack (default: %(default)s)")
    compare.add_argument("--batch-size", type=int, default=1, help="images behind a gradient")
    compare.add_argument("--train-mode", action="store_true", help="BatchNorm and dropout as in training")
    compare.add_argument("--evaluations", type=int, default=200, help="budget of an audit (default: %(default)s)")
    compare.add_argument(
        "--compile",
        action="store_true",
        help="compile evaluations; pays from some thousands of them for each architecture",
    )
    compare.add_argument("--seed", type=int, default=0, help="random seed (default: %(default)s)")

    gate = verb("gate", _gate, "Decide whether a checkpoint or run may be released: exit 0 pass, 1 block, 2 unknown.",
                None)  # fmt: skip
    gate.add_argument("path", type=Path, help="checkpoint with a stamp, its .gradaudit.json, or a run folder")
    gate.add_argument("--max-risk", type=float, required=True, help="limit in [0, 1]")
    gate.add_argument("--statistic", choices=("worst", "p90", "mean"), default="worst", help="default: %(default)s")
    gate.add_argument("--memory", choices=("run", "window"), default="run",
                      help="whether exposures older than the newest window count (default: %(default)s)")  # fmt: skip
    gate.add_argument("--independent", choices=("audits", "images"), default="audits",
                      help="what is taken to be independent; see docs/risk.md (default: %(default)s)")  # fmt: skip
    gate.add_argument("--max-age", type=int, default=None, help="steps after which the newest audit is stale")
    gate.add_argument("--trust", action="store_true", help="allow a checkpoint that must be unpickled")

    completion = verb("completion", _completion, "Print a script that completes the command in your shell.", None)
    completion.add_argument("shell", choices=("bash", "zsh", "tcsh"))
    return parser


def _demo(options: argparse.Namespace) -> int:
    terminal, html = _optional("terminal"), _optional("html")
    from lightning_gradaudit.cli.demo import DemoSettings, run_demo

    for old in ("undefended", "defended"):  # what an earlier demo left
        shutil.rmtree(Path(options.out) / old, ignore_errors=True)
    torch.set_num_threads(1)  # training on one core, audits on another
    settings = DemoSettings(
        epochs=options.epochs,
        audits=options.audits,
        evaluations=options.evaluations,
        executor=options.executor,
        seed=options.seed,
    )
    console = terminal.console(quiet=options.json)
    console.print(
        "Training a face detector twice: as it is, and audited as if noise were added to the gradient before it left "
        "(training itself goes on with the clean one). Audits run beside it."
    )
    runs = run_demo(
        options.out, settings, loggers=_loggers(options), progress=not (options.json or options.no_progress)
    )
    report = html.write_report(runs, Path(options.out) / "report.html", title="Demo: what the gradients gave away")
    for run in runs:
        console.print(terminal.audits_table(run))
    console.print(terminal.decisions_table(runs, last_only=True))
    curves = [Path(options.out) / run.name / "metrics.csv" for run in runs]
    console.print(f"Report: {report}\nCurves: {', '.join(map(str, curves))}")
    if options.json:
        print(json.dumps({run.name: {"decisions": run.decisions, "evidence": run.evidence.to_dict()} for run in runs}))
    return 0


def _loggers(options: argparse.Namespace) -> list[Any]:
    from functools import partial

    from pytorch_lightning.loggers import TensorBoardLogger, WandbLogger

    chosen: list[Any] = []
    if options.wandb:
        chosen.append(partial(WandbLogger, offline=True))
    if options.tensorboard:
        chosen.append(partial(TensorBoardLogger, version=""))
    return chosen


def _audit(options: argparse.Namespace) -> int:
    snapshot = Snapshot.load(options.snapshot, trust=options.trust)
    budget = Budget(evaluations=options.evaluations)
    record = audit_snapshot(snapshot, budget=budget, analysis=True, seed=options.seed)
    values = record.to_dict()
    if options.out is not None:
        _write(options.out, f"audit_step_{record.step:08d}.json", json.dumps(values, indent=2))
    if options.json:
        print(json.dumps(values))
    else:
        _show(record.table(), record.summary)
        if record.reason:
            print(printable(record.reason, _LONGEST))
    return 0


def _report(options: argparse.Namespace) -> int:
    html = _optional("html")
    from lightning_gradaudit.report.run import load_run

    runs = [load_run(folder) for folder in options.folders]
    write = html.write_markdown if options.format == "md" else html.write_report
    path = write(runs, options.out / f"report.{options.format}")
    print(json.dumps({"report": str(path)}) if options.json else f"Report: {printable(path)}")
    return 0


def _compare(options: argparse.Namespace) -> int:
    images, labels = _images(options.data)
    own = [(text, _own_model(text)) for text in options.own]
    chosen = options.models if options.models is not None else ([] if own else list(BUILT_IN))
    # The attacked images are spread over the set, so that classes mix; the others train and are the gallery.
    attacked = torch.arange(options.images) * max(1, len(images) // max(1, options.images))
    rest = torch.ones(len(images), dtype=torch.bool)
    if not 0 < options.images < len(images):
        raise InvalidInputError(f"--images: expected between 1 and {len(images) - 1}, got {options.images}.")
    rest[attacked] = False
    built_in = {name: BUILT_IN[name] for name in chosen}
    states = training_states(built_in, images[rest], labels[rest], epochs=options.epochs, seed=options.seed)
    found = compare(
        [*own, *states],
        images[attacked],
        labels[attacked],
        mode="train" if options.train_mode else "eval",
        batch_size=options.batch_size,
        budget=Budget(evaluations=options.evaluations),
        gallery=images[rest],
        compile=options.compile,
        seed=options.seed,
    )
    if options.out is not None:
        _write(options.out, "comparison.json", json.dumps(found.to_dict(), indent=2, allow_nan=False))
        _write(options.out, "comparison.svg", _optional("charts").comparison_chart(found))
    if options.json:
        print(json.dumps(found.to_dict(), allow_nan=False))
    else:
        _show(found.table(), f"{found.images} images, {found.batch_size} behind a gradient")
        print(CEILING_CAVEAT)
    return 0


def _images(path: Path | None) -> tuple[torch.Tensor, torch.Tensor]:
    """Read images in [0, 1] and labels."""
    if path is None:
        from lightning_gradaudit.cli.demo import faces

        return faces()
    try:
        path = regular_file(path)
        with zipfile.ZipFile(path) as archive:
            size = sum(entry.file_size for entry in archive.infolist())
        images = labels = np.empty(0)
        if size <= _DATA_LIMIT:
            with np.load(path) as file:
                images, labels = file["images"], file["labels"]
    except Exception as error:  # zipfile, zlib and numpy each have errors of their own for a damaged file
        raise InvalidInputError(f"--data: {path} is no npz with images and labels ({printable(error)}).") from error
    if size > _DATA_LIMIT:
        raise InvalidInputError(f"--data: expected at most {_DATA_LIMIT} bytes of arrays, {path} holds {size}.")
    if images.dtype != np.uint8 or images.ndim != 4 or len(images) != len(labels):
        raise InvalidInputError(f"--data: expected uint8 images (N, C, H, W), got {images.dtype} {images.shape}.")
    return torch.from_numpy(images).float() / 255, torch.from_numpy(labels).long()


def _own_model(text: str) -> torch.nn.Module:
    """Build a user's model from "FILE.py:NAME" or "FILE.py:NAME=CHECKPOINT"; the file is executed."""
    source, _, weights = text.partition("=")
    file, _, name = source.rpartition(":")
    if not file or not Path(file).is_file():
        raise InvalidInputError(f"--own: expected FILE.py:NAME or FILE.py:NAME=CHECKPOINT with a file, got {text!r}.")
    namespace = runpy.run_path(file)
    if not callable(namespace.get(name)):
        raise InvalidInputError(f"--own: {file} has no callable named {name!r}.")
    model = namespace[name]()
    if not isinstance(model, torch.nn.Module):
        raise InvalidInputError(f"--own: {name} returned {type(model).__name__}, expected a torch.nn.Module.")
    if weights:
        try:
            state = load_checkpoint(weights, mmap=False)
            model.load_state_dict(state.get("state_dict", state))
        except InvalidInputError as error:
            raise InvalidInputError(f"--own: {error}") from error
        except (RuntimeError, AttributeError, TypeError) as error:
            raise InvalidInputError(f"--own: {weights} does not hold the weights of {name} ({error}).") from error
    return model


def _gate(options: argparse.Namespace) -> int:
    gate = RiskGate(
        options.max_risk,
        statistic=options.statistic,
        memory=options.memory,
        independent=options.independent,
        max_age=options.max_age,
    )
    verdict, about = judge(options.path, gate, trust=options.trust)
    result = verdict.to_dict() | {"judged": about}
    if options.out is not None:
        _write(options.out, "verdict.json", json.dumps(result, indent=2))
    _say(options, result)
    return Status(result["status"]).exit_code


def _write(folder: Path, name: str, text: str) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text, encoding="utf-8")
    except OSError as error:
        raise InvalidInputError(f"--out: {folder / name} cannot be written ({error.strerror}).") from error


def _completion(options: argparse.Namespace) -> int:
    try:
        import shtab
    except ImportError as error:
        raise InvalidInputError("shtab is missing: pip install 'lightning-gradaudit[report]'.") from error
    print(shtab.complete(build_parser(), shell=options.shell))
    return 0


def _show(rows: Sequence[Sequence[str]], title: str) -> None:
    """Print a table, as well as what is installed allows."""
    try:
        terminal = _optional("terminal")
    except InvalidInputError:
        cells = [[printable(cell) for cell in row] for row in rows]
        print(f"{printable(title, _LONGEST)}\n{plain_table(cells)}")
    else:
        terminal.console().print(terminal.text_table(rows, title))


def _optional(module: str) -> Any:
    """Import a part of the report package, whose libraries are an extra."""
    import importlib

    try:
        return importlib.import_module(f"lightning_gradaudit.report.{module}")
    except ImportError as error:
        raise InvalidInputError(
            f"{error.name} is missing: pip install 'lightning-gradaudit[report]' (demo: [demo])."
        ) from error

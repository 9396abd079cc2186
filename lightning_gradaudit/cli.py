"""The `gradaudit` command.

Exit status: 0 done (for `gate`: pass), 1 blocked, 2 unknown, 64 misuse.
"""

from __future__ import annotations

import argparse
import json
import logging
import pickle
import shutil
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from lightning_gradaudit._version import __version__
from lightning_gradaudit.audit import audit_snapshot
from lightning_gradaudit.budget import Budget
from lightning_gradaudit.errors import GradAuditError, InvalidInputError
from lightning_gradaudit.evidence import RECORDS_FILE, SIDECAR_SUFFIX, STAMP, Evidence, RunFolder
from lightning_gradaudit.risk import RiskGate, Status
from lightning_gradaudit.snapshot import Snapshot

MISUSE = 64


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command and return its exit status."""
    parser = build_parser()
    options = parser.parse_args(arguments)
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    try:
        return int(options.run(options))
    except GradAuditError as error:
        print(f"gradaudit: {error}", file=sys.stderr)
        return MISUSE


def build_parser() -> argparse.ArgumentParser:
    """Build the parser of all verbs."""
    parser = argparse.ArgumentParser(
        prog="gradaudit",
        description="Audit what a training gradient gives away.",
        epilog="Start with: gradaudit demo",
    )
    parser.add_argument("--version", action="version", version=__version__)
    verbs = parser.add_subparsers(required=True, metavar="VERB")

    def verb(name: str, run: Callable[[argparse.Namespace], int], about: str, out: str | None) -> Any:
        sub = verbs.add_parser(name, help=about, description=about)
        sub.add_argument("--json", action="store_true", help="print the result as JSON")
        sub.add_argument("--out", type=Path, default=out, metavar="DIR", help="folder for files (default: %(default)s)")
        sub.set_defaults(run=run)
        return sub

    demo = verb("demo", _demo, "Train a face detector on real photographs, audit it, gate its checkpoints.",
                "gradaudit-demo")  # fmt: skip
    demo.add_argument("--epochs", type=int, default=10, help="epochs of 100 steps per run (default: %(default)s)")
    demo.add_argument("--audits", type=int, default=20, help="audited steps per run (default: %(default)s)")
    demo.add_argument("--evaluations", type=int, default=300, help="budget of an audit (default: %(default)s)")
    demo.add_argument("--executor", choices=("auto", "inline", "thread", "process"), default="auto")
    demo.add_argument("--seed", type=int, default=1, help="random seed (default: %(default)s)")
    demo.add_argument("--wandb", action="store_true", help="also log to Weights & Biases, offline")
    demo.add_argument("--tensorboard", action="store_true", help="also log to TensorBoard")
    demo.add_argument("--no-progress", action="store_true", help="hide progress bars")

    audit = verb("audit", _audit, "Attack one saved snapshot (Snapshot.save) and print the record.", None)
    audit.add_argument("snapshot", type=Path, help="file written by Snapshot.save; it is unpickled, so trust it")
    audit.add_argument("--evaluations", type=int, default=400, help="budget (default: %(default)s)")
    audit.add_argument("--seed", type=int, default=0, help="random seed (default: %(default)s)")

    report = verb("report", _report, "Write an HTML report of one or more audited runs.", ".")
    report.add_argument("folders", type=Path, nargs="+", metavar="RUN", help="run folder (holds records.jsonl)")

    gate = verb("gate", _gate, "Decide whether a checkpoint or run may be released: exit 0 pass, 1 block, 2 unknown.",
                None)  # fmt: skip
    gate.add_argument("path", type=Path, help="checkpoint with a stamp, its .gradaudit.json, or a run folder")
    gate.add_argument("--max-risk", type=float, required=True, help="limit in [0, 1]")
    gate.add_argument("--statistic", choices=("worst", "p90", "mean"), default="worst", help="default: %(default)s")
    gate.add_argument("--max-age", type=int, default=None, help="steps after which the newest audit is stale")
    gate.add_argument("--trust", action="store_true", help="allow a checkpoint that must be unpickled")
    return parser


def _demo(options: argparse.Namespace) -> int:
    terminal, html = _optional("terminal"), _optional("html")
    from lightning_gradaudit.demo import DemoSettings, run_demo

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
    console.print("Training a face detector twice: as it is, and with a defended gradient. Audits run beside it.")
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
    snapshot = Snapshot.load(options.snapshot)
    record = audit_snapshot(snapshot, budget=Budget(evaluations=options.evaluations), seed=options.seed)
    values = record.to_dict()
    if options.out is not None:
        options.out.mkdir(parents=True, exist_ok=True)
        (options.out / f"audit_step_{record.step:08d}.json").write_text(json.dumps(values, indent=2))
    if options.json:
        print(json.dumps(values))
    else:
        for key, value in values.items():
            print(f"{key}: {value}")
    return 0


def _report(options: argparse.Namespace) -> int:
    html = _optional("html")
    from lightning_gradaudit.report.run import load_run

    runs = [load_run(folder) for folder in options.folders]
    path = html.write_report(runs, options.out / "report.html")
    print(json.dumps({"report": str(path)}) if options.json else f"Report: {path}")
    return 0


def _gate(options: argparse.Namespace) -> int:
    gate = RiskGate(options.max_risk, statistic=options.statistic, max_age=options.max_age)
    try:
        evidence = read_evidence(options.path, trust=options.trust)
    except InvalidInputError as error:
        # Fail closed, and say why in the form that was asked for.
        result: dict[str, Any] = {"status": str(Status.UNKNOWN), "reasons": [str(error)], "limit": gate.max_risk}
    else:
        result = evidence.verdict(gate).to_dict()
    if options.out is not None:
        options.out.mkdir(parents=True, exist_ok=True)
        (options.out / "verdict.json").write_text(json.dumps(result, indent=2))
    print(json.dumps(result) if options.json else f"{result['status']}: {' '.join(result['reasons'])}")
    return Status(result["status"]).exit_code


def read_evidence(path: Path, *, trust: bool = False) -> Evidence:
    """Read evidence from a checkpoint's stamp, its sidecar, or a run folder.

    Args:
        path: Any of them.
        trust: Unpickle a checkpoint that holds more than plain data.

    Raises:
        InvalidInputError: When there is none.
    """
    sidecar = Path(str(path) + SIDECAR_SUFFIX)
    if path.is_dir() or path.name == RECORDS_FILE:
        folder = path if path.is_dir() else path.parent
        nested = folder / STAMP
        return RunFolder(nested if (nested / RECORDS_FILE).is_file() else folder).evidence()
    if not path.is_file():
        raise InvalidInputError(
            f"path: nothing at {path}; expected a checkpoint, its .gradaudit.json, or a run folder."
        )
    if path.name.endswith(SIDECAR_SUFFIX) or sidecar.is_file():
        source = sidecar if sidecar.is_file() else path
        try:
            return Evidence.from_dict(json.loads(source.read_text())["evidence"])
        except (json.JSONDecodeError, KeyError, TypeError) as error:
            raise InvalidInputError(f"path: {source} is not an audit's stamp ({error!r}).") from error
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=not trust)
    except (pickle.UnpicklingError, RuntimeError, EOFError) as error:
        raise InvalidInputError(
            f"path: {path} cannot be read without unpickling; pass --trust if you know where it comes from."
        ) from error
    if not isinstance(checkpoint, dict) or STAMP not in checkpoint:
        raise InvalidInputError(f"path: {path} carries no audit; it was not trained with GradAudit.")
    return Evidence.from_dict(checkpoint[STAMP]["evidence"])


def _optional(module: str) -> Any:
    """Import a part of the report package, whose libraries are an extra."""
    import importlib

    try:
        return importlib.import_module(f"lightning_gradaudit.report.{module}")
    except ImportError as error:
        raise InvalidInputError(
            f"{error.name} is missing: pip install 'lightning-gradaudit[report]' (demo: [demo])."
        ) from error


if __name__ == "__main__":
    sys.exit(main())

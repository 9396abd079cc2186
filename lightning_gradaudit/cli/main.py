"""The `gradaudit` command."""

from __future__ import annotations

import argparse
import importlib
import json
import logging
import os
import sys
import traceback
from collections.abc import Sequence

from lightning_gradaudit.cli.output import print_verdict
from lightning_gradaudit.cli.parser import BROKEN, LONGEST_MESSAGE, MISUSE, build_parser
from lightning_gradaudit.errors import GradAuditError
from lightning_gradaudit.utils.formatting import printable

UNKNOWN = 2
"""Exit status of `gate` when it fails: that of `Status.UNKNOWN`, which is imported with what may have failed."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command and return its exit status."""
    options = build_parser().parse_args(arguments)
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # a terminal of few characters must not end a verdict in a traceback
            stream.reconfigure(errors="backslashreplace")
    try:
        verb = importlib.import_module(f"lightning_gradaudit.cli.verbs.{options.verb}")
        status = int(verb.run(options))
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
    gate = options.verb == "gate"
    try:
        if not gate:
            return _complain(options, said, BROKEN)
        print(f"gradaudit: {said}", file=sys.stderr)
        action = "python -X dev -m lightning_gradaudit.cli gate ..., which shows where the program fails"
        verdict = {"status": "UNKNOWN", "reasons": [said], "limit": options.max_risk, "action": action}
        print_verdict(options, verdict)
        sys.stdout.flush()
    except OSError:  # nobody listens; the interpreter would complain about that, with a status of its own
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return UNKNOWN if gate else BROKEN


def _complain(options: argparse.Namespace, said: str, status: int) -> int:
    print(f"gradaudit: {printable(said, LONGEST_MESSAGE)}", file=sys.stderr)
    if getattr(options, "json", False):
        print(json.dumps({"error": said}))
    sys.stdout.flush()
    return status

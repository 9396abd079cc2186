"""`gradaudit completion`: print a script for the shell."""

from __future__ import annotations

import argparse

from lightning_gradaudit.cli.parser import build_parser
from lightning_gradaudit.errors import InvalidInputError


def run(options: argparse.Namespace) -> int:
    """Print the script; return 0.

    Raises:
        InvalidInputError: When shtab is missing.
    """
    try:
        import shtab
    except ImportError as error:
        raise InvalidInputError("shtab is missing: pip install 'lightning-gradaudit[report]'.") from error
    print(shtab.complete(build_parser(), shell=options.shell))
    return 0

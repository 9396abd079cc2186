"""`python -m lightning_gradaudit.cli` is the command `gradaudit`."""

import sys

from lightning_gradaudit.cli.main import main

if __name__ == "__main__":
    sys.exit(main())

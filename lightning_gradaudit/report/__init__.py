"""Reports of audited runs: one self-contained HTML file, and tables for the terminal."""

from lightning_gradaudit.report.html import write_report
from lightning_gradaudit.report.run import Run, load_run

__all__ = ["Run", "load_run", "write_report"]

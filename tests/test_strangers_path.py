"""From the documentation to a curve of one's own model, by the steps that it gives and no others."""

from __future__ import annotations

import json
import runpy
import subprocess
import sys
from pathlib import Path

SCRIPT = Path(__file__).parents[1] / "docs/strangers_path.py"


def test_without_the_added_lines_the_program_is_one_that_knows_nothing_of_audits():
    given = runpy.run_path(str(SCRIPT))
    code = given["without_audit"](given["program"]())
    compile(code, "train.py", "exec")
    assert "gradaudit" not in code.lower()
    assert "trainer.fit" in code


def test_a_stranger_reaches_a_curve_and_a_report(tmp_path):
    done = subprocess.run(
        [sys.executable, str(SCRIPT), str(tmp_path)], capture_output=True, text=True, check=False, timeout=300
    )
    assert done.returncode == 0, done.stderr[-2000:]
    walked = json.loads(done.stdout.splitlines()[-1])
    assert 0 < walked["added_lines"] <= 12
    assert walked["points"] >= 1
    assert 0 <= walked["newest_risk"] <= 1
    assert "Risk over training" in (tmp_path / "report.html").read_text()

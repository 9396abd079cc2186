"""Walk a stranger's path and time it: `python docs/strangers_path.py FOLDER [--install]`.

From the tutorial's first block, a model of their own with the lines that auditing adds, to curves and a report. With
`--install` the package is first installed into a fresh virtual environment, as on a bare machine.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import time
import venv
from pathlib import Path

ROOT = Path(__file__).parents[1]
MOST_LINES = 12


def program() -> str:
    """Return the tutorial's first block of Python."""
    found = re.search(r"```python\n(.*?)```", (ROOT / "docs/tutorial.md").read_text(encoding="utf-8"), flags=re.DOTALL)
    if found is None:
        raise SystemExit("docs/tutorial.md begins with no program.")
    return found[1]


def without_audit(code: str) -> str:
    """Return the program as it was before lines were added."""
    return "".join(line for line in code.splitlines(keepends=True) if not line.rstrip().endswith("# added"))


def walk(folder: Path, python: str) -> dict[str, float | int]:
    """Train, look at the curve, write the report; return what it took."""
    code = program()
    added = len(code.splitlines()) - len(without_audit(code).splitlines())
    if not 0 < added <= MOST_LINES:
        raise SystemExit(f"{added} lines are added; at most {MOST_LINES} were promised.")
    (folder / "train.py").write_text(code, encoding="utf-8")
    start = time.monotonic()
    subprocess.run([python, "-W", "ignore", "train.py"], cwd=folder, check=True)
    trained = time.monotonic() - start
    run = folder / "lightning_logs/version_0"
    events = map(json.loads, (run / "gradaudit/records.jsonl").read_text(encoding="utf-8").splitlines())
    curve = [event["risk"]["risk"] for event in events if event["kind"] == "record"]
    command = [python, "-W", "ignore", "-m", "lightning_gradaudit.cli", "report", str(run), "--out", str(folder)]
    subprocess.run(command, check=True)
    return {
        "added_lines": added,
        "points": len(curve),
        "newest_risk": curve[-1],
        "seconds_to_curve": round(trained, 1),
        "seconds_to_report": round(time.monotonic() - start, 1),
    }


def main() -> None:
    """Walk and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--install", action="store_true")
    options = parser.parse_args()
    options.folder.mkdir(parents=True, exist_ok=True)
    python, installed = sys.executable, 0.0
    if options.install:
        start = time.monotonic()
        venv.create(options.folder / "venv", with_pip=True)
        python = str((options.folder / "venv/bin/python").absolute())
        subprocess.run([python, "-m", "pip", "install", "--quiet", f"{ROOT}[report]", "scikit-image"], check=True)
        installed = time.monotonic() - start
    print(json.dumps(walk(options.folder, python) | {"seconds_to_install": round(installed, 1)}))


if __name__ == "__main__":
    main()

"""The guides name every attack that is exported, lead nowhere that is not there, and their Python runs."""

from __future__ import annotations

import inspect
import os
import re
import subprocess
import sys
import typing
from html import unescape
from pathlib import Path

import pytest
import torch
from support import record
from test_layering import FLOOR, PACKAGE

import lightning_gradaudit
from lightning_gradaudit import RiskGate, Status, attacks, metrics
from lightning_gradaudit.attacks import Attack
from lightning_gradaudit.audit.comparison import Comparison

DOCS = Path(__file__).parents[1] / "docs"
GUIDES = sorted(DOCS.glob("*.md"))
LINKING = [*DOCS.parent.glob("*.md"), DOCS.parent / "benchmarks/README.md", *sorted(DOCS.rglob("*.md"))]


def makes_attacks(exported):
    if inspect.isclass(exported):
        return issubclass(exported, Attack) and not inspect.isabstract(exported)
    returned = typing.get_type_hints(exported).get("return") if inspect.isfunction(exported) else None
    return inspect.isclass(returned) and issubclass(returned, Attack)


FACTS = ("Needs", "Applies", "Costs", "Gives", "Source")


def described(text):
    """The facts of each section whose heading is one `Name`."""
    sections = re.findall(r"^### `(\w+)`\n(.*?)(?=^#|\Z)", text, flags=re.MULTILINE | re.DOTALL)
    return {name: dict(re.findall(r"^- \*\*(\w+)\*\*: (.+)", body, flags=re.MULTILINE)) for name, body in sections}


ATTACKS = [name for name in attacks.__all__ if makes_attacks(getattr(attacks, name))]


@pytest.mark.parametrize("name", ATTACKS)
def test_every_attack_has_a_section_that_says_what_it_needs_and_gives(name):
    facts = described((DOCS / "attacks.md").read_text()).get(name)
    assert facts is not None, f"docs/attacks.md has no section for {name}"
    assert set(FACTS) <= set(facts), f"docs/attacks.md lacks facts of {name}"


def test_attacks_are_found_at_all():
    assert {"DLG", "Portfolio", "LinearLayerInversion", "GradientMatching"} <= set(ATTACKS)
    assert "Attack" not in ATTACKS
    assert "TotalVariation" not in ATTACKS


@pytest.mark.parametrize("guide", LINKING, ids=lambda path: str(path.relative_to(DOCS.parent)))
def test_links_lead_to_files_and_headings(guide):
    for target in re.findall(r"\]\(([^)]+)\)", guide.read_text()):
        if target.startswith("http"):
            continue
        file, _, anchor = target.partition("#")
        path = (guide.parent / file).resolve() if file else guide
        assert path.is_file(), f"{guide.name} links to {target}"
        headings = re.findall(r"^#+ (.+)$", path.read_text(), flags=re.MULTILINE) if anchor else []
        slugs = [re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings]
        assert not anchor or anchor in slugs, f"{guide.name} links to {target}"


@pytest.mark.parametrize("guide", GUIDES, ids=lambda path: path.name)
def test_python_in_a_guide_runs_and_prints_what_stands_below_it(guide, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    blocks = re.findall(r"```python\n(.*?)```(?:\n+```text\n(.*?)```)?", guide.read_text(), flags=re.DOTALL)
    for code, printed in blocks:
        if "# added" in code or "--8<--" in code:  # the stranger's path, and examples, have tests of their own
            continue
        exec(compile(code, str(guide), "exec"), {})
        said = capsys.readouterr().out
        assert not printed or said == printed


def test_the_gate_computes_what_the_worked_example_says():
    text = (DOCS / "risk.md").read_text()
    assert (
        "Risk is the larger of both, max(0.11, 0.02) = 0.11, and its bounds are 0.11 to max(0.11, 0.22) = 0.22." in text
    )
    exposures = [0.0] * 38 + [0.05, 0.11]
    named = torch.tensor([1.0, 1.0, *[0.0] * 38])

    def judged(values):
        return RiskGate(0.3).verdict(
            [
                record(step, [value], identified=named[step : step + 1], chance_hits=6.0 / 40, chance_trials=5)
                for step, value in enumerate(values)
            ],
            step=40,
        )

    verdict = judged(exposures)
    assert [round(v, 2) for v in (verdict.risk, verdict.low, verdict.high)] == [0.11, 0.11, 0.22]
    assert (verdict.status, verdict.images) == (Status.PASS, 40)
    assert judged([0.35, *exposures[1:]]).status is Status.BLOCK
    few = judged(exposures[-20:])
    assert (few.status, few.high) == (Status.UNKNOWN, 1.0)
    assert few.more_audits
    named.zero_()
    assert [judged([0.0] * count).status for count in (28, 29)] == [Status.UNKNOWN, Status.PASS]


def test_the_site_builds_without_a_warning_and_has_every_page(tmp_path):
    environment = os.environ | {"NO_MKDOCS_2_WARNING": "1", "PYTHONWARNINGS": "ignore"}
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path / "site")]
    done = subprocess.run(command, cwd=DOCS.parent, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "WARNING" not in done.stderr
    pages = {path.parent.name: path.read_text() for path in (tmp_path / "site").glob("*/index.html")}
    for guide in GUIDES:
        assert guide.stem in pages
    for name in (*lightning_gradaudit.__all__[:-3], *(f"attacks.{name}" for name in attacks.__all__)):
        if name.strip("_") != "version":
            assert f'id="lightning_gradaudit.{name}"' in pages["reference"], name
    assert "How much of a private image" in (tmp_path / "site" / "index.html").read_text()
    assert "usage: gradaudit gate" in pages["command_line"]
    shown = unescape(re.sub(r"<[^>]+>", "", pages["examples"]))
    for example in (DOCS.parent / "examples").glob("*.*"):
        assert example.read_text().splitlines()[0] in shown, example
    for page in pages.values():
        loaded = re.findall(r"""<(?:script|img|link rel="stylesheet")[^>]* (?:src|href)=["'](https?://[^"']*)""", page)
        assert loaded == [], "nothing is fetched from elsewhere"


def test_the_analysis_guide_names_its_metrics_and_every_column_of_the_comparison():
    text = (DOCS / "analysis.md").read_text()
    for name in ("BracketGap", "Ceiling", "Effort", "NoiseToHide"):
        assert name in metrics.__all__
        assert f"{name}" in text
    header = Comparison(contenders=(), images=0, batch_size=1, settings={}).table()[0]
    for column in header[2:]:
        assert f"| {column} |" in text


def test_the_architecture_names_every_room_from_the_top_floor_down():
    named = re.findall(r"^\| `(\w+)(?:\.py)?` \|", (DOCS / "architecture.md").read_text(), flags=re.MULTILINE)
    assert set(named) == set(FLOOR) - {PACKAGE, "_version"}
    floors = [FLOOR[name] for name in named]
    assert floors == sorted(floors, reverse=True)

"""The guides name every attack that is exported, lead nowhere that is not there, and their Python runs."""

from __future__ import annotations

import inspect
import re
import typing
from pathlib import Path

import pytest
import torch

from lightning_gradaudit import attacks, metrics
from lightning_gradaudit.attacks import Attack
from lightning_gradaudit.comparison import Comparison

DOCS = Path(__file__).parents[1] / "docs"
GUIDES = sorted(DOCS.glob("*.md"))


def makes_attacks(exported):
    if inspect.isclass(exported):
        return issubclass(exported, Attack) and not inspect.isabstract(exported)
    returned = typing.get_type_hints(exported).get("return") if inspect.isfunction(exported) else None
    return inspect.isclass(returned) and issubclass(returned, Attack)


def described(text):
    """Cells of the table rows that start with one `Name`."""
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line[:1] == "|"]
    return {row[0].strip("`"): row[1:] for row in rows if re.fullmatch(r"`\w+`", row[0])}


ATTACKS = [name for name in attacks.__all__ if makes_attacks(getattr(attacks, name))]


@pytest.mark.parametrize("name", ATTACKS)
def test_every_attack_has_a_row_that_says_what_it_needs_and_gives(name):
    cells = described((DOCS / "attacks.md").read_text()).get(name)
    assert cells is not None, f"docs/attacks.md has no row for {name}"
    assert len(cells) == 5
    assert all(cells), f"docs/attacks.md leaves a cell of {name} empty"


def test_attacks_are_found_at_all():
    assert {"DLG", "Portfolio", "LinearLayerInversion", "GradientMatching"} <= set(ATTACKS)
    assert "Attack" not in ATTACKS
    assert "TotalVariation" not in ATTACKS


@pytest.mark.parametrize("guide", GUIDES, ids=lambda path: path.name)
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
def test_python_in_a_guide_runs(guide):
    torch.manual_seed(0)
    for block in re.findall(r"```python\n(.*?)```", guide.read_text(), flags=re.DOTALL):
        exec(compile(block, str(guide), "exec"), {})


def test_the_analysis_guide_names_its_metrics_and_every_column_of_the_comparison():
    text = (DOCS / "analysis.md").read_text()
    for name in ("BracketGap", "Ceiling", "Effort", "GradientDataCorrelation", "NoiseToHide"):
        assert name in metrics.__all__
        assert f"{name}" in text
    header = Comparison(contenders=(), images=0, batch_size=1, settings={}).table()[0]
    for column in header[2:]:
        assert f"| {column} |" in text

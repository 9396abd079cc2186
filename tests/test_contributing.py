"""The listings of CONTRIBUTING.md run, each after the first one alone, and are short."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

CONTRIBUTING = Path(__file__).parents[1] / "CONTRIBUTING.md"
TEXT = CONTRIBUTING.read_text()
_LISTING = re.compile(r"^## A new (\w+)\n(?:(?!^## ).)*?```python\n(.*?)```", flags=re.DOTALL | re.MULTILINE)
LISTINGS = dict(_LISTING.findall(TEXT))
COMMON = re.findall(r"```python\n(.*?)```", TEXT, flags=re.DOTALL)[0]
MOST_LINES = 40


def test_every_kind_of_extension_has_one_listing():
    assert list(LISTINGS) == ["attack", "metric", "defence", "view", "executor", "logger"]
    assert len(LISTINGS) + 1 == TEXT.count("```python")


@pytest.mark.parametrize("name", LISTINGS)
def test_a_listing_is_short_and_asserts_something(name):
    assert len(LISTINGS[name].splitlines()) <= MOST_LINES
    assert LISTINGS[name].count("\nassert ") >= 1


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("name", LISTINGS)
def test_a_listing_runs(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {"__name__": "listing"}
    for code in (COMMON, LISTINGS[name]):
        exec(compile(code, str(CONTRIBUTING), "exec", dont_inherit=True), names)

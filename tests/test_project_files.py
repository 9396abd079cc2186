"""Files that only a forge or an installer reads: they parse, and agree with `pyproject.toml`."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.version import Version

from lightning_gradaudit import __version__

ROOT = Path(__file__).parents[1]
PROJECT = (ROOT / "pyproject.toml").read_text()
FILES = [*ROOT.glob(".github/**/*.yml"), ROOT / ".pre-commit-config.yaml", ROOT / "CITATION.cff"]


def parse(path):
    return yaml.safe_load(path.read_text())


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_yaml_parses(path):
    assert isinstance(parse(path), dict)


def test_the_lowest_versions_are_those_of_the_project():
    constraints = [Requirement(line) for line in (ROOT / ".github/constraints/lowest.txt").read_text().splitlines()[1:]]
    lowest = {each.name: str(each.specifier).removeprefix("==").removesuffix(".*") for each in constraints}
    for name in ("torch", "pytorch-lightning", "torchmetrics"):
        declared = re.search(rf'"{name}>=([\d.]+)', PROJECT)
        assert declared is not None, name
        assert lowest[name] == declared[1]
    assert lowest["lightning"] == lowest["pytorch-lightning"]


def test_the_workflow_runs_every_python_that_is_supported():
    job = parse(ROOT / ".github/workflows/test.yml")["jobs"]["test"]
    pythons = [Version(python) for python in job["strategy"]["matrix"]["python"]]
    declared = re.search(r'requires-python = ">=([\d.]+)"', PROJECT)
    assert declared is not None
    assert min(pythons) == Version(declared[1])
    assert {row["versions"] for row in job["strategy"]["matrix"]["include"]} == {"lowest"}
    assert any("make test" in step.get("run", "") for step in job["steps"])


def test_the_citation_states_the_version():
    assert parse(ROOT / "CITATION.cff")["version"] == __version__

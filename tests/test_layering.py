"""Imports only go down: computed from the syntax tree of every file in the package."""

from __future__ import annotations

import ast
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

import lightning_gradaudit

ROOT = Path(lightning_gradaudit.__file__).parent
PACKAGE = "lightning_gradaudit"
# Low to high; a folder stands for all its files.
LAYERS = (
    (
        "errors",
        "_version",
        "digests",
        "budget",
        "displays",
        "files",
        "schedules",
        "overhead",
        "parcels",
        "defences",
        "threads",
    ),
    ("architectures",),
    ("batches", "replay", "protocol"),
    ("replica", "manual"),
    ("client",),
    ("observation",),
    ("snapshot", "reconstruction"),
    ("attacks", "metrics", "analysis", "baseline", "bundles", "executors", "ray_executor", "record"),
    ("confirmation",),
    ("audit",),
    ("intervals", "verdict"),
    ("tally", "checks"),
    ("risk", "auditor", "comparison"),
    ("evidence",),
    ("release",),
    ("report",),
    ("curves",),
    ("namespaces", "privacy", "ranks", "windows"),
    ("loggers",),
    ("capture",),
    ("callback",),
    ("checkpoint",),
    ("",),  # the package's own __init__ may import anything below
    ("cli", "demo", "__main__"),
)
LIGHTNING_FROM = next(level for level, names in enumerate(LAYERS) if "namespaces" in names)


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join((PACKAGE, *(parts[:-1] if parts[-1] == "__init__" else parts)))


FILES = {module_name(path): path for path in sorted(ROOT.rglob("*.py"))}


def imported_names(path: Path, name: str) -> set[str]:
    """All dotted names a file imports, anywhere in it, relative imports resolved."""
    found = set()
    package = name.split(".") if path.name == "__init__.py" else name.split(".")[:-1]
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) + 1 - node.level] if node.level else []
            module = ".".join([*base, *([node.module] if node.module else [])])
            # `from a.b import c` may name the module a.b.c
            found |= {f"{module}.{a.name}" if f"{module}.{a.name}" in FILES else module for a in node.names}
    return found


IMPORTS = {name: imported_names(path, name) for name, path in FILES.items()}
GRAPH = {name: {i for i in found if i in FILES and i != name} for name, found in IMPORTS.items()}


def level(name: str) -> int:
    top = name.split(".")[1] if "." in name else ""
    for number, names in enumerate(LAYERS):
        if top in names:
            return number
    raise AssertionError(f"{name} has no layer: add it to LAYERS")


def test_the_graph_is_not_empty():
    assert f"{PACKAGE}.client" in GRAPH[f"{PACKAGE}.observation"]
    assert f"{PACKAGE}.audit" in GRAPH[f"{PACKAGE}.auditor"]
    assert f"{PACKAGE}.auditor" in GRAPH[f"{PACKAGE}.callback"]


@pytest.mark.parametrize("name", FILES)
def test_no_import_points_up(name):
    assert {target for target in GRAPH[name] if level(target) > level(name)} == set()


@pytest.mark.parametrize("name", [name for name in FILES if level(name) < LIGHTNING_FROM])
def test_nothing_below_the_callback_imports_lightning(name):
    tops = {imported.split(".")[0] for imported in IMPORTS[name]}
    assert tops & {"pytorch_lightning", "lightning", "lightning_fabric"} == set()


def test_no_imports_run_in_a_circle():
    try:
        order = list(TopologicalSorter(GRAPH).static_order())
    except CycleError as error:
        pytest.fail(f"circle: {' -> '.join(error.args[1])}")
    assert set(order) == set(FILES)

"""The house: which package may import which, computed from the syntax tree of every file."""

from __future__ import annotations

import ast
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

import lightning_gradaudit

ROOT = Path(lightning_gradaudit.__file__).parent
PACKAGE = "lightning_gradaudit"

# The rules. A room is a package (with all below it) or a file beside the packages; floors from the lowest up.
FLOORS = (
    ("errors", "_version"),
    ("utils",),
    ("simulation", "execution", "metrics"),
    ("attacks",),
    ("analysis",),
    ("audit", "capture"),
    ("risk",),
    ("report", "callbacks"),
    (PACKAGE, "cli"),
)
MOST_ROOMS, MOST_FLOORS = 18, 9
MAY_IMPORT_LIGHTNING = {"capture", "callbacks", "cli"}
PRIVATE_READERS = {"capture.trainer_state"}  # of attributes that Lightning, torch or Opacus keep private
READ_NO_PRIVATES = {"capture", "callbacks"}
STRANGERS = {("attacks", "execution"), ("execution", "attacks")}  # know nothing of each other
PUBLIC = {"analysis", "attacks", "audit", "callbacks", "errors", "metrics", "report", "risk"}  # for examples


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


def room(name: str) -> str:
    return name.split(".")[1] if "." in name else name


IMPORTS = {name: imported_names(path, name) for name, path in FILES.items()}
GRAPH = {name: {i for i in found if i in FILES and i != name} for name, found in IMPORTS.items()}
ROOMS = {room(name) for name in FILES}
ARROWS = {(room(a), room(b)) for a, found in GRAPH.items() for b in found if room(a) != room(b)}
FLOOR = {name: number for number, names in enumerate(FLOORS) for name in names}


def longest_way_down(arrows: set[tuple[str, str]]) -> int:
    below = {name: {b for a, b in arrows if a == name} for name in ROOMS}
    height: dict[str, int] = {}
    for name in TopologicalSorter(below).static_order():
        height[name] = 1 + max((height[other] for other in below[name]), default=0)
    return max(height.values())


def test_the_graph_is_not_empty():
    assert f"{PACKAGE}.simulation.training_step" in GRAPH[f"{PACKAGE}.simulation.observation"]
    assert f"{PACKAGE}.audit.engine" in GRAPH[f"{PACKAGE}.audit.ladder"]
    assert {("audit", "attacks"), ("callbacks", "audit"), ("cli", "callbacks")} <= ARROWS


def test_every_room_has_a_floor():
    assert set(FLOOR) == ROOMS
    assert len(ROOMS) <= MOST_ROOMS
    assert len(FLOORS) <= MOST_FLOORS
    assert longest_way_down(ARROWS) <= MOST_FLOORS


@pytest.mark.parametrize("name", FILES)
def test_imports_go_down(name):
    others = {(room(name), room(target)) for target in GRAPH[name]}
    assert {(a, b) for a, b in others if a != b and FLOOR[b] >= FLOOR[a]} == set()
    assert others & STRANGERS == set()


@pytest.mark.parametrize("name", [name for name in FILES if room(name) not in MAY_IMPORT_LIGHTNING])
def test_no_other_room_imports_lightning(name):
    tops = {imported.split(".")[0] for imported in IMPORTS[name]}
    assert tops & {"pytorch_lightning", "lightning", "lightning_fabric"} == set()


def private_reads(path: Path) -> list[str]:
    """Attributes with an underscore before their name, read of anything but `self`, `cls` and `super()`."""
    found = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Attribute):
            owner, name = ast.unparse(node.value), node.attr
        elif isinstance(node, ast.Call) and ast.unparse(node.func) in ("getattr", "hasattr", "setattr"):
            owner, name = ast.unparse(node.args[0]), ast.unparse(node.args[1]).strip("'")
        else:
            continue
        if name.startswith("_") and not name.startswith("__") and owner not in ("self", "cls", "super()"):
            found.append(f"{owner}.{name}")
    return found


@pytest.mark.parametrize("name", [name for name in FILES if room(name) in READ_NO_PRIVATES])
def test_private_attributes_of_others_are_read_in_one_file(name):
    assert bool(private_reads(FILES[name])) == (name.removeprefix(f"{PACKAGE}.") in PRIVATE_READERS)


def test_no_imports_run_in_a_circle():
    try:
        order = list(TopologicalSorter(GRAPH).static_order())
    except CycleError as error:
        pytest.fail(f"circle: {' -> '.join(error.args[1])}")
    assert set(order) == set(FILES)


@pytest.mark.parametrize("path", sorted((ROOT.parent / "examples").glob("*.py")), ids=lambda path: path.name)
def test_examples_import_public_names(path):
    names = {name for name in imported_names(path, "example") if name.split(".")[0] == PACKAGE}
    assert names <= {PACKAGE, *(f"{PACKAGE}.{name}" for name in PUBLIC)}

"""Public names and signatures are those of `public_api.txt`, and whoever changes them says so in the changelog.

`python tests/test_public_api.py` writes the listing anew. It refuses as long as the changelog's section *Unreleased*
does not name what changed, or is what it was when the listing was last written.
"""

from __future__ import annotations

import enum
import hashlib
import importlib
import inspect
import pkgutil
import re
import sys
from pathlib import Path

import pytest

import lightning_gradaudit

ROOT = Path(__file__).parents[1]
LISTING = Path(__file__).with_name("public_api.txt")
HOW = "`python tests/test_public_api.py` writes it anew, once CHANGELOG.md says under Unreleased what changed."


def public_modules():
    """The package, its sub-packages that export names, and the errors."""
    found = [lightning_gradaudit, importlib.import_module("lightning_gradaudit.errors")]
    for info in pkgutil.walk_packages(lightning_gradaudit.__path__, "lightning_gradaudit."):
        if info.ispkg:
            module = importlib.import_module(info.name)
            found += [module] if getattr(module, "__all__", None) else []
    return found


def exported(module):
    own = [name for name, value in vars(module).items() if getattr(value, "__module__", None) == module.__name__]
    return sorted(getattr(module, "__all__", [name for name in own if not name.startswith("_")]))


class Short:
    """A default as the listing shows it: of long ones the class alone, which have settings of their own."""

    def __init__(self, default):
        self.text = repr(default) if len(repr(default)) <= 60 else f"{type(default).__name__}(...)"

    def __repr__(self):
        return self.text


def arguments(function):
    """The signature without annotations, which Python versions print differently, and addresses."""
    try:
        signature = inspect.signature(function)
    except (TypeError, ValueError):
        return ""
    empty = inspect.Parameter.empty
    bare = [
        p.replace(annotation=empty, default=empty if p.default is empty else Short(p.default))
        for p in signature.parameters.values()
    ]
    text = str(signature.replace(parameters=bare, return_annotation=inspect.Signature.empty))
    return re.sub(r" at 0x[0-9a-f]+", "", text)


def described(name, value):
    """Lines of one name: of a class its constructor and what it defines itself."""
    if not inspect.isclass(value):
        return [name + (arguments(value) if inspect.isroutine(value) else "")]
    if issubclass(value, enum.Enum):
        return [name, *(f"{name}.{member.name} = {member.value!r}" for member in value)]
    lines = [name + ("" if issubclass(value, Exception) else arguments(value))]
    for key, member in vars(value).items():
        if key.startswith(("_", "on_")):  # Lightning's hooks are not called by users
            continue
        if inspect.isfunction(member) or isinstance(member, (classmethod, staticmethod)):
            lines.append(f"{name}.{key}{arguments(getattr(value, key))}")
        elif isinstance(member, property):
            lines.append(f"{name}.{key}")
    return lines


def listing():
    lines = []
    for module in public_modules():
        for name in exported(module):
            if not name.startswith("__"):
                lines += described(f"{module.__name__}.{name}", getattr(module, name))
    return sorted(set(lines))


def unreleased(changelog):
    found = re.search(r"^## \[Unreleased\]\n(.*?)(?=^## \[|\Z)", changelog, flags=re.DOTALL | re.MULTILINE)
    assert found is not None
    return found[1]


def digest(text):
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def changed(old, new):
    return sorted(set(old) ^ set(new))


def unsaid(lines, section):
    """Of changed lines those of whose names (class, function or member) the section has none."""
    said = set(re.findall(r"\w+", section))

    def names(line):
        return set(re.match(r"[\w.]+", line)[0].split(".")[1:]) - packages

    packages = {part for module in public_modules() for part in module.__name__.split(".")}
    return [line for line in lines if not names(line) & said]


def read():
    head, *lines = LISTING.read_text().splitlines()
    return head.rpartition(" ")[2], lines


def test_public_names_and_signatures_are_those_of_the_listing():
    new = listing()
    differences = [f"{'+' if line in new else '-'} {line}" for line in changed(read()[1], new)]
    assert not differences, "\n".join(["The public API is not that of tests/public_api.txt.", *differences, HOW])


def test_the_listing_holds_the_public_face():
    lines = read()[1]
    for start in (
        "GradAudit(",
        "attacks.Attack",
        "metrics.Exposure(",
        "Status.PASS",
        "Snapshot.from_batch(",
        "compare(",
    ):
        assert any(line.startswith(f"lightning_gradaudit.{start}") for line in lines), start
    assert not any(" at 0x" in line for line in lines)


@pytest.mark.parametrize(
    ("line", "section", "missing"),
    [
        ("lightning_gradaudit.attacks.Newest(*, rate=1)", "- `attacks.Newest`: a new attack.", False),
        ("lightning_gradaudit.attacks.Newest(*, rate=1)", "- Something of the attacks.", True),
        ("lightning_gradaudit.Auditor.submit(self, snapshot)", "- `Auditor` takes a mapping.", False),
        ("lightning_gradaudit.Auditor.submit(self, snapshot)", "- `submit` takes a mapping.", False),
        ("lightning_gradaudit.Auditor.submit(self, snapshot)", "- Faster.", True),
    ],
)
def test_a_change_that_the_changelog_does_not_name_is_found(line, section, missing):
    assert unsaid([line], section) == ([line] if missing else [])


def main():
    """Write the listing, if the changelog says what changed."""
    new, section = listing(), unreleased((ROOT / "CHANGELOG.md").read_text())
    if LISTING.exists():
        written, old = read()
        if not (lines := changed(old, new)):
            return "The listing is up to date."
        if missing := unsaid(lines, section):
            return "\n".join(["CHANGELOG.md does not name under Unreleased:", *missing])
        if digest(section) == written:
            return "CHANGELOG.md, Unreleased, is what it was when the listing was last written. Say there what changed."
    LISTING.write_text(
        "\n".join([f"# Written by tests/test_public_api.py; Unreleased was {digest(section)}", *new]) + "\n"
    )
    return None


if __name__ == "__main__":
    sys.exit(main())

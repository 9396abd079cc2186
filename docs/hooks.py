"""Make one site of files that also read well in the repository: README, benchmarks and changelog become pages.

Links are written for the repository; here those to such files, and to examples, are led to their pages.
"""

from __future__ import annotations

import contextlib
import io
import posixpath
import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parents[1]
PAGES = {
    "README.md": "index.md",
    "benchmarks/README.md": "benchmarks.md",
    "CHANGELOG.md": "changelog.md",
    "CONTRIBUTING.md": "contributing.md",
    "SECURITY.md": "security.md",
}
_SOURCES = {page: source for source, page in PAGES.items()}


def on_files(files: Files, config: Any) -> Files:
    """Add the pages that lie elsewhere, and the help of the command."""
    for source, page in PAGES.items():
        files.append(File.generated(config, page, content=(ROOT / source).read_text(encoding="utf-8")))
    files.append(File.generated(config, "command_line.md", content=_command_line()))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Lead links of the repository to pages of the site."""
    uri = page.file.src_uri
    folder = posixpath.dirname(_SOURCES.get(uri, f"docs/{uri}"))

    def lead(match: re.Match[str]) -> str:
        target, _, anchor = match[2].partition("#")
        if not target or "://" in target:
            return match[0]
        path = posixpath.normpath(posixpath.join(folder, target))
        if path in PAGES:
            found = PAGES[path]
        elif path.startswith("docs/"):
            found = path.removeprefix("docs/")
        elif path.startswith("examples/"):
            found, anchor = "examples.md", anchor or posixpath.basename(path).replace(".", "")
        else:
            return f"`{path}`"
        found = posixpath.relpath(found, posixpath.dirname(uri))
        return f"{match[1]}({found}{'#' + anchor if anchor else ''})"

    return re.sub(r"(!?\[[^\]]*\])\(([^)\s]+)\)", lead, markdown)


def _command_line() -> str:
    """Return the help of the command and of each of its verbs, as it is printed."""
    from lightning_gradaudit.cli.main import build_parser, main

    verbs = re.findall(r"^    (\w+) ", build_parser().format_help(), flags=re.MULTILINE)
    parts = ["# The command\n"]
    for arguments in ([], *([verb] for verb in verbs)):
        out = io.StringIO()
        with contextlib.redirect_stdout(out), contextlib.suppress(SystemExit):
            main([*arguments, "--help"])
        parts.append(f"## gradaudit {' '.join(arguments)}\n\n```text\n{out.getvalue().strip()}\n```\n")
    return "\n".join(parts)

"""Let the reference show doctests as code: what the docstrings head "Example:" is "Examples:" to its parser."""

from __future__ import annotations

import re
from typing import Any

import griffe


class DoctestHeading(griffe.Extension):
    """Rename the heading."""

    def on_instance(self, *, obj: griffe.Object, **_: Any) -> None:
        if obj.docstring is not None:
            obj.docstring.value = re.sub(r"^Example:$", "Examples:", obj.docstring.value, flags=re.MULTILINE)

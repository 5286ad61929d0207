"""For the documentation site: examples that stand in a docstring's text become blocks of code there."""

from __future__ import annotations

import re
from typing import Any

import griffe

# A run of `>>>` lines with what they print, up to an empty line, at the margin or indented under `Example:`.
_EXAMPLE = re.compile(r"(?m)^(?P<indent> *)>>> .*(?:\n(?P=indent) *\S.*)*")


def fenced(text: str) -> str:
    """The text with every run of `>>>` lines, and what they print, fenced as a Python session."""

    def fence(match: re.Match[str]) -> str:
        indent = match["indent"]
        return f"{indent}```pycon\n{match[0].rstrip()}\n{indent}```"

    return _EXAMPLE.sub(fence, text)


class DoctestBlocks(griffe.Extension):
    """Named in `mkdocs.yml`."""

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        """Rewrite the docstring of whatever is documented."""
        if obj.docstring is not None:
            obj.docstring.value = fenced(obj.docstring.value)

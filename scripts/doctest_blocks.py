"""For the documentation site: examples that stand in a docstring's text become blocks of code there."""

from __future__ import annotations

import re
from typing import Any

import griffe

_EXAMPLE = re.compile(r"(?m)^(?:>>> .*\n?)(?:(?:>>> |\.\.\. ?).*\n?|(?!\s*$)(?!>>> ).+\n?)*")


def fenced(text: str) -> str:
    """The text with every run of `>>>` lines, and what they print, fenced as a Python session."""
    return _EXAMPLE.sub(lambda found: f"```pycon\n{found.group(0).rstrip()}\n```\n", text)


class DoctestBlocks(griffe.Extension):
    """Named in `mkdocs.yml`."""

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        """Rewrite the docstring of whatever is documented."""
        if obj.docstring is not None:
            obj.docstring.value = fenced(obj.docstring.value)

"""The text of the package's page: README.md without what would be broken outside this repository.

A package page shows no file of the repository: the README's pictures would be missing, and its links lead nowhere.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from hatchling.metadata.plugin.interface import MetadataHookInterface

_PICTURE = re.compile(r"!\[[^\]]*\]\((?!https?:)[^)]*\)\n\n(\*[^*]+\*\n\n)?")
_LINK = re.compile(r"\[([^\]]+)\]\((?!https?:|#)([^)]*)\)")


class ReadmeHook(MetadataHookInterface):
    """Fills in the `readme` of the package's metadata."""

    def update(self, metadata: dict[str, Any]) -> None:
        text = (Path(self.root) / "README.md").read_text(encoding="utf-8")
        metadata["readme"] = {"content-type": "text/markdown", "text": package_page(text)}


def package_page(readme: str) -> str:
    """The README without pictures and their captions; a link to a file becomes its words and the file's name."""
    return _LINK.sub(r"\1 (`\2` in the repository)", _PICTURE.sub("", readme))

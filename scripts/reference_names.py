"""For the documentation site: the table of all public names, made from the pages of the reference themselves."""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
PAGES = ROOT / "docs/reference"
MARK = "<!-- names -->"
PACKAGE = "pytorch_influence_functions"
# Documented, but reached through a method of the result.
_BEHIND = "report."
_ENTRY = re.compile(rf"(?m)^::: {PACKAGE}\.([\w.]+)$")


def entries(folder: Path = PAGES) -> dict[str, str]:
    """Every public name that is documented, such as `curvature.GGN`, with the page it is on.

    Raises:
        ValueError: a name is on two pages, or twice on one.
    """
    pages: dict[str, str] = {}
    for page in sorted(folder.glob("*.md")):
        for name in _ENTRY.findall(page.read_text(encoding="utf-8")):
            if name.startswith(_BEHIND):
                continue
            if name in pages:
                raise ValueError(f"{name} is documented in {pages[name]} and in {page.name}; keep one of them")
            pages[name] = page.name
    return pages


def shown(name: str) -> str:
    """What a user writes for a documented name: `ptif.attribute` is a function, and its module has the same name."""
    return f"ptif.{name.removeprefix('attribute.')}"


def table(pages: dict[str, str], summary: Callable[[str], str]) -> str:
    """The names in alphabetical order, whatever their module and case, each with its first sentence."""
    rows = ["| name | |", "|---|---|"]
    for name in sorted(pages, key=lambda n: (n.split(".")[-1].lower(), n)):
        text = summary(name).replace("|", "\\|")
        rows.append(f"| [`{name.split('.')[-1]}`]({pages[name]}#{PACKAGE}.{name}) `{shown(name)}` | {text} |")
    return "\n".join(rows)


@cache
def _package() -> Any:
    import griffe

    return griffe.load(PACKAGE, search_paths=[ROOT / "src"])


def first_sentence(name: str) -> str:
    """The first sentence of the documentation of a name."""
    docstring = _package()[name].docstring
    paragraph = " ".join(docstring.value.split("\n\n")[0].split()) if docstring else ""
    return re.split(r"(?<=[^.][.?])(?= [A-Z`])", paragraph)[0]


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Called by mkdocs for every page."""
    return markdown.replace(MARK, table(entries(), first_sentence)) if MARK in markdown else markdown

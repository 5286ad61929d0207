"""The page of the package shows nothing broken: no picture and no link that only the repository has."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
pytest.importorskip("hatchling")


def package_page(text: str) -> str:
    spec = importlib.util.spec_from_file_location("hatch_build", ROOT / "hatch_build.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return str(module.package_page(text))


def test_pictures_go_with_their_captions_and_links_keep_their_words() -> None:
    text = "# A\n\n![a](docs/a.png)\n\n*What it\nshows.*\n\nSee [the page](docs/b.md), [c](https://c.org), [d](#d).\n"
    assert package_page(text) == ("# A\n\nSee the page (`docs/b.md` in the repository), [c](https://c.org), [d](#d).\n")


def test_the_readme_has_nothing_broken_left() -> None:
    page = package_page((ROOT / "README.md").read_text(encoding="utf-8"))
    assert not re.search(r"!\[[^\]]*\]\((?!https?:)", page) and not re.search(r"\]\((?!https?:|#)", page)
    assert "## The one call" in page and len(page) > 5000

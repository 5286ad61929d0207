"""The documentation site: every public name is in the reference, and has words of its own."""

from __future__ import annotations

import inspect
import re
import sys
from pathlib import Path

import pytest

import pytorch_influence_functions as ptif

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "scripts"))

REFERENCE = set(
    re.findall(r"(?m)^::: pytorch_influence_functions\.([\w.]+)$", (ROOT / "docs/reference.md").read_text())
)
NAMES = sorted(set(ptif.__all__) - {"__version__", "evaluation"})
JUDGING = sorted(
    name for name, value in vars(ptif.evaluation).items() if inspect.isclass(value) or inspect.isfunction(value)
)


@pytest.mark.parametrize("name", NAMES)
def test_every_public_name_is_in_the_reference_with_words(name: str) -> None:
    assert name in {entry.split(".")[-1] for entry in REFERENCE}
    assert len(inspect.getdoc(getattr(ptif, name)) or "") > 20


@pytest.mark.parametrize("name", JUDGING)
def test_so_is_every_name_of_the_evaluation(name: str) -> None:
    assert f"evaluation.{name}" in REFERENCE or name in REFERENCE
    assert len(inspect.getdoc(getattr(ptif.evaluation, name)) or "") > 20


@pytest.mark.parametrize("name", ["dual", "ekfac", "kfac", "lissa", "gauss_newton", "trak", "source", "datainf"])
def test_methods_have_formula_cost_or_paper(name: str) -> None:
    words = inspect.getdoc(getattr(ptif, name)) or ""
    assert ">>>" in words or "Reference" in words or "score = " in words


def test_every_page_is_in_the_navigation() -> None:
    nav = (ROOT / "mkdocs.yml").read_text()
    for page in (ROOT / "docs").glob("*.md"):
        assert f": {page.name}\n" in nav, page.name


def test_examples_in_docstrings_become_blocks() -> None:
    griffe = pytest.importorskip("griffe")
    from doctest_blocks import fenced

    assert griffe is not None
    text = "Words.\n\n>>> f(1)\n2\n>>> for x in y:\n...     pass\n\nMore words."
    assert fenced(text) == "Words.\n\n```pycon\n>>> f(1)\n2\n>>> for x in y:\n...     pass\n```\n\nMore words."

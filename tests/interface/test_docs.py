"""The documentation site: every public name is in the reference, and has words of its own."""

from __future__ import annotations

import inspect
import re
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

import pytorch_influence_functions as ptif

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "scripts"))

import reference_names  # noqa: E402 - found through the line above

PAGES = reference_names.entries()
MODULES = {name: value for name in ptif.__all__ if inspect.ismodule(value := getattr(ptif, name))}
# The old submodules are documented as modules: their names are those of `ptif.classic`.
OLD = {"calc_influence_function", "influence_function", "utils"}
NAMES = {
    f"{place}{name}": getattr(module, name)
    for place, module in [("", ptif), *((f"{name}.", module) for name, module in MODULES.items() if name not in OLD)]
    for name in module.__all__
}
# A section is a word with a colon and an indented block; any other heading would be shown as a paragraph.
SECTIONS = {"Args", "Attributes", "Returns", "Yields", "Raises", "Note", "Example"}


def documented(path: str) -> Any:
    """The object that an entry of the reference shows."""
    found: Any = ptif
    for part in reference_names.shown(path).split(".")[1:]:
        found = getattr(found, part)
    return found


@pytest.mark.parametrize("name", [n for n in NAMES if n != "__version__" and n not in MODULES])
def test_every_public_name_is_in_the_reference_with_words(name: str) -> None:
    value = NAMES[name]
    # A name that stands at two levels is documented once.
    assert any(documented(path) is value for path in PAGES), f"::: pytorch_influence_functions.{name}"
    if callable(value):
        assert len(inspect.getdoc(value) or "") > 20


def test_the_reference_has_no_other_names() -> None:
    public = [value for name, value in NAMES.items() if name != "__version__"]
    assert [path for path in PAGES if not any(documented(path) is value for value in public)] == []


@pytest.mark.parametrize("name", [n for n in MODULES if n not in OLD])
def test_every_module_is_named_in_the_reference(name: str) -> None:
    assert f"`ptif.{name}`" in (ROOT / "docs/reference/index.md").read_text()


def test_the_table_of_names_leads_to_every_entry() -> None:
    pytest.importorskip("griffe")
    lines = reference_names.on_page_markdown(f"# All\n\n{reference_names.MARK}\n").splitlines()
    rows = [
        re.match(r"\| \[`(\w+)`\]\((\w+\.md)#pytorch_influence_functions\.([\w.]+)\) `ptif\.", r) for r in lines[4:]
    ]
    assert all(rows) and {m[3]: m[2] for m in rows if m} == PAGES
    names = [m[1].lower() for m in rows if m]
    assert names == sorted(names) and len(names) > 150
    one = next(line for line in lines if "`ptif.ekfac`" in line)
    assert one.endswith("| EK-FAC: a Kronecker-factored eigenbasis per layer, with measured eigenvalues. |")


def test_a_name_on_two_pages_is_refused(tmp_path: Path) -> None:
    for name in ("a.md", "b.md"):
        (tmp_path / name).write_text("::: pytorch_influence_functions.ekfac\n")
    with pytest.raises(ValueError, match=r"ekfac is documented in a\.md and in b\.md"):
        reference_names.entries(tmp_path)


@pytest.mark.parametrize("name", sorted(n for n in ptif.methods.__all__ if inspect.isfunction(NAMES[f"methods.{n}"])))
def test_a_method_has_cost_and_reference_or_identity(name: str) -> None:
    text = inspect.getdoc(NAMES[f"methods.{name}"]) or ""
    assert name == "source" or ("Cost: " in text and re.search(r"References?: |Identity: ", text))


def headings(module: ModuleType) -> list[str]:
    """The headings in the documentation of a module's public functions, classes and their methods."""
    found = []
    for name in module.__all__:
        value = getattr(module, name)
        for one in [value, *(vars(value).values() if inspect.isclass(value) else ())]:
            text = inspect.getdoc(one) or ""
            found += [f"{name}: {m[1]}" for m in re.finditer(r"(?m)^(\w[\w ()]*):\n {2,}\S", text)]
    return found


@pytest.mark.parametrize("name", [n for n in MODULES if n not in OLD])
def test_headings_are_those_that_the_site_knows(name: str) -> None:
    assert [h for h in headings(MODULES[name]) if h.split(": ")[1] not in SECTIONS] == []


def test_every_page_is_in_the_navigation() -> None:
    nav = (ROOT / "mkdocs.yml").read_text()
    pages = list((ROOT / "docs").rglob("*.md"))
    assert len(pages) > 20
    for page in pages:
        assert re.search(rf"(?m)^ +- (.*: )?{page.relative_to(ROOT / 'docs')}$", nav), page.name


def test_examples_in_docstrings_become_blocks() -> None:
    pytest.importorskip("griffe")
    from doctest_blocks import fenced

    text = "Words.\n\n>>> f(1)\n2\n>>> for x in y:\n...     pass\n\nMore words."
    assert fenced(text) == "Words.\n\n```pycon\n>>> f(1)\n2\n>>> for x in y:\n...     pass\n```\n\nMore words."


def test_so_do_those_under_a_heading() -> None:
    pytest.importorskip("griffe")
    from doctest_blocks import fenced

    text = "Words.\n\nExample:\n    >>> f(1)\n    [2,\n     3]\n\n    >>> g()\nMore."
    first, second = ">>> f(1)\n    [2,\n     3]", ">>> g()"
    blocks = [f"    ```pycon\n    {code}\n    ```\n" for code in (first, second)]
    assert fenced(text) == "Words.\n\nExample:\n" + "\n".join(blocks) + "More."

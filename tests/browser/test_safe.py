"""Nothing from the data runs, nothing is fetched, and what cannot be shown says so."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.browser.looks import VIEWS, Looks


def test_scripts_in_texts_names_classes_and_title_are_shown_never_run(look: Callable[..., Looks]) -> None:
    page = look("attack")
    for view in VIEWS:
        page.go(view)
        assert page.page.evaluate("window.broken === undefined"), view
        assert page.page.locator("main img[onerror]").count() == 0
    page.go("q/0")
    assert "</script><script>window.broken=1</script>" in page.text()
    page.page.locator("#view-query .open").first.click()
    assert "window.broken=1" in page.page.locator("dialog[open]").inner_text()
    assert page.page.evaluate("window.broken === undefined")


def test_a_script_put_into_the_page_is_refused_by_its_policy(look: Callable[..., Looks]) -> None:
    """The second wall: even markup that got in would not run."""
    page = look("pictures")
    page.page.evaluate(
        "() => { const s = document.createElement('img'); s.setAttribute('onerror', 'window.broken=3'); "
        "s.src = 'data:,x'; document.body.append(s); }"
    )
    page.page.wait_for_timeout(200)
    assert page.page.evaluate("window.broken === undefined")
    assert any("Content Security Policy" in p for p in page.problems)
    page.problems.clear()


def test_what_cannot_be_read_says_why_and_the_rest_is_there(look: Callable[..., Looks]) -> None:
    page = look("odd")
    assert "could not be shown" in page.text()
    for view, words in (("q/1", "picture 1 is gone"), ("q/2", "NaN"), ("q/3", "語 عربى")):
        page.go(view)
        assert words in page.page.locator("#view-query .query .side").inner_text(), view
    text = page.page.locator("#view-query .side .text")
    assert text.inner_text().endswith("x" * 10_000)  # a query's text is kept whole
    assert text.evaluate("(one) => one.parentElement.clientHeight < 500")  # and scrolls in its place
    page.go("q/0")
    assert page.page.locator("#view-query .side img").count() == 1


@pytest.mark.parametrize("width", [380, 1600])
@pytest.mark.parametrize("kind", ["odd", "attack", "long"])
def test_long_and_foreign_words_stay_inside(look: Callable[..., Looks], kind: str, width: int) -> None:
    page = look(kind, width=width)
    for view in VIEWS:
        page.go(view)
        assert page.page.evaluate("document.documentElement.scrollWidth") <= width, view
        for button in page.page.locator(".suspect .ticks button:first-child").all()[:3]:
            button.click()  # so that the decisions hold some


def test_the_folder_form_opens_from_disk(look: Callable[..., Looks]) -> None:
    page = look("folder", "q/0")
    assert page.page.locator("#view-query img").count() == 21
    assert page.page.evaluate("[...document.images].every((i) => i.naturalWidth > 0)")


def test_a_page_without_its_folder_says_so(
    look: Callable[..., Looks], reports: dict[str, Path], tmp_path: Path
) -> None:
    alone = tmp_path / "folder.html"
    shutil.copy(reports["folder"], alone)
    page = look(alone, "q/0")
    assert "keep the folder folder_files beside the page" in page.text()
    page.problems.clear()  # the browser's own words about the missing files


def test_without_javascript_the_overview_is_there(browser: object, reports: dict[str, Path]) -> None:
    context = browser.new_context(java_script_enabled=False)  # type: ignore[attr-defined]
    page = context.new_page()
    page.goto(reports["pictures"].as_uri())
    assert "How far to trust it" in page.locator("main").inner_text()
    context.close()


def test_it_prints(look: Callable[..., Looks]) -> None:
    assert len(look("pictures", "q/1").page.pdf()) > 10_000

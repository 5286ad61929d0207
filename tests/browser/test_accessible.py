"""Every view, both themes, both widths: nothing that axe-core calls serious, nothing wider than the window."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from axe_playwright_python.sync_playwright import Axe

from tests.browser.looks import VIEWS, Looks

SERIOUS = ("serious", "critical")


@pytest.mark.parametrize("width", [380, 1600])
@pytest.mark.parametrize("theme", ["light", "dark"])
@pytest.mark.parametrize("kind", ["pictures", "texts", "chats", "tables", "bare"])
def test_axe_finds_nothing_serious_and_nothing_sticks_out(
    look: Callable[..., Looks], kind: str, theme: str, width: int
) -> None:
    page = look(kind, theme=theme, width=width)
    for view in VIEWS:
        page.go(view)
        found = Axe().run(page.page).response["violations"]
        serious = [
            (v["id"], v["nodes"][0]["html"][:120], v["nodes"][0]["failureSummary"])
            for v in found
            if v["impact"] in SERIOUS
        ]
        assert serious == [], view
        wide = page.page.evaluate("document.documentElement.scrollWidth")
        assert wide <= width, f"{view} is {wide} pixels wide"


def test_axe_does_find_what_is_wrong(look: Callable[..., Looks]) -> None:
    """A judge that never objects proves nothing."""
    page = look("pictures")
    page.page.evaluate("document.querySelector('main').append(document.createElement('button'))")
    assert "button-name" in [v["id"] for v in Axe().run(page.page).response["violations"]]


def test_an_open_example_is_accessible_and_closes(look: Callable[..., Looks]) -> None:
    page = look("pictures", "training/labels")
    page.page.locator(".suspect .open").first.click()
    assert page.page.locator("dialog[open]").count() == 1
    assert [v["id"] for v in Axe().run(page.page).response["violations"] if v["impact"] in SERIOUS] == []
    page.page.keyboard.press("Escape")
    assert page.page.locator("dialog[open]").count() == 0


def test_the_skip_link_and_the_headings(look: Callable[..., Looks]) -> None:
    page = look("pictures").page
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.className") == "skip"
    for view in VIEWS:
        page.evaluate("(view) => { location.hash = view; }", view)
        page.wait_for_timeout(100)
        assert page.locator("main > section:visible h1").count() == 1, view

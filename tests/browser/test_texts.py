"""Texts token by token: cut and shown whole, coloured, searched, by source; as text, never as markup."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from tests.browser.looks import Looks


def cards(page: Looks) -> list[int]:
    return [
        int(text[1:]) for text in page.page.locator(".card.doc:visible .doc-head .link:first-child").all_inner_texts()
    ]


def test_long_texts_are_cut_around_their_strongest_token_and_shown_whole_on_demand(look: Callable[..., Looks]) -> None:
    page = look("chats", "q/0")
    card = page.page.locator(".card.doc").filter(has=page.page.locator(".more")).first
    strongest = card.locator(".token.harms").first
    cut = card.locator(".tokens").inner_text()
    assert "_195 " in cut and "_100 " not in cut and "…" in cut and strongest.inner_text().endswith("_195")
    assert float(strongest.get_attribute("title").replace("−", "-")) < -1e-3
    button = card.get_by_role("button", name="Show all")
    assert button.get_attribute("aria-expanded") == "false" and "305 tokens" in button.inner_text()
    button.click()
    whole = card.locator(".tokens").inner_text()
    assert "_100 " in whole and "_299" in whole and "…" not in whole
    card.get_by_role("button", name="Show less").click()
    assert card.locator(".tokens").inner_text() == cut


def test_turns_are_named_and_context_is_told_from_what_is_taught(look: Callable[..., Looks]) -> None:
    page = look("chats", "q/1")
    box = page.page.locator(".asked .tokens")
    assert box.locator(".role").all_inner_texts()[0] == "user"
    assert "who" in box.locator(".context").first.inner_text()
    assert box.locator(".taught").first.inner_text().strip().startswith("word1_0")


def test_texts_are_searched_and_filtered_by_source(look: Callable[..., Looks]) -> None:
    page = look("chats", "q/0")
    everything = cards(page)
    page.page.get_by_label("Search these texts").fill(f"word{everything[0]}_3")
    assert set(cards(page)) == {everything[0]}
    page.page.get_by_label("Search these texts").fill("")
    page.page.locator("#view-query label:text-matches('^Source')").locator("select").select_option(
        label="<b>reviews</b>"
    )
    assert set(cards(page)) == {i for i in everything if i % 3 == 1}
    assert page.page.locator("#view-query p[role=status]").inner_text() == f"{len(cards(page))} of 8 texts"
    assert page.page.locator(".sources .name").count() == 3


@pytest.mark.parametrize("theme", ["light", "dark"])
@pytest.mark.parametrize("width", [380, 1600])
def test_nothing_runs_and_nothing_sticks_out(look: Callable[..., Looks], width: int, theme: str) -> None:
    page = look("chats", "q/0", theme=theme, width=width)
    for button in page.page.locator(".card.doc .more").all():
        button.click()
    page.page.locator(".card.doc .link").first.click()
    assert "window.broken=1" in page.page.locator("dialog[open]").inner_text()
    assert page.page.evaluate("window.broken === undefined")
    assert page.page.locator("main img").count() == 0
    assert page.page.evaluate("document.documentElement.scrollWidth") <= width

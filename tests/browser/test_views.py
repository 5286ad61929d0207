"""What a reader does: filter, search, step with arrow keys, look at an example, change lists."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from tests.browser.looks import VIEWS, Looks
from tests.interface.report_cases import CLASSES, Page, probabilities


def tiles(page: Looks) -> int:
    return int(page.page.locator("#grid > li:visible").count())


def choose(page: Looks, name: str, value: str, form: str = "#filters") -> None:
    page.page.locator(f"{form} label:text-matches('^{name}')").locator("select").select_option(value)


def test_filters_and_search_narrow_the_grid(look: Callable[..., Looks]) -> None:
    page = look("pictures", "queries")
    assert tiles(page) == 6 and page.page.locator("#count").inner_text() == "6 queries"
    said, labels = probabilities().argmax(1).tolist(), [i % 3 for i in range(6)]
    wrong = sum(a != b for a, b in zip(said, labels, strict=True))
    choose(page, "Answered", "1")
    assert tiles(page) == wrong and page.page.locator("#count").inner_text() == f"{wrong} of 6 queries"
    choose(page, "Answered", "")
    choose(page, "Label", CLASSES[1])
    assert tiles(page) == 2
    choose(page, "Label", "")
    sure = probabilities().max(1).values
    choose(page, "Confidence", "below 50%")
    assert tiles(page) == int((sure < 0.5).sum())
    choose(page, "Confidence", "")
    choose(page, "Order", "unsure")
    first = page.page.locator("#grid .lines").first.inner_text()
    assert f"Query {int(sure.argmin())}".lower() in first.lower()
    page.page.get_by_label("Search").fill("query 4")
    assert tiles(page) == 1
    page.page.get_by_label("Search").fill("no such thing")
    assert tiles(page) == 0 and page.page.locator("#count").inner_text() == "0 of 6 queries"


def test_texts_are_searched(look: Callable[..., Looks]) -> None:
    page = look("texts", "queries")
    page.page.get_by_label("Search").fill("3 a text that is long")
    assert tiles(page) == 1


def test_arrow_keys_move_between_queries_and_stop_at_the_ends(look: Callable[..., Looks]) -> None:
    page = look("pictures", "queries")
    choose(page, "Order", "order")
    page.page.locator("#grid a").first.click()
    page.settle()
    heading = page.page.locator("#view-query h1")
    assert heading.inner_text().endswith("0")
    for key, at in (
        ("ArrowRight", "1"),
        ("ArrowRight", "2"),
        ("ArrowLeft", "1"),
        ("ArrowLeft", "0"),
        ("ArrowLeft", "0"),
    ):
        page.page.keyboard.press(key)
        page.settle()
        assert heading.inner_text().endswith(at)
    page.page.keyboard.press("Escape")
    page.settle()
    assert tiles(page) == 6


def test_arrow_keys_walk_through_what_the_filter_left(look: Callable[..., Looks]) -> None:
    page = look("pictures", "queries")
    choose(page, "Label", CLASSES[2])
    choose(page, "Order", "order")
    page.page.locator("#grid a").first.click()
    page.settle()
    seen = [page.page.locator("#view-query h1").inner_text()]
    page.page.keyboard.press("ArrowRight")
    page.settle()
    seen.append(page.page.locator("#view-query h1").inner_text())
    assert [s.split()[-1] for s in seen] == ["2", "5"] and "2 of 2" in page.text()


def test_arrow_keys_move_the_focus_in_the_grid(look: Callable[..., Looks]) -> None:
    looks = look("pictures", "queries")
    choose(looks, "Order", "order")
    page = looks.page
    page.locator("#grid a").first.focus()
    page.keyboard.press("ArrowRight")
    assert page.evaluate("document.activeElement.getAttribute('href')") == "#q/1"


def test_mistakes_come_first(look: Callable[..., Looks]) -> None:
    page = look("pictures", "queries")
    said, labels = probabilities().argmax(1).tolist(), [i % 3 for i in range(6)]
    wrong = sum(a != b for a, b in zip(said, labels, strict=True))
    marks = ["✗" in text for text in page.page.locator("#grid .lines").all_inner_texts()]
    assert 0 < wrong < 6 and marks == [True] * wrong + [False] * (6 - wrong)


def suspects(page: Looks) -> list[int]:
    return [int(text.split()[0][1:]) for text in page.page.locator(".suspect h3").all_inner_texts()]


def test_doubtful_labels_are_searched_filtered_and_sorted(look: Callable[..., Looks]) -> None:
    page = look("pictures", "training/labels")
    assert suspects(page) == list(range(20))  # by self-influence
    panel = page.page.locator("#panel")
    choose(page, "Order", "index", "#panel .filters")
    choose(page, "Label", CLASSES[1], "#panel .filters")
    assert suspects(page) == [i for i in range(20) if i % 3 == 1]
    choose(page, "Label", "", "#panel .filters")
    said = probabilities(40).argmax(1).tolist()
    choose(page, "Show", "other", "#panel .filters")
    assert suspects(page) == [i for i in range(20) if said[i] != i % 3]
    choose(page, "Order", "model", "#panel .filters")
    sure = probabilities(40).max(1).values
    assert suspects(page) == sorted((i for i in range(20) if said[i] != i % 3), key=lambda i: -float(sure[i]))
    choose(page, "Show", "", "#panel .filters")
    panel.get_by_label("Search").fill("#17")
    assert suspects(page) == [17] and "1 of 20 training examples" in page.text()
    page.page.locator('.ticks[data-of="17"]').get_by_role("button", name="Keep").click()
    panel.get_by_label("Search").fill("")
    choose(page, "Show", "done", "#panel .filters")
    assert suspects(page) == [17]


def test_a_training_example_shows_what_the_model_says_and_whom_it_moves(look: Callable[..., Looks]) -> None:
    page = look("pictures", "training/labels")
    examples = Page(page.path).examples
    index = next(i for i in range(20) if examples[i]["help"] and examples[i]["harm"])
    page.page.get_by_role("button", name=f"Look at training example {index}", exact=True).first.click()
    page.settle()
    dialog = page.page.locator("#example")
    text = dialog.inner_text()
    assert "What the model says" in text and "Queries it helps most" in text and "Queries it harms most" in text
    shown = examples[index]
    assert dialog.locator(".moved a").count() == len(shown["help"]) + len(shown["harm"]) > 0
    dialog.locator(".moved a").first.click()
    page.settle()
    assert page.page.locator("#view-query h1").inner_text().endswith(str(shown["help"][0][0]))


def test_a_regression_has_no_words_of_classes(look: Callable[..., Looks]) -> None:
    page = look("numbers", "queries")
    errors = Page(page.path).index["queries"]["err"]
    first = page.page.locator("#grid .lines").first.inner_text()
    assert f"query {max(range(6), key=lambda q: abs(errors[q]))}" in first.lower() and "$" in first and "error" in first
    for view in ("training/labels", "q/1"):
        page.go(view)
        text = page.text().lower()
        assert "class" not in text and "label" not in text and "wrong value" in text
    assert page.page.get_by_role("tab", name="Classes").count() == 0
    table = page.page.locator(".beside table")
    assert table.locator("tbody tr").count() == 31 and "column 29 [m]" in table.inner_text()
    # No number is cut: each has all the room it needs.
    cut = (
        "() => [...document.querySelectorAll('.row.numbers td')].filter((td) => td.scrollWidth > td.clientWidth).length"
    )
    assert page.page.evaluate(cut) == 0


def test_a_query_shows_its_answer_cards_and_histogram_with_the_shown_marked(look: Callable[..., Looks]) -> None:
    page = look("pictures", "q/1")
    assert page.page.locator("#view-query .cards").nth(0).locator("li").count() == 10
    assert page.page.locator(".hist .help-tick").count() == 10 and page.page.locator(".hist .harm-tick").count() == 10
    assert page.page.locator(".hist rect").count() > 3 and "What the model says" in page.text()
    numbers = page.page.locator("#view-query .cards").nth(0).locator(".num").all_inner_texts()
    values = [float(n.replace("−", "-")) for n in numbers]
    assert values == sorted(values, reverse=True)
    record = Page(page.path).queries[1]
    assert values == [pytest.approx(score, rel=5e-3) for _, score in record["help"]]


def test_marks_lie_where_their_scores_are(look: Callable[..., Looks]) -> None:
    page = look("pictures", "q/2")
    record = Page(page.path).queries[2]
    low, high = record["hist"]["lo"], record["hist"]["hi"]
    for side, kind in (("help", "help-tick"), ("harm", "harm-tick")):
        seen = page.page.locator(f".hist .{kind}").evaluate_all(
            "(all) => all.map((one) => Number(one.getAttribute('x1')))"
        )
        meant = [min(599.0, max(1.0, 600 * (score - low) / (high - low))) for _, score in record[side]]
        assert seen == pytest.approx(meant, abs=0.01)


def test_tables_and_texts_are_cards_too(look: Callable[..., Looks]) -> None:
    page = look("tables", "q/1")
    rows = page.page.locator("#view-query .side tbody tr")
    assert rows.count() == 7 and rows.first.inner_text().startswith("age")
    assert page.page.locator("#view-query .card .row.numbers").count() == 20
    page = look("texts", "q/1")
    assert page.page.locator("#view-query .side .text").inner_text().startswith("1 a text that is long")
    card = page.page.locator("#view-query .card .text").first
    assert card.inner_text().endswith("…") and card.evaluate("(one) => one.scrollHeight > 0")


def test_every_view_can_be_reached_from_the_keyboard_and_by_its_address(look: Callable[..., Looks]) -> None:
    page = look("pictures")
    for view in VIEWS:
        page.go(view)
        assert page.page.locator("main > section:visible").count() == 1
    page.go("training/labels")
    page.page.locator("#tab-labels").focus()
    page.page.keyboard.press("ArrowRight")
    page.settle()
    assert page.page.locator("#tab-pairs").get_attribute("aria-selected") == "true"
    page.go("nonsense/<b>")
    assert page.page.locator("#view-overview").is_visible()


def test_tables_sort_by_their_columns(look: Callable[..., Looks]) -> None:
    page = look("pictures", "training/classes").page
    column = page.locator("#panel table").first
    column.get_by_role("button", name="Class ↕", exact=True).click()
    names = column.locator("tbody th").all_inner_texts()
    assert names == sorted(names)
    column.get_by_role("button", name="Class ↕", exact=True).click()
    assert column.locator("tbody th").all_inner_texts() == names[::-1]


def test_a_query_leads_to_the_verbs_that_say_more_of_it(look: Callable[..., Looks]) -> None:
    commands = look("pictures", "q/1").page.locator("#view-query .further code").all_inner_texts()
    assert [command.split()[1] for command in commands] == ["input-influence", "flip", "attack"]
    assert all(command.startswith(f"ptif {command.split()[1]} task.py --queries 1") for command in commands)
    assert not look("texts", "q/1").page.locator("#view-query .further").count(), "texts have no slopes"

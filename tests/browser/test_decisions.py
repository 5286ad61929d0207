"""Ticks: kept by the browser, taken back, downloaded in the documented format."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from pytorch_influence_functions.report import read_decisions
from tests.browser.looks import Looks
from tests.interface.report_cases import values


def downloaded(page: Looks, kind: str) -> str:
    with page.page.expect_download() as waiting:
        page.page.get_by_role("button", name=f"Download {kind}").click()
    found: Any = waiting.value
    assert found.suggested_filename == f"decisions.{kind.lower()}"
    with Path(found.path()).open(encoding="utf-8", newline="") as file:
        return file.read()


def tick(page: Looks, index: int, word: str) -> None:
    page.page.locator(f'.ticks[data-of="{index}"]').first.get_by_role("button", name=word).click()


def test_what_is_ticked_is_downloaded_in_the_documented_format(look: Callable[..., Looks]) -> None:
    page = look("pictures", "training/labels")
    tick(page, 3, "Wrong label")
    tick(page, 0, "Keep")
    tick(page, 1, "Duplicate")
    tick(page, 1, "Duplicate")  # a second time takes it back
    assert page.page.locator("#decided").inner_text() == "2"
    page.go("decisions")
    rows = list(csv.DictReader(io.StringIO(downloaded(page, "CSV"))))
    assert list(rows[0]) == ["index", "decision", "label", "name", "suggested_label", "self_influence", "relabel_as"]
    assert [(r["index"], r["decision"], r["label"]) for r in rows] == [
        ("0", "keep", "cat"),
        ("3", "wrong_label", "cat"),
    ]
    assert float(rows[0]["self_influence"]) == 1.0
    whole = json.loads(downloaded(page, "JSON"))
    assert (whole["format"], whole["version"]) == ("pytorch-influence-functions/decisions", 2)
    assert whole["training_examples"] == 40 and len(whole["report"]) == 16
    assert [(d["index"], d["decision"], d["name"]) for d in whole["decisions"]] == [
        (0, "keep", None),
        (3, "wrong_label", None),
    ]


def boxes(page: Looks, index: int) -> list[Any]:
    """Where the buttons of one example are on the page."""
    buttons = page.page.locator(f'section:visible .ticks[data-of="{index}"]').first.locator("button")
    return [buttons.nth(k).bounding_box() for k in range(buttons.count())]


@pytest.mark.parametrize("view", ["training/labels", "q/1"])
@pytest.mark.parametrize("width", [1600, 380])
def test_ticking_moves_no_button(look: Callable[..., Looks], view: str, width: int) -> None:
    page = look("pictures", view, width=width)
    index = int(page.page.locator("section:visible .ticks").first.get_attribute("data-of"))
    tick(page, index, "Duplicate")  # the page is scrolled to it first
    before = boxes(page, index)
    for word in ("Wrong label", "Duplicate", "Keep", "Keep"):
        tick(page, index, word)
        assert boxes(page, index) == before


def number(words: str) -> float:
    return float(words.replace("\u2212", "-"))


def test_what_is_ticked_is_summed_up_where_it_can_be_seen(look: Callable[..., Looks]) -> None:
    scores = values()
    page = look("pictures", "training/labels")
    bar = page.page.locator("#whatif")
    tick(page, 5, "Keep")
    assert bar.is_hidden()  # nothing to be removed
    tick(page, 3, "Wrong label")
    tick(page, 1, "Duplicate")
    page.settle()
    ticked = scores[:, [1, 3]].double().sum(1)
    words = bar.locator("p").inner_text()
    assert words.startswith("Without the 2 ticked examples the mean loss over all 6 queries would ")
    shown = number(bar.locator("b").inner_text()) * (1 if "rise" in words else -1)
    assert shown == pytest.approx(float(ticked.mean()), rel=6e-3)
    assert ("(worse)" in words) == (float(ticked.mean()) > 0) and "Sum of single effects" in words
    page.go("q/2")
    both = [number(text) for text in bar.locator("b").all_inner_texts()]
    assert both == pytest.approx([abs(float(ticked.mean())), abs(float(ticked[2]))], rel=6e-3)
    page.go("q/4")
    page.page.keyboard.press("ArrowLeft")  # whichever comes before it
    page.settle()
    q = int(page.page.url.rsplit("/", 1)[1])
    assert number(bar.locator("b").nth(1).inner_text()) == pytest.approx(abs(float(ticked[q])), rel=6e-3)
    page.go("decisions")
    assert bar.is_hidden()
    gains = [number(text) for text in page.page.locator("#decisions .moved").first.locator(".num").all_inner_texts()]
    assert sorted(gains) == pytest.approx(sorted(ticked[ticked.abs().argsort()].tolist()), rel=6e-3)
    for index in (1, 3):
        page.page.get_by_role("button", name=f"Forget the decision for example {index}").click()
        page.settle()
    assert "What if they were removed" not in page.text()
    page.go("queries")
    assert bar.is_hidden()


def test_what_was_relabelled_is_read_back(look: Callable[..., Looks], tmp_path: Path) -> None:
    page = look("pictures", "training/labels")
    tick(page, 0, "Duplicate")
    page.page.get_by_label("Relabel training example 3 as").select_option("dog")
    pressed = page.page.locator('.ticks[data-of="3"] button[aria-pressed="true"]')
    assert pressed.inner_text() == "Wrong label"
    tick(page, 4, "Wrong label")
    page.page.reload()
    page.settle()
    assert page.page.get_by_label("Relabel training example 3 as").input_value() == "dog"
    page.go("decisions")
    for kind in ("JSON", "CSV"):
        path = tmp_path / f"decisions.{kind.lower()}"
        path.write_text(downloaded(page, kind), encoding="utf-8", newline="")
        decisions = read_decisions(path, 40)
        assert (decisions.wrong_labels, decisions.duplicates, decisions.relabels) == ([3, 4], [0], {3: "dog"})
    page.go("training/labels")
    tick(page, 3, "Keep")  # what is kept has no other label
    assert page.page.get_by_label("Relabel training example 3 as").input_value() == ""


def test_a_right_value_is_a_number(look: Callable[..., Looks], tmp_path: Path) -> None:
    page = look("numbers", "training/labels")
    index = int(page.page.locator(".ticks").first.get_attribute("data-of"))
    field = page.page.get_by_label(f"Right value for training example {index}").first
    field.fill("123.5")
    field.press("Enter")
    page.go("decisions")
    path = tmp_path / "decisions.json"
    path.write_text(downloaded(page, "JSON"), encoding="utf-8")
    assert read_decisions(path, 40).relabels == {index: 123.5}


def test_the_browser_keeps_them_for_this_report_and_forgets_when_told(look: Callable[..., Looks]) -> None:
    page = look("pictures", "training/labels")
    tick(page, 5, "Duplicate")
    page.page.reload()
    page.settle()
    assert page.page.locator("#decided").inner_text() == "1"
    page.go("decisions")
    page.page.get_by_role("button", name="Forget the decision for example 5").click()
    page.settle()
    assert page.page.locator("#decided").inner_text() == "0"
    assert page.page.get_by_role("button", name="Download CSV").is_disabled()


def test_formulas_reach_no_spreadsheet(look: Callable[..., Looks], tmp_path: Path) -> None:
    from tests.interface.report_cases import pictures

    names = ['=HYPERLINK("http://x")', "+1", "-1", "@a", 'say "a", b', *[f"n{i}" for i in range(35)]]
    own = torch.linspace(1, 0, 40)  # the first five are among the doubtful
    page = look(
        Path(pictures(train_names=names).report(tmp_path / "f.html", self_influence=own).path), "training/labels"
    )
    for i in range(5):
        tick(page, i, "Keep")
    page.go("decisions")
    rows = list(csv.DictReader(io.StringIO(downloaded(page, "CSV"))))
    assert [r["name"] for r in rows] == ["'" + n for n in names[:4]] + [names[4]]


def test_marks_do_not_leave_one_report_for_another(look: Callable[..., Looks]) -> None:
    page = look("pictures", "training/labels")
    tick(page, 5, "Duplicate")
    page.path = page.path.with_name("texts.html")
    page.go("training/labels")
    assert page.page.locator("#decided").inner_text() == "0"

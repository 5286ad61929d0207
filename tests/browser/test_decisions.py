"""Ticks: kept by the browser, taken back, downloaded in the documented format."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from tests.browser.looks import Looks


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
    assert list(rows[0]) == ["index", "decision", "label", "name", "suggested_label", "self_influence"]
    assert [(r["index"], r["decision"], r["label"]) for r in rows] == [
        ("0", "keep", "cat"),
        ("3", "wrong_label", "cat"),
    ]
    assert float(rows[0]["self_influence"]) == 1.0
    whole = json.loads(downloaded(page, "JSON"))
    assert (whole["format"], whole["version"]) == ("pytorch-influence-functions/decisions", 1)
    assert whole["training_examples"] == 40 and len(whole["report"]) == 16
    assert [(d["index"], d["decision"], d["name"]) for d in whole["decisions"]] == [
        (0, "keep", None),
        (3, "wrong_label", None),
    ]


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

"""What was ticked on a page, read back."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from pytorch_influence_functions.core.errors import InvalidInput
from pytorch_influence_functions.report import Decisions, read_decisions

ROW = {"index": 3, "decision": "wrong_label", "label": "cat", "name": None, "suggested_label": "dog",
       "self_influence": 0.5, "relabel_as": "dog"}  # fmt: skip
HEAD = "index,decision,label,name,suggested_label,self_influence,relabel_as\r\n"


def saved(tmp_path: Path, rows: Any, **head: Any) -> Path:
    content = {"format": "pytorch-influence-functions/decisions", "version": 2, "report": "ab", "title": "t",
               "training_examples": 40, "decisions": rows} | head  # fmt: skip
    path = tmp_path / "decisions.json"
    path.write_text(json.dumps(content), encoding="utf-8")
    return path


def test_json_is_read_back(tmp_path: Path) -> None:
    rows = [
        ROW,
        {"index": 0, "decision": "keep"},
        {"index": 7, "decision": "duplicate"},
        ROW | {"index": 5, "relabel_as": 1.5},
    ]
    decisions = read_decisions(saved(tmp_path, rows), 40)
    assert [d.index for d in decisions.entries] == [0, 3, 5, 7] and len(decisions) == 4
    assert (decisions.wrong_labels, decisions.duplicates, decisions.kept) == ([3, 5], [7], [0])
    assert decisions.relabels == {3: "dog", 5: 1.5}
    assert (decisions.training_examples, decisions.report) == (40, "ab")
    first = decisions.entries[1]
    assert (first.label, first.name, first.suggested_label, first.self_influence) == ("cat", None, "dog", 0.5)
    assert repr(decisions) == "Decisions(2 wrong labels (2 with a new one), 1 duplicates, 1 kept)"
    assert "<td" in decisions._repr_html_()


def test_csv_is_read_back_without_the_apostrophes_for_spreadsheets(tmp_path: Path) -> None:
    path = tmp_path / "decisions.csv"
    path.write_bytes((HEAD + "3,wrong_label,cat,'=1+1,,0.25,dog\r\n9,keep,\"a,\nb\",'tis,,,\r\n").encode())
    decisions = read_decisions(path, 40)
    assert decisions.entries[0].name == "=1+1" and decisions.entries[0].self_influence == 0.25
    assert decisions.entries[1].label == "a,\nb" and decisions.entries[1].name == "'tis"
    assert decisions.relabels == {3: "dog"} and decisions.report is None


def test_the_first_version_of_the_format_is_read(tmp_path: Path) -> None:
    row = {k: v for k, v in ROW.items() if k != "relabel_as"}
    assert read_decisions(saved(tmp_path, [row], version=1)).relabels == {}
    path = tmp_path / "d.csv"
    path.write_text("index,decision,label,name,suggested_label,self_influence\n3,duplicate,,,,\n")
    assert read_decisions(path).duplicates == [3]


@pytest.mark.parametrize(
    ("rows", "head", "message"),
    [
        ([], {"format": "other"}, "holds no decisions"),
        ([], {"version": 3}, "has version 3 of the format and versions 1 and 2 can be read"),
        ("no", {}, "lacks its decisions"),
        ([], {"training_examples": None}, "lacks its decisions or its number"),
        ([], {"training_examples": 41}, "was written on a report of 41 training examples, and these are 40"),
        ([ROW | {"index": 40}], {}, "decides on training example 40, which is none of 40"),
        ([ROW | {"index": True}], {}, "decides on training example True"),
        ([3], {}, "decides on training example None"),
        ([ROW | {"decision": "drop"}], {}, "decision 'drop' for training example 3; it must be one of wrong_label"),
        ([ROW | {"relabel_as": [1]}], {}, r"relabels training example 3 as \[1\]"),
        ([ROW | {"decision": "keep"}], {}, "which is not ticked as a wrong label"),
        ([ROW, ROW], {}, "decides twice on training example 3"),
    ],
)
def test_what_the_page_did_not_write_is_refused(tmp_path: Path, rows: Any, head: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidInput, match=message):
        read_decisions(saved(tmp_path, rows, **head), 40)


def test_files_that_are_none(tmp_path: Path) -> None:
    with pytest.raises(InvalidInput, match="cannot be read"):
        read_decisions(tmp_path / "nothing.json")
    (tmp_path / "a.json").write_text("{")
    with pytest.raises(InvalidInput, match="is not JSON"):
        read_decisions(tmp_path / "a.json")
    (tmp_path / "a.csv").write_text("a,b\n1,2\n")
    with pytest.raises(InvalidInput, match="has no column 'index'"):
        read_decisions(tmp_path / "a.csv")
    assert len(Decisions(())) == 0

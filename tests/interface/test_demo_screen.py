"""Names of files on the demo's screen are whole, 80 columns wide."""

from __future__ import annotations

import io

import pytest

from pytorch_influence_functions.demo.screen import Screen


def test_names_stay_whole_and_descriptions_wrap() -> None:
    rich = pytest.importorskip("rich.console")
    out = io.StringIO()
    screen = Screen(console=rich.Console(file=out, width=80, highlight=False))
    files = [("agreement_single.png", "the same for single images"), ("report.html", "a page to look through " * 5)]
    screen.table((("", "left"), ("", "left")), files)
    printed = out.getvalue()
    assert "agreement_single.png" in printed and "…" not in printed
    assert " ".join(printed.split()).count("a page to look through") == 5
    assert max(map(len, printed.splitlines())) <= 80

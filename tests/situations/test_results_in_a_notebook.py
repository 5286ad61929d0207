"""A notebook without `%matplotlib inline`: every result shows itself, shortly, and text from the data stays text."""

from __future__ import annotations

import html.parser
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import pytorch_influence_functions as ptif

EVIL = "<script>alert('x')</script>"
SHOWN = ["scores", "diagnostics", "attribution", "problem", "forecast", "curve", "spectrum", "report"]


class Tags(html.parser.HTMLParser):
    """The tags of a piece of HTML, and its text."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.text = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        self.tags.append(tag)

    def handle_data(self, data: str) -> None:
        self.text += data


class _Evil(nn.Linear):
    pass


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    torch.manual_seed(0)
    model = _Evil(6, 3)
    x, y = torch.randn(40, 6), torch.arange(40) % 3
    problem = ptif.Problem(model, nn.CrossEntropyLoss(), (x, y), weight_decay=0.1)
    attribution = ptif.Influence().fit(problem)
    scores = attribution.score((x[:4], y[:4]))
    return {
        "scores": scores,
        "diagnostics": scores.diagnostics,
        "attribution": attribution,
        "problem": problem,
        "forecast": ptif.forecast(model, (x, y), (x[:4], y[:4])),
        "curve": attribution.damping_curve(),
        "spectrum": attribution.spectrum(),
        "report": scores.report(tmp_path_factory.mktemp("page") / "r.html"),
    }


@pytest.mark.parametrize("name", SHOWN)
def test_what_a_cell_prints_is_short(results: dict[str, Any], name: str) -> None:
    lines = repr(results[name]).splitlines()
    assert len(lines) <= 4 and len(lines[0]) <= 120
    assert len(lines) == 1 or name == "scores"
    if name == "attribution":
        assert len(repr(results[name].members)) <= 120


@pytest.mark.parametrize("name", SHOWN)
def test_every_result_has_a_form_for_notebooks(results: dict[str, Any], name: str) -> None:
    shown = results[name]._repr_html_()
    assert 50 < len(shown) < 10_000
    assert set(Tags(shown).tags) <= {"p", "b", "pre", "table", "tr", "td", "th", "br", "code", "a", "iframe"}


def test_diagnostics_show_every_check(results: dict[str, Any]) -> None:
    diagnostics = results["diagnostics"]
    shown = Tags(diagnostics._repr_html_()).text
    for check in diagnostics.checks():
        assert check.name in shown and check.text in shown
    assert diagnostics.method in shown
    doubtful = [c.name for c in diagnostics.checks() if c.status != "ok"]
    assert doubtful and all(name in repr(diagnostics) for name in doubtful)


def test_text_of_the_data_stays_text() -> None:
    diagnostics = ptif.Scores(torch.tensor([[1.0, 2.0]])).diagnostics.__class__(method=EVIL, notes=(EVIL,))
    scores = ptif.Scores(torch.tensor([[1.0, 2.0]]), train_names=[EVIL] * 2, diagnostics=diagnostics)
    for result in (diagnostics, scores):
        shown = Tags(result._repr_html_())
        assert "script" not in shown.tags and EVIL in shown.text


def test_a_figure_shows_itself_without_pyplot(results: dict[str, Any]) -> None:
    pytest.importorskip("matplotlib")
    figure = results["scores"].plot(0)
    picture = figure._repr_png_()
    assert picture.startswith(b"\x89PNG")
    width = int.from_bytes(picture[16:20], "big")
    assert 400 < width < 1200 and width == round(figure.get_size_inches()[0] * 100)
    assert pickle.loads(pickle.dumps(figure))._repr_png_().startswith(b"\x89PNG")


def test_a_report_in_the_notebooks_folder_is_embedded(
    results: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a b").mkdir()
    shown = results["scores"].report("a b/it's.html")._repr_html_()
    assert "src='a%20b/it%27s.html'" in shown and "href='a%20b/it%27s.html'" in shown
    elsewhere = results["report"]._repr_html_()
    assert "iframe" not in elsewhere and "href='file:///" in elsewhere
    assert "<a" not in results["scores"].report("b.html", dry_run=True)._repr_html_()

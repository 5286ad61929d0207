"""The example on language models and the benchmark of retrieval run in their small forms."""

from __future__ import annotations

import runpy
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.interface.report_cases import Page

pytest.importorskip("transformers"), pytest.importorskip("peft")
pytestmark = [pytest.mark.filterwarnings("ignore"), pytest.mark.slow]
ROOT = Path(__file__).resolve().parents[2]


def run(script: str, *arguments: str) -> Any:
    return runpy.run_path(str(ROOT / script))["main"](list(arguments))


def test_texts_are_found_shown_and_taken_out(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    result = run("examples/language_model.py", "--small", "--out", str(tmp_path / "here"))
    sys.path.remove(str(ROOT / "benchmarks"))
    said = capsys.readouterr().out
    assert result["EK-FAC"]["letters"] >= 3 > result["chance"]["letters"]
    assert result["after"] < result["before"] and "without the first 6 of BM25" in said
    page = Page(tmp_path / "here/report.html")
    (query,) = page.queries
    assert page.index["sources"]["names"][0] != "letters" and "letters" in page.index["sources"]["names"]
    assert all(str(0) in page.examples[i]["v"] for i, _ in query["help"])


def test_retrieval_is_measured_beside_plain_baselines() -> None:
    result = run("benchmarks/language_retrieval.py", "--small")
    for kind, name in (("sources", "precision@20"), ("facts", "recall@10")):
        shares = {method: share for method, (share, _) in result[kind][name].items()}
        assert set(shares) >= {"EK-FAC", "BM25", "embedding similarity", "gradient cosine", "chance"}
        assert all(0 <= share <= 1 for share in shares.values()) and shares["EK-FAC"] > shares["chance"]

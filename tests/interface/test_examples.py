"""Every example runs in its small form, and writes what it says."""

from __future__ import annotations

import runpy
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
WRITTEN = {
    "fashion_mnist": ["mistake.png", "self_influence.png", "classes.png", "report.html", "run"],
    "digits": ["methods.png", "verified.png", "trainings", "run"],
    "breast_cancer": ["left_out.png", "report.html"],
    "curation": ["queue.csv", "report.html"],
    "diabetes": ["patient.png", "left_out.png"],
    "shakespeare": ["letters.png", "report.html", "run"],
}
SAID = {
    "fashion_mnist": "Wrong labels found by looking",
    "digits": "noise ceiling",
    "breast_cancer": "after 45 were looked at",
    "curation": "Without looking",
    "diabetes": "Leave-one-out correlation over 6 patients",
    "shakespeare": "are of the same play",
}


ELSEWHERE = {"language_model"}
"""Those that need more than the tests do: `make integrations` runs them, in tests/hf/test_example.py."""


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(WRITTEN))
def test_it_runs_in_its_small_form(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """As `python examples/name.py` would, but in this process: each would import torch again."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", [f"{name}.py", "--small", "--out", "here"])
    runpy.run_path(str(ROOT / "examples" / f"{name}.py"), run_name="__main__")
    assert SAID[name] in capsys.readouterr().out
    for written in WRITTEN[name]:
        assert (tmp_path / "here" / written).exists(), written
    assert [p.name for p in tmp_path.iterdir()] == ["here"]  # nothing beside the folder asked for


def test_every_example_is_tested_and_on_the_page() -> None:
    found = {p.stem for p in (ROOT / "examples").glob("*.py")}
    assert found == set(WRITTEN) | ELSEWHERE and set(WRITTEN) == set(SAID)
    page = (ROOT / "docs" / "examples.md").read_text()
    assert all(f"examples/{name}.py" in page for name in found)

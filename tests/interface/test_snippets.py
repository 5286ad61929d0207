"""The runner of the pages' examples runs what it should, skips out loud, fails where the page is wrong."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest

import pytorch_influence_functions as ptif

SCRIPT = Path(__file__).parents[2] / "scripts/run_snippets.py"


@pytest.fixture(scope="module")
def runner() -> ModuleType:
    spec = importlib.util.spec_from_file_location("run_snippets", SCRIPT)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


PAGE = """# Title
```bash
not python
```
```python
x = 1
```
<!-- no-run -->
```python
raise RuntimeError("skipped")
```
- in a list:
  ```python
  assert x == 1
  open("left.txt", "w").close()
  ```
"""


def test_finds_python_blocks_only(runner: ModuleType) -> None:
    first, second, third = runner.snippets(PAGE)
    assert (first.line, first.code, first.run) == (6, "x = 1", True)
    assert not second.run
    assert third.code.startswith("assert x == 1\nopen(")  # dedented


def test_runs_in_one_namespace_and_leaves_no_file(
    runner: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "page.md").write_text(PAGE)
    assert runner.run_page(tmp_path / "page.md") == (2, 1)
    assert [p.name for p in tmp_path.iterdir()] == ["page.md"] and Path.cwd() == tmp_path


def test_says_what_was_skipped(runner: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "page.md").write_text(PAGE)
    assert runner.main([tmp_path / "page.md"]) == 0
    assert "page.md: 2 snippets run, 1 SKIPPED" in capsys.readouterr().out


def test_a_block_waits_for_what_it_needs(runner: ModuleType, tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text(
        "<!-- needs: json -->\n```python\nimport json\n```\n"
        "<!-- needs: json, no_such_library -->\n```python\nimport no_such_library\n```\n"
    )
    assert runner.run_page(page) == (1, 1)
    with pytest.raises(ModuleNotFoundError):
        runner.run_page(page, everything=True)


def test_a_failure_is_counted_and_names_the_line_of_the_page(
    runner: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "bad.md").write_text("words\n\n```python\nx = 1\nx.nothing\n```\n")
    (tmp_path / "good.md").write_text("```python\nassert 'x' not in globals()\n```\n")
    assert runner.main([tmp_path / "bad.md", tmp_path / "good.md"]) == 1
    captured = capsys.readouterr()
    assert 'bad.md", line 5' in captured.err and "FAILED" in captured.out and "ok " in captured.out


def test_a_page_with_an_old_name_fails(
    runner: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delitem(vars(ptif), "GGN", raising=False)  # as if nobody had asked for it yet
    (tmp_path / "old.md").write_text("```python\nimport pytorch_influence_functions as ptif\n\nptif.GGN()\n```\n")
    assert runner.main([tmp_path / "old.md"]) == 1
    assert "ptif.GGN is now ptif.curvature.GGN." in capsys.readouterr().err


def test_an_open_block_is_an_error(runner: ModuleType) -> None:
    with pytest.raises(ValueError, match="opened on line 2 is never closed"):
        list(runner.snippets("a\n```python\nx = 1\n"))

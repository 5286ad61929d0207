"""1,000 queries x 100,000 examples: built within a minute and 30 MB, and nothing in the browser takes long."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from benchmarks.report_page import LONGEST, SIZE, built, longest_tasks
from tests.browser.looks import Looks


@pytest.mark.slow
def test_a_large_report_is_small_and_smooth(look: Callable[..., Looks], tmp_path: Path) -> None:
    report = built(tmp_path / "large.html", 1000, 100_000)
    assert report.written <= SIZE and not report.folder
    page = look(Path(report.path))
    tasks = longest_tasks(page.page, Path(report.path))
    assert max(tasks.values()) < LONGEST, tasks
    assert page.page.url.endswith("#q/20") and page.page.locator("#view-query li").count() == 20  # it did go there

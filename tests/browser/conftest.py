"""Reports in a real browser: `make test-browser` installs what it takes; a plain `make test` leaves these tests out."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.browser.looks import Looks, made

collect_ignore_glob = [] if os.environ.get("PTIF_BROWSER") else ["test_*.py"]


@pytest.fixture(scope="session")
def browser() -> Iterator[Any]:
    """Debian's chromium, without a window."""
    from playwright.sync_api import sync_playwright

    path = shutil.which("chromium") or shutil.which("chromium-browser")
    if path is None:
        pytest.fail(
            "There is no chromium on this machine; install Debian's package chromium (`make test-browser` does)."
        )
    with sync_playwright() as playwright:
        # Root, as in a container, is refused a sandbox.
        arguments = ["--no-sandbox"] if os.name == "posix" and os.geteuid() == 0 else []
        chromium = playwright.chromium.launch(executable_path=path, args=arguments)
        yield chromium
        chromium.close()


@pytest.fixture(scope="session")
def reports(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """One report of every kind, written once."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("reports")
    return {kind: write(folder / f"{kind}.html") for kind, write in made().items()}


@pytest.fixture
def look(browser: Any, reports: dict[str, Path]) -> Iterator[Callable[..., Looks]]:
    """`look("pictures", "queries", theme="dark", width=380)`: an open page. Its errors and requests fail the test."""
    opened: list[Looks] = []

    def open_one(kind: str | Path, view: str = "overview", theme: str = "light", width: int = 1600) -> Looks:
        path = kind if isinstance(kind, Path) else reports[kind]
        opened.append(Looks.of(browser, path, view, theme, width))
        return opened[-1]

    yield open_one
    for one in opened:
        one.page.context.close()
    assert [problem for one in opened for problem in one.problems] == []

"""The report page at its largest: `python benchmarks/report_page.py [--queries 1000] [--examples 100000]`.

Seconds and memory to write it, its size, and the longest task of the browser's main thread: in every view while it
opens and is scrolled from top to bottom, then while views are changed, a search is typed and queries are stepped
through. What takes too long is tried twice more and its best counts: a task long by itself is long every time, while
one that waited for a busy machine is not. The browser needs `make test-browser`'s environment; `--no-browser` leaves
it out.
"""

from __future__ import annotations

import argparse
import resource
import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch

import pytorch_influence_functions as ptif
from pytorch_influence_functions.demo.data import load
from pytorch_influence_functions.report.page import Report

SECONDS, SIZE, LONGEST = 60.0, 30_000_000, 200.0
VIEWS = ("overview", "queries", "q/0", "training/labels", "training/pairs", "training/classes", "training/influential")

# Long tasks are those above 50 ms; the observer must be there before the page's own script.
_WATCH = """
window.longTasks = [];
new PerformanceObserver((list) => {
  for (const entry of list.getEntries()) window.longTasks.push(entry.duration);
}).observe({ type: "longtask", buffered: true });
"""
# A screen at a time, as fast as frames come, until the end has been reached and no more is added.
_SCROLL = """async () => {
  const frame = () => new Promise((done) => requestAnimationFrame(() => requestAnimationFrame(done)));
  let still = 0;
  while (still < 20) {
    const before = scrollY;
    scrollBy(0, innerHeight);
    await frame();
    still = scrollY === before ? still + 1 : 0;
  }
  const button = [...document.querySelectorAll("#panel button")].find((one) => one.textContent === "Show more");
  if (button && !button.hidden) { button.click(); await frame(); }
}"""


# Views one after the other in the open page, a search letter by letter, queries by arrow key.
_CHANGE = """async (views) => {
  const frame = () => new Promise((done) => requestAnimationFrame(() => requestAnimationFrame(done)));
  for (const view of views) { location.hash = view; for (let i = 0; i < 5; i++) await frame(); }
  location.hash = "queries";
  await frame();
  const search = document.querySelector("input[type=search]");
  for (const typed of ["c", "cl", "cla", "class 3", "class", ""]) {
    search.value = typed;
    search.dispatchEvent(new Event("input"));
    for (let i = 0; i < 3; i++) await frame();
  }
  location.hash = "q/0";
  for (let step = 0; step < 20; step++) {
    await frame();
    document.body.dispatchEvent(new KeyboardEvent("keydown", { key: "ArrowRight", bubbles: true }));
    await frame();
  }
}"""
_TRIES = 3


def built(path: Path, queries: int, examples: int) -> Report:
    """A report of that size: grey pictures, ten classes, predictions, self-influence."""
    generator = torch.Generator().manual_seed(0)
    pictures = torch.from_numpy(load().train_images).unsqueeze(1)
    y, asked = torch.randint(10, (examples,), generator=generator), torch.randint(10, (queries,), generator=generator)
    values = torch.randn(queries, examples, generator=generator).pow_(3).mul_(1e-4)
    values += (asked[:, None] == y[None]) * 3e-5
    x = pictures[torch.randint(len(pictures), (examples,), generator=generator)]
    scores = ptif.Scores(
        values,
        train_labels=y,
        query_labels=asked,
        class_names=[f"class {c}" for c in range(10)],
        train_source=(x, y),
        query_source=(x[:queries], asked),
    )
    predictions = torch.softmax(2 * torch.randn(queries, 10, generator=generator), 1)
    return scores.report(path, predictions=predictions, self_influence=torch.rand(examples, generator=generator))


def longest_tasks(page: Any, path: Path) -> dict[str, float]:
    """View -> milliseconds of the longest task while it opens and is scrolled; 0 where none took 50 ms.

    "changing" is what comes after opening: from view to view, typing a search, from query to query.
    """
    page.add_init_script(_WATCH)

    def opened(view: str) -> float:
        page.goto("about:blank")
        page.goto(f"{path.as_uri()}#{view}")
        page.evaluate(_SCROLL)
        return longest()

    def changed() -> float:
        page.goto("about:blank")
        page.goto(path.as_uri())
        longest()
        page.evaluate("window.longTasks = []")
        page.evaluate(_CHANGE, list(VIEWS))
        return longest()

    def longest() -> float:
        page.wait_for_timeout(300)
        return max(page.evaluate("window.longTasks"), default=0.0)

    def best(measure: Callable[[], float]) -> float:
        found = measure()
        for _ in range(1, _TRIES):
            found = found if found < LONGEST else min(found, measure())
        return found

    return {view: best(partial(opened, view)) for view in VIEWS} | {"changing": best(changed)}


def main() -> int:
    parser = argparse.ArgumentParser(description="The report page at its largest.")
    parser.add_argument("--queries", type=int, default=1000)
    parser.add_argument("--examples", type=int, default=100_000)
    parser.add_argument("--no-browser", action="store_true")
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        start = time.perf_counter()
        report = built(Path(folder) / "report.html", asked.queries, asked.examples)
        seconds = time.perf_counter() - start
        held = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
        print(
            f"{asked.queries:,} queries x {asked.examples:,} examples, with making their scores: {seconds:.1f} s "
            f"(target {SECONDS:.0f} s), {report.written / 1e6:.1f} MB (target {SIZE / 1e6:.0f} MB), +{held:,.0f} MiB"
        )
        passed = seconds <= SECONDS and report.written <= SIZE and not report.folder
        if not asked.no_browser:
            from playwright.sync_api import sync_playwright

            with sync_playwright() as playwright:
                browser = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
                tasks = longest_tasks(browser.new_page(), Path(report.path))
                browser.close()
            for view, longest in tasks.items():
                print(f"  {view:<22} longest task {longest:4.0f} ms (target below {LONGEST:.0f} ms)")
            passed = passed and max(tasks.values()) < LONGEST
    return int(not passed)


if __name__ == "__main__":
    sys.exit(main())

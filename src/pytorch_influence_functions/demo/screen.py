"""What the demo shows: headings, lines, tables and bars on a terminal; in a log the same without bars or colour."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, final

from ..core.errors import require

WIDTH = 80


@final
class Screen:
    """Prints through rich, at most 80 columns wide.

    `quiet` shows nothing but what `always=True` asks for.

    Raises:
        MissingExtra: rich is not installed.
    """

    def __init__(self, quiet: bool = False, console: Any = None) -> None:
        self.quiet = quiet
        rich = require("rich.console", "cli")
        self.console = rich.Console(highlight=False) if console is None else console
        self.console.width = min(WIDTH, self.console.width) if self.console.is_terminal else WIDTH

    def heading(self, number: int, words: str) -> None:
        """Begin a part."""
        if not self.quiet:
            self.console.print(f"\n[bold cyan]{number}[/]  [bold]{words}[/]")

    def line(self, words: str = "", always: bool = False) -> None:
        """One paragraph, wrapped under its own indent."""
        if always or not self.quiet:
            padding = require("rich.padding", "cli")
            self.console.print(padding.Padding(words, (0, 0, 0, 3), expand=False) if words else "")

    def table(self, columns: Sequence[tuple[str, str]], rows: Sequence[Sequence[str]]) -> None:
        """Rows under `columns` of (title, "left" or "right"); no heading where all titles are empty."""
        if self.quiet:
            return
        tables, padding = require("rich.table", "cli"), require("rich.padding", "cli")
        table = tables.Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="dim")
        table.show_header = any(title for title, _ in columns)
        for title, justify in columns:
            table.add_column(title, justify=justify, no_wrap=True)
        for row in rows:
            table.add_row(*row)
        self.console.print(padding.Padding(table, (0, 0, 0, 3), expand=False))

    @contextmanager
    def bar(self, words: str, total: int) -> Iterator[Callable[[int], None]]:
        """A bar that is taken down at the end; yields `advance(n)`. Only on a terminal."""
        if self.quiet or not self.console.is_terminal:
            yield lambda n: None
            return
        bars = require("rich.progress", "cli")
        parts = ("   {task.description}", bars.BarColumn(24), "{task.percentage:>3.0f} %", bars.TimeRemainingColumn())
        with bars.Progress(*parts, console=self.console, transient=True) as progress:
            task = progress.add_task(words, total=total)
            yield lambda n: progress.advance(task, n)

    @contextmanager
    def passes(self) -> Iterator[Callable[[str, int, int], None]]:
        """Bars for the engine's passes over data: a callback for `ptif.progress`."""
        if self.quiet or not self.console.is_terminal:
            yield lambda label, done, total: None
            return
        bars = require("rich.progress", "cli")
        parts = ("   {task.description}", bars.BarColumn(24), "{task.percentage:>3.0f} %")
        with bars.Progress(*parts, console=self.console, transient=True) as progress:
            tasks: dict[str, Any] = {}

            def report(label: str, done: int, total: int) -> None:
                if label not in tasks:
                    tasks[label] = progress.add_task(label or "reading", total=total)
                progress.update(tasks[label], completed=done, total=total)

            yield report


def plain_output() -> None:
    """Let symbols pass on terminals that only know ASCII, as question marks instead of a crash."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")

"""What the demo prints: headings, lines, tables and bars on a terminal; in a log the same without bars or colour."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, final

from ..core.errors import require

COLUMNS = 80


@final
class Screen:
    """Prints through rich, at most 80 columns wide.

    With `quiet` only lines with `always=True` are printed.

    Raises:
        MissingExtra: rich is not installed.
    """

    def __init__(self, quiet: bool = False, console: Any = None) -> None:
        self.quiet = quiet
        rich = require("rich.console", "cli")
        self.console = rich.Console(highlight=False) if console is None else console
        self.console.width = min(COLUMNS, self.console.width) if self.console.is_terminal else COLUMNS

    def heading(self, number: int, title: str) -> None:
        """Print the heading of a part."""
        if not self.quiet:
            self.console.print(f"\n[bold cyan]{number}[/]  [bold]{title}[/]")

    def line(self, text: str = "", always: bool = False) -> None:
        """Print one paragraph, indented."""
        if always or not self.quiet:
            padding = require("rich.padding", "cli")
            self.console.print(padding.Padding(text, (0, 0, 0, 3), expand=False) if text else "")

    def table(self, columns: Sequence[tuple[str, str]], rows: Sequence[Sequence[str]]) -> None:
        """Print rows under `columns` of (title, "left" or "right"); without a heading if all titles are empty.

        A column without a title, but the first, wraps its texts, so that those beside it keep their room.
        """
        if self.quiet:
            return
        tables, padding = require("rich.table", "cli"), require("rich.padding", "cli")
        table = tables.Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="dim")
        table.show_header = any(title for title, _ in columns)
        for place, (title, justify) in enumerate(columns):
            table.add_column(title, justify=justify, no_wrap=bool(title) or place == 0)
        for row in rows:
            table.add_row(*row)
        self.console.print(padding.Padding(table, (0, 0, 0, 3), expand=False))

    @contextmanager
    def bars(self) -> Iterator[Callable[[str, int, int], None]]:
        """Yield a callback for `ptif.progress` that draws bars on a terminal and takes them down at the end."""
        if self.quiet or not self.console.is_terminal:
            yield lambda label, done, total: None
            return
        rich = require("rich.progress", "cli")
        columns = ("   {task.description}", rich.BarColumn(24), "{task.percentage:>3.0f} %", rich.TimeRemainingColumn())
        with rich.Progress(*columns, console=self.console, transient=True) as progress:
            tasks: dict[str, Any] = {}

            def report(label: str, done: int, total: int) -> None:
                if label not in tasks:
                    tasks[label] = progress.add_task(label or "reading", total=total)
                progress.update(tasks[label], completed=done, total=total)

            yield report


def allow_any_encoding() -> None:
    """Print symbols that a terminal cannot encode as question marks, instead of raising an error."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")

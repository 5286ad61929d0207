"""Progress while the engine works: bars on a terminal, plain lines in a log, nothing when quiet."""

import os
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Final, TextIO, final

from rich.progress import BarColumn, Progress, ProgressColumn, TextColumn

from ..core.progress import Callback, progress
from .exit import Output, make_console
from .machine import format_bytes, used_memory

SHOW_AFTER: Final = 0.7
"""Seconds before a pass is shown."""
LINE_INTERVAL: Final = 10.0
"""Seconds between lines in a log."""
QUERIES: Final = "queries"
# Passes that do not count examples.
_OTHER_UNITS: Final = (QUERIES, "test items", "s_test")


@final
@dataclass
class Speed:
    """What is known about the size of examples: by the number of examples in a pass, the tokens that one has."""

    tokens: Mapping[int, float] = field(default_factory=dict)


@contextmanager
def report_progress(output: Output, speed: Speed | None = None) -> Iterator[Callback]:
    """Show the progress of passes over data inside; yields the callback `(label, done, total)` for the queries."""
    err = make_console(stderr=True)
    if output.quiet or os.environ.get("PTIF_PROGRESS", "1").lower() in ("0", "false", "no", "off"):
        with progress(False):
            yield lambda label, done, total: None
    elif err.is_terminal:
        with Progress(*bar_columns(), console=err, transient=True) as progress_display:
            bars = ProgressBars(progress_display, speed=speed or Speed())
            with progress(bars):
                yield bars
    else:
        lines = ProgressLines(err.file, speed=speed or Speed())
        with progress(lines):
            yield lines


def bar_columns() -> tuple[ProgressColumn, ...]:
    """The columns of a bar: the name of the pass, the bar, and a description."""
    return TextColumn("{task.description:<23}"), BarColumn(10), TextColumn("{task.fields[text]}")


@final
@dataclass
class _Pass:
    start: float
    done_before: int
    task: Any = None
    last_line: float = 0.0


@final
@dataclass
class ProgressBars:
    """Bars drawn by rich, one per pass; short passes are never shown."""

    display: Progress
    clock: Callable[[], float] = time.monotonic
    passes: dict[str, _Pass] = field(default_factory=dict)
    speed: Speed = field(default_factory=Speed)

    def __call__(self, label: str, done: int, total: int) -> None:
        # What has one step, such as loading a model, says nothing more until it is done. Without a name it is no such
        # step but a look at the first batch of a pass, which may be left there.
        at_once = label == QUERIES or (total == 1 and label != "")
        now, label = self.clock(), label or "reading"
        current = self.passes.get(label)
        if current is None or (done == 0 and label != QUERIES):
            self._end(current)
            current = self.passes[label] = _Pass(now, done)
        seconds = now - current.start
        if current.task is None and (seconds >= SHOW_AFTER or at_once):
            current.task = self.display.add_task(label, total=total, text="")
        if current.task is not None:
            tokens = self.speed.tokens.get(total, 0.0)
            text = describe_progress(label, done, total, done - current.done_before, seconds, tokens)
            self.display.update(current.task, completed=done, text=text)
        if done >= total:
            self._end(self.passes.pop(label))

    def _end(self, ended: _Pass | None) -> None:
        if ended is not None and ended.task is not None:
            self.display.remove_task(ended.task)


@final
@dataclass
class ProgressLines:
    """Plain lines for a log: one every ten seconds of a pass, and one at its end unless it was short."""

    file: TextIO | Any
    clock: Callable[[], float] = time.monotonic
    passes: dict[str, _Pass] = field(default_factory=dict)
    speed: Speed = field(default_factory=Speed)

    def __call__(self, label: str, done: int, total: int) -> None:
        now, label = self.clock(), label or "reading"
        current = self.passes.get(label)
        if current is None or (done == 0 and label != QUERIES):
            self.passes[label] = _Pass(now, done, last_line=now)
            return
        seconds, ended = now - current.start, done >= total
        shortest = LINE_INTERVAL if total == 1 and label != QUERIES else SHOW_AFTER
        if now - current.last_line >= LINE_INTERVAL or (ended and seconds >= shortest):
            current.last_line = now
            tokens = self.speed.tokens.get(total, 0.0)
            text = describe_progress(label, done, total, done - current.done_before, seconds, tokens)
            print(f"ptif: {label}: {text}", file=self.file, flush=True)
        if ended:
            del self.passes[label]


def describe_progress(
    label: str, done: int, total: int, done_now: int, seconds: float, tokens_each: float = 0.0
) -> str:
    """The count of a pass, its speed (`done_now` in `seconds`), the time that is left, and the memory in use.

    Of texts, which have `tokens_each` tokens on average, the speed is in tokens.

    >>> describe_progress("scoring", 5000, 20000, 5000, 10.0).split(", ")[:3]
    ['5,000/20,000', '500 ex/s', '0:30 left']
    >>> describe_progress("scoring", 5000, 20000, 5000, 10.0, tokens_each=128.0).split(", ")[1]
    '64,000 tokens/s'
    """
    single = total == 1 and label != QUERIES
    parts = [f"{done:,}/{total:,}" if not single else "under way" if done < total else "done"]
    if single and done >= total:
        parts = [f"done in {format_clock(seconds)}"]
    elif done_now > 0 and seconds > 0:
        rate, unit = done_now / seconds, "" if label in _OTHER_UNITS else " ex"
        shown, unit = (rate * tokens_each, " tokens") if tokens_each and unit else (rate, unit)
        parts.append(f"{shown:,.0f}{unit}/s" if shown >= 10 else f"{shown:.2g}{unit}/s")
        left = f"{format_clock((total - done) / rate)} left"
        parts.append(left if done < total else f"done in {format_clock(seconds)}")
    return ", ".join([*parts, format_bytes(used_memory())])


def format_clock(seconds: float) -> str:
    """Seconds as a clock shows them.

    >>> format_clock(7.4), format_clock(130.0), format_clock(3730.0)
    ('0:07', '2:10', '1:02:10')
    """
    whole = round(seconds)
    minutes = f"{whole // 60 % 60:02d}:{whole % 60:02d}" if whole >= 3600 else f"{whole // 60}:{whole % 60:02d}"
    return f"{whole // 3600}:{minutes}" if whole >= 3600 else minutes

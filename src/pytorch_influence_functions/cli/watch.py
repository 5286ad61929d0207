"""Progress while the engine works: bars on a terminal, plain lines in a log, nothing when quiet."""

import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Final, TextIO, final

from rich.progress import BarColumn, Progress, ProgressColumn, TextColumn

from ..core.progress import Callback, progress
from .machine import memory, size
from .outcome import Voice, console

SHORT: Final = 0.7
"""Seconds before a pass is worth showing."""
EVERY: Final = 10.0
"""Seconds between lines in a log."""
QUERIES: Final = "queries"
# Passes that count something else than examples read.
_OTHERS: Final = (QUERIES, "test items", "s_test")


@contextmanager
def watching(voice: Voice) -> Iterator[Callback]:
    """Within, passes over data report themselves; yields the report, `(label, done, total)`, for the queries."""
    err = console(stderr=True)
    if voice.quiet or os.environ.get("PTIF_PROGRESS", "1").lower() in ("0", "false", "no", "off"):
        with progress(False):
            yield lambda label, done, total: None
    elif err.is_terminal:
        with Progress(*columns(), console=err, transient=True) as bars:
            watch = Bars(bars)
            with progress(watch):
                yield watch
    else:
        watch_log = Lines(err.file)
        with progress(watch_log):
            yield watch_log


def columns() -> tuple[ProgressColumn, ...]:
    """What a bar shows: which pass, how far, and in words."""
    return TextColumn("{task.description:<23}"), BarColumn(10), TextColumn("{task.fields[words]}")


@final
@dataclass
class _Pass:
    began: float
    before: int
    task: Any = None
    said: float = 0.0


@final
@dataclass
class Bars:
    """Bars through rich, one per pass; those that are over quickly are never shown."""

    bars: Progress
    clock: Callable[[], float] = time.monotonic
    passes: dict[str, _Pass] = field(default_factory=dict)

    def __call__(self, label: str, done: int, total: int) -> None:
        now, label = self.clock(), label or "reading"
        one = self.passes.get(label)
        if one is None or (done == 0 and label != QUERIES):
            self._end(one)
            one = self.passes[label] = _Pass(now, done)
        seconds = now - one.began
        if one.task is None and (seconds >= SHORT or label == QUERIES):
            one.task = self.bars.add_task(label, total=total, words="")
        if one.task is not None:
            self.bars.update(one.task, completed=done, words=told(label, done, total, done - one.before, seconds))
        if done >= total:
            self._end(self.passes.pop(label))

    def _end(self, one: _Pass | None) -> None:
        if one is not None and one.task is not None:
            self.bars.remove_task(one.task)


@final
@dataclass
class Lines:
    """Plain lines: one every ten seconds of a pass, and one at the end of a pass that took longer than a moment."""

    file: TextIO | Any
    clock: Callable[[], float] = time.monotonic
    passes: dict[str, _Pass] = field(default_factory=dict)

    def __call__(self, label: str, done: int, total: int) -> None:
        now, label = self.clock(), label or "reading"
        one = self.passes.get(label)
        if one is None or (done == 0 and label != QUERIES):
            self.passes[label] = _Pass(now, done, said=now)
            return
        seconds, ended = now - one.began, done >= total
        if now - one.said >= EVERY or (ended and seconds >= SHORT):
            one.said = now
            print(f"ptif: {label}: {told(label, done, total, done - one.before, seconds)}", file=self.file, flush=True)
        if ended:
            del self.passes[label]


def told(label: str, done: int, total: int, here: int, seconds: float) -> str:
    """How far a pass is, how fast (of the `here` done now in `seconds`), how long it still takes, and the memory.

    >>> told("scoring", 5000, 20000, 5000, 10.0).split(", ")[:3]
    ['5,000/20,000', '500 ex/s', '0:30 left']
    """
    parts = [f"{done:,}/{total:,}"]
    if here > 0 and seconds > 0:
        rate, unit = here / seconds, "" if label in _OTHERS else " ex"
        parts.append(f"{rate:,.0f}{unit}/s" if rate >= 10 else f"{rate:.2g}{unit}/s")
        parts.append(f"{left((total - done) / rate)} left" if done < total else f"done in {left(seconds)}")
    return ", ".join([*parts, size(memory())])


def left(seconds: float) -> str:
    """Seconds as a clock shows them.

    >>> left(7.4), left(130.0), left(3730.0)
    ('0:07', '2:10', '1:02:10')
    """
    whole = round(seconds)
    minutes = f"{whole // 60 % 60:02d}:{whole % 60:02d}" if whole >= 3600 else f"{whole // 60}:{whole % 60:02d}"
    return f"{whole // 3600}:{minutes}" if whole >= 3600 else minutes

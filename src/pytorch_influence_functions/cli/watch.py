"""Progress while the engine works: bars on a terminal, plain lines in a log, nothing when quiet."""

import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Final, TextIO, final

from rich.progress import BarColumn, Progress, TextColumn

from ..progress import Callback, progress
from .machine import duration, memory, size
from .outcome import Voice, console

SHORT: Final = 0.7
"""Seconds before a pass is worth showing."""
EVERY: Final = 10.0
"""Seconds between lines in a log."""
QUERIES: Final = "queries"


@contextmanager
def watching(voice: Voice) -> Iterator[Callback]:
    """Within, passes over data report themselves; yields the report, `(label, done, total)`, for the queries."""
    err = console(stderr=True)
    if voice.quiet or os.environ.get("PTIF_PROGRESS", "1").lower() in ("0", "false", "no", "off"):
        with progress(False):
            yield lambda label, done, total: None
    elif err.is_terminal:
        columns = (TextColumn("{task.description:<22}"), BarColumn(14), TextColumn("{task.fields[words]}"))
        with Progress(*columns, console=err, transient=True) as bars:
            watch = Bars(bars)
            with progress(watch):
                yield watch
    else:
        watch_log = Lines(err.file)
        with progress(watch_log):
            yield watch_log


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
            self.bars.update(one.task, completed=done, words=told(done, total, done - one.before, seconds))
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
            print(f"ptif: {label}: {told(done, total, done - one.before, seconds)}", file=self.file, flush=True)
        if ended:
            del self.passes[label]


def told(done: int, total: int, here: int, seconds: float) -> str:
    """How far a pass is, how fast (of the `here` done now in `seconds`), how long it still takes, and the memory.

    >>> told(50, 200, 50, 10.0).split(", ")[:3]
    ['50 of 200', '5.0/s', '30 s left']
    """
    parts = [f"{done:,} of {total:,}"]
    if here > 0 and seconds > 0:
        rate = here / seconds
        parts.append(f"{rate:,.0f}/s" if rate >= 10 else f"{rate:.2g}/s" if rate < 1 else f"{rate:.1f}/s")
        parts.append(f"{duration((total - done) / rate)} left" if done < total else duration(seconds))
    return ", ".join([*parts, size(memory())])

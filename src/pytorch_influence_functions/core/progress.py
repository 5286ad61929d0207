"""Progress: a bar per pass over data, on stderr, shown only when it is long; or a callback; or nothing."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterable, Iterator
from types import TracebackType
from typing import Any, TypeAlias, TypeVar, final

from tqdm import tqdm

from .distributed import current

T = TypeVar("T")
Callback: TypeAlias = Callable[[str, int, int], None]

DELAY = 1.0
"""Seconds before a bar is shown: short passes stay silent."""

UNSEEN = "\0"
"""The label of a pass within another one that is shown: it has no bar of its own, and no callback hears of it."""

_setting: bool | Callback = True


@final
class progress:
    """Switch progress reports: `True` (bars), `False` (silence) or a callback `(label, done, total)`.

    Called alone it switches from now on; used in a `with` statement it switches back at the end.
    The environment variable `PTIF_PROGRESS=0` silences bars everywhere (callbacks are still called).

    Args:
        enabled: `True`, `False` or the callback.

    Example:
        >>> with progress(lambda label, done, total: print(label, done, total)):
        ...     _ = list(track([10, 20], total=2, label="demo"))
        demo 0 2
        demo 1 2
        demo 2 2
    """

    def __init__(self, enabled: bool | Callback = True) -> None:
        global _setting
        self._before = _setting
        _setting = enabled

    def __enter__(self) -> progress:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        global _setting
        _setting = self._before


def _bars_wanted() -> bool:
    # Processes that share work all show the same: one bar tells it.
    return (
        _setting is True
        and current().rank == 0
        and os.environ.get("PTIF_PROGRESS", "1").lower()
        not in (
            "0",
            "false",
            "no",
            "off",
        )
    )


@final
class Meter:
    """A count that reports itself; `advance(n)` after n more units are done."""

    def __init__(self, total: int, label: str = "", unit: str = "it") -> None:
        self.total, self.label, self.done = total, label, 0
        self._callback = None if isinstance(_setting, bool) or label == UNSEEN else _setting
        self._bar: tqdm[Any] | None = None
        if self._callback is not None:
            self._callback(label, 0, total)
        elif _bars_wanted() and label != UNSEEN:
            # leave=None keeps an outermost bar and clears nested ones; into a log file, few lines are enough.
            interval = 0.1 if sys.stderr.isatty() else 10.0
            self._bar = tqdm(
                total=total,
                desc=label or None,
                unit=unit,
                delay=DELAY,
                leave=None,
                file=sys.stderr,
                mininterval=interval,
                dynamic_ncols=True,
            )

    def advance(self, n: int = 1) -> None:
        """Report that `n` more units are done."""
        self.done += n
        if self._callback is not None:
            self._callback(self.label, self.done, self.total)
        elif self._bar is not None:
            self._bar.update(n)

    def close(self) -> None:
        """Take the bar down; safe to call twice."""
        if self._bar is not None:
            self._bar.close()
            self._bar = None

    def __enter__(self) -> Meter:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


def track(
    items: Iterable[T],
    total: int,
    label: str = "",
    size: Callable[[T], int] = lambda _: 1,
    unit: str = "it",
) -> Iterator[T]:
    """Yield `items`, reporting `size(item)` more units after each has been dealt with."""
    with Meter(total, label, unit) as meter:
        for item in items:
            yield item
            meter.advance(size(item))

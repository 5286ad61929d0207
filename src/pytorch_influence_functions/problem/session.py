"""What a public call holds for as long as it lasts: worker processes, and batches that were read."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

_threads = threading.local()


@contextmanager
def session() -> Iterator[None]:
    """Hold what is put into `open_session()` until the outermost block of this thread ends.

    >>> with session(), session():
    ...     open_session()["key"] = 1
    >>> open_session() is None
    True
    """
    _threads.depth = getattr(_threads, "depth", 0) + 1
    if _threads.depth == 1:
        _threads.held = {}
    try:
        yield
    finally:
        _threads.depth -= 1
        if _threads.depth == 0:
            _threads.held = None


def open_session() -> dict[Any, Any] | None:
    """What is held; None outside of public calls."""
    return getattr(_threads, "held", None)

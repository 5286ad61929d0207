"""The original package's output while it runs: log lines, and a line that counts up."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

LOGGER = "pytorch_influence_functions"
log = logging.getLogger(LOGGER)

_LOG_FORMAT = "%(asctime)s %(levelname)s %(message)s"
_MARK = "_ptif_classic"


def _marked(handler: logging.Handler) -> logging.Handler:
    handler.setFormatter(logging.Formatter(_LOG_FORMAT))
    setattr(handler, _MARK, True)
    return handler


def _close(logger: logging.Logger, handler: logging.Handler) -> None:
    logger.removeHandler(handler)
    handler.close()


def init_logging(filename: str | os.PathLike[str] | None = None) -> logging.Logger:
    """Show log lines from INFO up on stdout and, if `filename` is given, write them there too.

    As in 0.1, that holds for every logger of the program: the caller's own `logging.info(...)` appears as well. Calling
    it again replaces what it set up before; handlers that the program added itself stay.

    Args:
        filename: a file to write the lines to as well; its folder is made.

    Returns:
        The library's own logger.

    >>> init_logging().name
    'pytorch_influence_functions'
    """
    root = logging.getLogger()
    for handler in list(root.handlers):
        if getattr(handler, _MARK, False):
            _close(root, handler)
    if root.level > logging.INFO:
        root.setLevel(logging.INFO)
    log.setLevel(logging.INFO)
    root.addHandler(_marked(logging.StreamHandler(sys.stdout)))
    if filename is not None:
        Path(filename).parent.mkdir(parents=True, exist_ok=True)
        root.addHandler(_marked(logging.FileHandler(filename, encoding="utf-8")))
    return log


@contextmanager
def logged_to(filename: str | os.PathLike[str] | None) -> Iterator[None]:
    """Inside, also write the library's log to `filename`; `None` changes nothing."""
    if filename is None:
        yield
        return
    Path(filename).parent.mkdir(parents=True, exist_ok=True)
    handler, level = logging.FileHandler(filename, encoding="utf-8"), log.level
    log.addHandler(_marked(handler))
    log.setLevel(logging.INFO)
    try:
        yield
    finally:
        _close(log, handler)
        log.setLevel(level)


def display_progress(
    text: str, current_step: int, last_step: int, enabled: bool = True, fix_zero_start: bool = True
) -> None:
    """Print `text current/last` on one line of stdout, overwriting the line before; ends it after the last step.

    Args:
        text: what is counted.
        current_step: counted from 0 if `fix_zero_start`, else from 1.
        last_step: how many steps there are.
        enabled: False prints nothing. The environment variable `PTIF_PROGRESS=0` does the same everywhere.
        fix_zero_start: whether `current_step` is counted from 0.
    """
    if not enabled or os.environ.get("PTIF_PROGRESS", "1").lower() in ("0", "false", "no", "off"):
        return
    step = current_step + 1 if fix_zero_start else current_step
    sys.stdout.write(f"\r{text} {step}/{last_step}" + ("\n" if step == last_step else ""))
    sys.stdout.flush()

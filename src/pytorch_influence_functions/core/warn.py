"""Warnings that name the caller's line, however deep inside the package they arise; and what torch says of itself."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

# Whose frames are passed over: the package's own, and those of decorators and loaders between them.
_PASSED_OVER = (__name__.partition(".")[0], "contextlib", "torch")


def warn_caller(message: str, category: type[Warning]) -> None:
    """Warn, with the nearest line outside this package as the place.

    Args:
        message: what is shown.
        category: of the warning; filters know it.
    """
    depth, frame = 2, sys._getframe(1)
    while frame.f_back is not None and frame.f_globals.get("__name__", "").partition(".")[0] in _PASSED_OVER:
        depth, frame = depth + 1, frame.f_back
    warnings.warn(message, category, stacklevel=depth)


@contextmanager
def silence_torch() -> Iterator[None]:
    """Hide what torch says of its own transforms: that an operation is batched slowly, or what it is itself written in.

    A user can do nothing about either.
    """
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*performance drop.*", category=UserWarning)
        warnings.filterwarnings("ignore", message=".*torch.jit.script. is deprecated.*", category=DeprecationWarning)
        yield

"""Warnings that name the caller's line, however deep inside the package they arise."""

from __future__ import annotations

import sys
import warnings

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

"""A matplotlib figure that a notebook shows by itself; this file is imported only where matplotlib is there."""

from __future__ import annotations

import io
from functools import partial
from typing import Any

from matplotlib.figure import Figure

_DOTS_PER_INCH = 100
"""Of the picture in a notebook: matplotlib's own default, so that ten inches fit the page."""


def notebook_figure(**options: Any) -> Figure:
    """Make a figure that needs no `%matplotlib inline`: pyplot, which draws figures in notebooks, does not know ours.

    It is of matplotlib's own class, by whose name other libraries (W&B) know a figure.

    Args:
        options: of `matplotlib.figure.Figure`.
    """
    figure = Figure(**options)
    figure._repr_png_ = partial(_as_png, figure)  # type: ignore[attr-defined]
    return figure


def _as_png(figure: Figure) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=_DOTS_PER_INCH)
    return buffer.getvalue()

"""A matplotlib figure that a notebook shows by itself; this file is imported only where matplotlib is there."""

from __future__ import annotations

import io

from matplotlib.figure import Figure

_DOTS_PER_INCH = 100
"""Of the picture in a notebook: matplotlib's own default, so that ten inches fit the page."""


class NotebookFigure(Figure):
    """A figure that needs no `%matplotlib inline`: pyplot, which draws figures in notebooks, does not know ours."""

    def _repr_png_(self) -> bytes:
        buffer = io.BytesIO()
        self.savefig(buffer, format="png", dpi=_DOTS_PER_INCH)
        return buffer.getvalue()

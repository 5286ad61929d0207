"""The look of figures: colours that colour-blind readers and grey printers keep apart, numbers in few characters."""

from __future__ import annotations

import io
import math
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from ..core.errors import InvalidInput, name_ids, require
from ..core.files import write_bytes
from ..core.text import printable

if TYPE_CHECKING:
    from matplotlib.figure import Figure
else:
    Figure = Any  # matplotlib is optional; annotations may be looked at when it is absent

# Okabe & Ito (2008). Blue is dark and vermillion light in greyscale; text and line styles repeat the distinction.
HELPFUL, HARMFUL = "#0072B2", "#D55E00"
PALETTE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
INK, FAINT, PAPER, CARD = "#1A1A1A", "#666666", "#FFFFFF", "#F5F5F2"

_SETTINGS = {
    "font.family": ["sans-serif"],
    "font.sans-serif": ["DejaVu Sans"],  # comes with matplotlib, so pictures are the same everywhere
    "font.size": 9.0,
    "text.color": INK,
    "text.usetex": False,
    "axes.facecolor": PAPER,
    "axes.edgecolor": FAINT,
    "axes.labelcolor": INK,
    "axes.linewidth": 0.8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlelocation": "left",
    "xtick.color": FAINT,
    "ytick.color": FAINT,
    "figure.facecolor": PAPER,
    "figure.autolayout": False,
    "figure.constrained_layout.use": False,
    "savefig.facecolor": PAPER,
    "savefig.bbox": None,
    "svg.hashsalt": "pytorch_influence_functions",
}


@contextmanager
def plot_style() -> Iterator[None]:
    """Inside, matplotlib has our settings; afterwards the user's are as before."""
    matplotlib = require("matplotlib", "plot")
    with matplotlib.rc_context(_SETTINGS):
        yield


def new_figure(width: float, height: float) -> Figure:
    """A figure in inches with a canvas of its own: no window, no global list of figures."""
    canvas = require("matplotlib.backends.backend_agg", "plot")
    # Imported here: matplotlib is optional, and that file needs it.
    from .notebook_figure import notebook_figure

    figure = notebook_figure(figsize=(width, height), dpi=150)
    canvas.FigureCanvasAgg(figure)
    return figure


def save_figure(figure: Figure, path: str | os.PathLike[str] | None) -> None:
    """Write the figure to `path`, whole or not at all; the ending says the format. Without a path do nothing."""
    if path is None:
        return
    name = os.fspath(path)
    buffer = io.BytesIO()
    kind = os.path.splitext(name)[1][1:].lower() or "png"
    # Without a date inside, the same picture is the same file.
    undated = {"pdf": {"CreationDate": None}, "svg": {"Date": None}}.get(kind)
    figure.savefig(buffer, format=kind, metadata=undated)
    write_bytes(name, buffer.getvalue())


def finite_numbers(values: Any, name: str) -> NDArray[Any]:
    """A tensor, array or list as float64; raises `InvalidInput`, with the position, where a number is not finite."""
    numbers = np.asarray(values.detach().cpu() if isinstance(values, Tensor) else values, dtype=np.float64)
    bad = np.flatnonzero(~np.isfinite(numbers))
    if len(bad):
        raise InvalidInput(f"{name} holds NaN or infinity at position {name_ids(bad.tolist())}; leave such values out.")
    return numbers


def format_signed(value: float) -> str:
    """A signed number of three digits, with a minus sign as wide as the plus.

    >>> format_signed(0.00312), format_signed(-31250000.0), format_signed(0.0)
    ('+0.00312', '−3.12e+07', '0')
    """
    if value == 0:
        return "0"
    size = abs(value)
    digits = (
        f"{size:#.3g}".rstrip(".") if 1e-4 <= size < 999.5 else f"{size:.0f}" if 999 < size < 1e5 else f"{size:.2e}"
    )
    return ("−" if value < 0 else "+") + digits


def power_of_ten(largest: float) -> int:
    """The power of ten to divide numbers up to `largest` by, so that they are easy to read; often 0.

    >>> power_of_ten(0.0021), power_of_ten(35.0)
    (-3, 0)
    """
    exponent = math.floor(math.log10(largest)) if largest > 0 else 0
    return 0 if -2 <= exponent <= 3 else exponent


def format_power(exponent: int) -> str:
    """`" (×10⁻³)"`, or nothing for 0."""
    raised = str(exponent).translate(str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹"))
    return f" (×10{raised})" if exponent else ""


def shorten(text: str, limit: int) -> str:
    """Cut a text to at most `limit` characters on one line, with an ellipsis for the rest.

    >>> shorten("a rather long label", 9)
    'a rather…'
    """
    text = " ".join(printable(str(text)).split())
    return text if len(text) <= limit else text[: limit - 1].rstrip() + "…"

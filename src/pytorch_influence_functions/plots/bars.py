"""Methods side by side: a bar each, with its interval."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from ..core.text import printable
from . import style

if TYPE_CHECKING:
    from matplotlib.figure import Figure
else:
    Figure = Any  # matplotlib is optional; annotations may be looked at when it is absent


def plot_bars(
    values: Mapping[str, tuple[float, float, float]],
    metric: str,
    ceiling: float | None = None,
    title: str = "",
    path: str | os.PathLike[str] | None = None,
) -> Figure:
    """A horizontal bar per name, with (value, low, high); first at the top.

    Args:
        values: the value of each name and its interval.
        metric: the label of the axis.
        ceiling: a noise ceiling, drawn as a dashed line.
        title: the protocol.
        path: where to write the picture; the ending says the format.

    Raises:
        MissingExtra: matplotlib is not installed.
    """
    names = [printable(name) for name in values]
    estimates = [v[0] for v in values.values()]
    errors = [[max(0.0, v[0] - v[1]) for v in values.values()], [max(0.0, v[2] - v[0]) for v in values.values()]]
    with style.plot_style():
        figure = style.new_figure(7.0, 1.3 + 0.32 * len(names))
        figure.set_layout_engine("constrained")
        axes = figure.subplots()
        axes.barh(range(len(names)), estimates, xerr=errors, color=style.HELPFUL, height=0.62,
                  error_kw={"ecolor": style.INK, "elinewidth": 1.1, "capsize": 2.5})  # fmt: skip
        axes.set_yticks(range(len(names)), names, parse_math=False)
        axes.tick_params(axis="y", length=0)
        axes.invert_yaxis()
        axes.axvline(0.0, color=style.FAINT, linewidth=0.8)
        if ceiling is not None:
            axes.axvline(ceiling, color=style.HARMFUL, linestyle="dashed", linewidth=1.2)
            axes.annotate("noise ceiling", (ceiling, 1.0), xycoords=("data", "axes fraction"), xytext=(-3, 2),
                          textcoords="offset points", ha="right", va="bottom", color=style.FAINT,
                          fontsize=8)  # fmt: skip
        axes.set_xlabel(f"{metric} (95 % interval)")
        axes.set_title(printable(title), fontsize=8.5, pad=14 if ceiling is not None else 6, parse_math=False)
        style.save_figure(figure, path)
    return figure

"""Methods side by side: a bar each, with its interval."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from ..errors import require

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def plot_bars(
    values: Mapping[str, tuple[float, float, float]], metric: str, ceiling: float | None = None, title: str = ""
) -> Figure:
    """A horizontal bar per name, with (value, low, high); first at the top.

    Args:
        values: what each name reached, and its interval.
        metric: the word under the axis.
        ceiling: drawn as a dashed line.
        title: the protocol.

    Raises:
        MissingExtra: matplotlib is not installed.
    """
    figures = require("matplotlib.figure", "plot")
    names = list(values)
    figure: Figure = figures.Figure(figsize=(7.0, 1.2 + 0.34 * len(names)), layout="constrained")
    axes = figure.subplots()
    at = range(len(names))
    middle = [values[n][0] for n in names]
    around = [[values[n][0] - values[n][1] for n in names], [values[n][2] - values[n][0] for n in names]]
    axes.barh(at, middle, xerr=[[max(0.0, x) for x in side] for side in around], color="#0072B2", height=0.62,
              error_kw={"ecolor": "#333333", "elinewidth": 1.2, "capsize": 3})  # fmt: skip
    axes.set_yticks(list(at), names)
    axes.invert_yaxis()
    axes.axvline(0.0, color="#333333", linewidth=0.8)
    if ceiling is not None:
        axes.axvline(ceiling, color="#D55E00", linestyle="--", linewidth=1.2)
        axes.annotate("noise ceiling", (ceiling, 1.0), xycoords=("data", "axes fraction"), xytext=(-3, 3),
                      textcoords="offset points", ha="right", va="bottom", color="#B04A00", fontsize=8)  # fmt: skip
    axes.set_xlabel(f"{metric} (95 % interval)")
    if title:
        axes.set_title(title, fontsize=9, loc="left", pad=14 if ceiling is not None else 6)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    return figure

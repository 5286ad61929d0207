"""Names beside the points of a figure, placed so that they hide neither each other nor the points."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from . import style

if TYPE_CHECKING:
    from matplotlib.axes import Axes
else:
    Axes = Any

_NEAR, _STEP, _RINGS = 6.0, 9.0, 4
"""Points of paper from a dot to its name; a name moves away in steps, at most so often."""
_DOT = 4.0

Box = tuple[float, float, float, float]
"""Left, bottom, right, top in pixels."""


def name_points(axes: Axes, x: NDArray[Any], y: NDArray[Any], names: Sequence[str]) -> None:
    """Write a name beside every point, where it is free: beside, above or below, and further away with a line.

    The limits of the axes must be final.
    """
    figure = axes.figure
    pixels = figure.dpi / 72
    dots = axes.transData.transform(np.column_stack([x, y]))
    taken: list[Box] = [(a - _DOT * pixels, b - _DOT * pixels, a + _DOT * pixels, b + _DOT * pixels) for a, b in dots]
    frame = axes.get_window_extent()
    for place, name in enumerate(names):
        text = axes.annotate(
            style.shorten(name, 20), (x[place], y[place]), (0, 0), textcoords="offset points", fontsize=7,
            parse_math=False,
        )  # fmt: skip
        extent = text.get_window_extent()
        width, height = extent.width / pixels, extent.height / pixels
        best, least = (_NEAR, -height / 2), math.inf
        for dx, dy in _places(width, height):
            left, bottom = dots[place][0] + dx * pixels, dots[place][1] + dy * pixels
            box = (left, bottom, left + extent.width, bottom + extent.height)
            outside = max(0.0, frame.x0 - box[0]) + max(0.0, box[2] - frame.x1)
            outside += max(0.0, frame.y0 - box[1]) + max(0.0, box[3] - frame.y1)
            cost = sum(_overlap(box, other) for k, other in enumerate(taken) if k != place) + 1e3 * outside
            cost += 0.2 * _crosses_diagonal(axes, box) * extent.width * extent.height
            if cost < least:
                best, least = (dx, dy), cost
            if cost == 0:
                break
        text.set_position(best)
        left, bottom = dots[place][0] + best[0] * pixels, dots[place][1] + best[1] * pixels
        taken.append((left, bottom, left + extent.width, bottom + extent.height))
        if max(abs(best[0] + width / 2) - width / 2, abs(best[1] + height / 2) - height / 2) > _NEAR + 1:
            _draw_leader(axes, dots[place], taken[-1])


def _places(width: float, height: float) -> Iterator[tuple[float, float]]:
    """Where a name's lower left corner may be, relative to its dot: the nearest first."""
    for ring in range(_RINGS):
        away = _NEAR + ring * _STEP
        yield from (
            (away, -height / 2), (-away - width, -height / 2), (-width / 2, away), (-width / 2, -away - height),
            (away, away / 2), (away, -away / 2 - height), (-away - width, away / 2),
            (-away - width, -away / 2 - height),
        )  # fmt: skip


def _overlap(a: Box, b: Box) -> float:
    """The area that two boxes share."""
    return max(0.0, min(a[2], b[2]) - max(a[0], b[0])) * max(0.0, min(a[3], b[3]) - max(a[1], b[1]))


def _crosses_diagonal(axes: Axes, box: Box) -> bool:
    """Whether the line of equal x and y goes through a box."""
    corners = axes.transData.inverted().transform([(box[0], box[3]), (box[2], box[1])])
    sides = [float(b - a) for a, b in corners]
    return sides[0] * sides[1] < 0


def _draw_leader(axes: Axes, dot: NDArray[Any], box: Box) -> None:
    """A thin line from a dot to the nearest place on the edge of its name."""
    end = (min(max(dot[0], box[0]), box[2]), min(max(dot[1], box[1]), box[3]))
    ends = axes.transData.inverted().transform(np.array([dot, end]))
    axes.plot(ends[:, 0], ends[:, 1], color=style.FAINT, linewidth=0.5, zorder=1.5)

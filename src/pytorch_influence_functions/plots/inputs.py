"""What in a training example matters: heat maps over pictures, bars for the columns of a table."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from ..core.errors import InvalidInput
from ..core.text import printable
from ..problem.data import Source
from . import style
from .examples import Denormalize, ExampleView, example_target, share_scale, view_example

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
else:
    Axes = Figure = Any  # matplotlib is optional; annotations may be looked at when it is absent

_CELL, _BAR = 1.5, 0.22


def plot_input_influence(
    slopes: Any,
    train: Any,
    ids: Sequence[int],
    denormalize: Denormalize = None,
    columns: Sequence[str] | None = None,
    k: int = 10,
    class_names: Sequence[str] | None = None,
    title: str = "",
    path: str | os.PathLike[str] | None = None,
) -> Figure:
    """Show the slopes of one query's measure in the inputs of training examples, beside the examples.

    Of a picture a heat map: orange where brighter pixels raise the measure, blue where they lower it, on one scale for
    all examples; the slopes of several channels are added. Of a table row the columns with the steepest slopes, each
    with its value.

    Args:
        slopes: [n, *input shape], one query's row of `ptif.actions.input_influence`.
        train: the training data, as `ptif.attribute` takes them.
        ids: which n training examples the slopes are of: places in the training dataset.
        denormalize: a function applied to an input before it is shown, such as one that reshapes a flat picture, or
            `(mean, std)` per channel. Slopes are in units of what the model sees.
        columns: names for the numbers of a table row.
        k: columns of a table row to show.
        class_names: names of integer labels; `None`: those of the data.
        title: above everything.
        path: also write the picture there; the ending says the format.

    Raises:
        InvalidInput: slopes that do not fit the examples, or examples that are neither pictures nor rows.
        NonFinite: a picture holds NaN or infinity.
        MissingExtra: matplotlib is not installed.

    Example:
        >>> import torch
        >>> figure = plot_input_influence(torch.randn(2, 1, 8, 8), (torch.rand(5, 1, 8, 8), torch.arange(5)), [0, 3])
        >>> len(figure.axes)
        4
    """
    with style.plot_style():
        source = Source.of(train).whole
        numbers = np.asarray(slopes.detach().cpu() if isinstance(slopes, Tensor) else slopes, dtype=np.float64)
        style.finite_numbers(numbers.reshape(-1), "slopes")
        if numbers.ndim < 2 or len(numbers) != len(ids):
            raise InvalidInput(
                f"slopes= has shape {numbers.shape} and {len(ids)} examples are named; give one query's row of "
                "input_influence(), [examples, *input shape]."
            )
        items = [source.item(int(i)) for i in ids]
        names = source.class_names if class_names is None else list(class_names)
        captions = [f"{_name(example_target(item), names)} #{int(i)}" for item, i in zip(items, ids, strict=True)]
        views = [view_example(item, int(i), denormalize) for item, i in zip(items, ids, strict=True)]
        if all(view.pixels is not None for view in views):
            figure = _draw_pictures(views, numbers, captions, title)
        elif numbers.ndim == 2:
            figure = _draw_rows([_row(item) for item in items], numbers, captions, columns, k, title)
        else:
            raise InvalidInput(
                f"Examples with inputs of shape {numbers.shape[1:]} are neither pictures nor rows of a table; give "
                "denormalize=, a function that makes a picture of one."
            )
        style.save_figure(figure, path)
    return figure


def _name(label: Any, names: list[str] | None) -> str:
    value = label.item() if hasattr(label, "item") and getattr(label, "size", 1) != 0 else label
    if names is not None and isinstance(value, int) and 0 <= value < len(names):
        return printable(names[value])
    return "" if value is None else printable(style.shorten(str(value), 16))


def _row(item: Any) -> NDArray[Any]:
    inputs = item[0] if isinstance(item, (tuple, list)) else item
    return np.asarray(inputs.detach().cpu() if isinstance(inputs, Tensor) else inputs, dtype=np.float64)


def _heat(slopes: NDArray[Any], pixels: NDArray[Any]) -> NDArray[Any]:
    """One slope for every place of a picture, [H, W]."""
    height, width = pixels.shape[:2]
    if slopes.size == height * width:
        return slopes.reshape(height, width)
    if slopes.ndim == 3 and slopes.shape[1:] == (height, width):
        return np.asarray(slopes.sum(0))
    if slopes.ndim == 3 and slopes.shape[:2] == (height, width):
        return np.asarray(slopes.sum(2))
    raise InvalidInput(f"Slopes of shape {slopes.shape} do not fit a picture of {height} x {width}; give its own.")


def _draw_pictures(views: list[ExampleView], slopes: NDArray[Any], captions: list[str], title: str) -> Figure:
    heats = [_heat(s, view.pixels) for s, view in zip(slopes, views, strict=True) if view.pixels is not None]
    limit = max(float(np.abs(h).max()) for h in heats) or 1.0
    shown, note = share_scale(views)
    figure = style.new_figure(max(0.5 + _CELL * len(views), 3.4), 2 * _CELL + 1.0)
    figure.set_layout_engine("constrained")
    axes = figure.subplots(2, len(views), squeeze=False)
    for place, (view, heat) in enumerate(zip(shown, heats, strict=True)):
        assert view.pixels is not None, "looked at by the caller"
        above, below = axes[:, place]
        above.imshow(view.pixels, cmap="gray", vmin=0, vmax=1, interpolation="nearest")
        above.set_title(captions[place], fontsize=8, loc="center", parse_math=False)
        grey = view.pixels if view.pixels.ndim == 2 else view.pixels[..., :3].mean(-1)
        # The picture, faint, lies under its heat map: what is hot must be found again in it.
        below.imshow(1 - 0.25 * grey, cmap="gray", vmin=0, vmax=1, interpolation="nearest")
        below.imshow(_colours(heat / limit), interpolation="nearest")
        for one in (above, below):
            one.set_xticks([]), one.set_yticks([])
            for spine in one.spines.values():
                spine.set_visible(False)
    words = (
        f"Orange: brighter pixels raise the query's measure; blue: they lower it.\nFull colour: {limit:.2g} per unit."
    )
    figure.supxlabel(words + (f" {note}." if note else ""), fontsize=7, color=style.FAINT, x=0.02, ha="left")
    if title:
        figure.suptitle(printable(title), fontsize=9.5, parse_math=False)
    return figure


def _colours(heat: NDArray[Any]) -> NDArray[Any]:
    """Colours [H, W, 4] of heat from -1 to 1, transparent at 0."""
    ends = [np.array([int(c[i : i + 2], 16) / 255 for i in (1, 3, 5)]) for c in (style.HELPFUL, style.HARMFUL)]
    rgb = np.where((heat > 0)[..., None], ends[1], ends[0])
    return np.concatenate([rgb, np.sqrt(np.abs(heat))[..., None]], -1)


def _draw_rows(
    rows: list[NDArray[Any]],
    slopes: NDArray[Any],
    captions: list[str],
    columns: Sequence[str] | None,
    k: int,
    title: str,
) -> Figure:
    width = slopes.shape[1]
    if any(row.shape != (width,) for row in rows) or (columns is not None and len(columns) != width):
        raise InvalidInput(
            f"Slopes in {width} columns do not fit rows of shape {rows[0].shape}"
            + ("" if columns is None else f" with {len(columns)} names")
            + "; give one of each per column."
        )
    names = [f"x{c}" for c in range(width)] if columns is None else [printable(str(name)) for name in columns]
    count = min(k, width)
    limit = float(np.abs(slopes).max()) or 1.0
    figure = style.new_figure(3.3 * len(rows), 1.0 + _BAR * count)
    figure.set_layout_engine("constrained")
    for axes, row, slope, caption in zip(
        figure.subplots(1, len(rows), squeeze=False)[0], rows, slopes, captions, strict=True
    ):
        order = np.argsort(-np.abs(slope), kind="stable")[:count]
        colours = [style.HARMFUL if slope[c] > 0 else style.HELPFUL for c in order]
        axes.barh(range(count), slope[order], color=colours, height=0.7)
        labels = [f"{style.shorten(names[c], 18)} = {row[c]:.3g}" for c in order]
        axes.set_yticks(range(count), labels, fontsize=7.5, parse_math=False)
        axes.tick_params(axis="y", length=0)
        axes.invert_yaxis()
        axes.set_xlim(-1.05 * limit, 1.05 * limit)
        axes.axvline(0.0, color=style.FAINT, linewidth=0.8)
        axes.set_title(caption, fontsize=8, loc="center", parse_math=False)
    figure.supxlabel("change of the query's measure per unit of the column", fontsize=8)
    if title:
        figure.suptitle(printable(title), fontsize=9.5, parse_math=False)
    return figure

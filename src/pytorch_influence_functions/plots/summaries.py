"""Figures about all examples at once: self-influence, class to class, convergence of the solve."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from ..core.errors import InvalidInput, require
from ..scores import indexing
from ..scores.scores import Scores
from . import style

if TYPE_CHECKING:
    from matplotlib.figure import Figure
else:
    Figure = Any  # matplotlib is optional; annotations may be looked at when it is absent

_NAMED_EXAMPLES = 8
_READABLE_CLASSES = 30


def plot_self_influence(
    values: Any,
    labels: Sequence[Any] | Tensor | None = None,
    class_names: Sequence[str] | None = None,
    path: str | os.PathLike[str] | None = None,
    marked: Any = None,
) -> Figure:
    """Every training example's influence on itself, largest first: look for label errors at the steep left end.

    Args:
        values: [N], from `attribution.self_influence()`.
        labels, class_names: written beside the largest values.
        path: where to write the picture; the ending says the format.
        marked: indices, or bool [N]: examples to mark, such as labels known to be wrong.

    Raises:
        InvalidInput: no values, NaN, or labels of another length.
        MissingExtra: matplotlib is not installed.
    """
    numbers = style.finite_numbers(values, "The self-influence")
    if numbers.ndim != 1 or not len(numbers):
        raise InvalidInput(f"The self-influence must be one number per training example, got shape {numbers.shape}.")
    if labels is not None and len(labels) != len(numbers):
        raise InvalidInput(f"There are {len(numbers)} values and {len(labels)} labels; give one label each.")
    mask = _as_mask(marked, len(numbers))
    order = np.argsort(-numbers, kind="stable")
    exponent = style.power_of_ten(float(np.abs(numbers).max()))
    heights = numbers[order] / 10.0**exponent
    with style.plot_style():
        # The list of the largest stands beside the curve, which may be high up to its right end.
        figure = style.new_figure(7.8, 3.6)
        axes = figure.add_axes((0.09, 0.15, 0.67, 0.68))
        ranks = np.arange(1, len(numbers) + 1)
        axes.fill_between(ranks, heights, step="mid", color=style.HELPFUL, alpha=0.18, linewidth=0)
        axes.step(ranks, heights, where="mid", color=style.HELPFUL, linewidth=1.4)
        if mask is not None:
            places = np.flatnonzero(mask[order])
            axes.plot(ranks[places], heights[places], linestyle="none", marker="x", markersize=4.5, color=style.HARMFUL,
                      label=f"marked ({len(places):,})", zorder=3)  # fmt: skip
            axes.legend(loc="lower left", frameon=False, fontsize=8)
        if len(numbers) > 50:
            axes.set_xscale("log")
        lines = [
            f"{_example_name(int(i), labels, class_names)}  {style.format_signed(float(numbers[i])).lstrip('+')}"
            for i in order[:_NAMED_EXAMPLES]
        ]
        axes.text(1.02, 0.99, "\n".join(["largest", *lines]), transform=axes.transAxes, ha="left", va="top",
                  fontsize=7, linespacing=1.5, color=style.INK, parse_math=False)  # fmt: skip
        axes.set_xlim(0.9 if len(numbers) > 50 else 0.5, len(numbers) * 1.05 + 0.5)
        axes.set_xlabel("rank" + (" (logarithmic)" if len(numbers) > 50 else ""))
        axes.set_ylabel("self-influence" + style.format_power(exponent), parse_math=False)
        axes.tick_params(labelsize=8)
        figure.text(0.09, 0.93, "Self-influence of the training examples", fontsize=11, fontweight="bold")
        figure.text(0.09, 0.875, f"N = {len(numbers):,}; large: the model leans on this label alone", fontsize=8.5,
                    color=style.FAINT)  # fmt: skip
        style.save_figure(figure, path)
    return figure


def plot_class_matrix(scores: Scores, path: str | os.PathLike[str] | None = None) -> Figure:
    """Which training class helps which class of query: the sum of scores over the class, mean over the queries.

    A cell predicts the change of a query of its row if the whole class of its column were removed. Blue helps and
    vermillion harms under every measure. Cells have numbers if there are at most 12 classes.

    Args:
        scores: of every example, with labels.
        path: also write the picture there; the ending says the format.

    Raises:
        InvalidInput: labels are not known, not every example is held (`top=`), or there are more than 30 classes.
        MissingExtra: matplotlib is not installed.
    """
    if scores.indices is not None:
        raise InvalidInput(
            "Only some training examples are held (top=, or a loader's sampler), so classes cannot be summed; "
            "score without top=, and give a part of a dataset as torch.utils.data.Subset(dataset, indices)."
        )
    if scores.train_labels is None or scores.query_labels is None:
        raise InvalidInput(
            "The labels of queries and training examples are not known; give Scores train_labels= and query_labels=."
        )
    columns, rows = (np.asarray(indexing.plain_values(side)) for side in (scores.train_labels, scores.query_labels))
    if columns.ndim != 1 or rows.ndim != 1:
        raise InvalidInput(f"Labels must be one per example, got shapes {columns.shape} and {rows.shape}.")
    train_classes, query_classes = sorted(set(columns.tolist())), sorted(set(rows.tolist()))
    if max(len(train_classes), len(query_classes)) > _READABLE_CLASSES:
        raise InvalidInput(
            f"There are {len(train_classes)} classes, above the {_READABLE_CLASSES} that are readable; pick some."
        )
    helps = scores.values.double().numpy() * (1.0 if scores.lower_is_better else -1.0)
    table = np.array(
        [[helps[np.ix_(rows == r, columns == c)].sum(1).mean() for c in train_classes] for r in query_classes]
    )
    exponent = style.power_of_ten(float(np.abs(table).max()))
    table = table / 10.0**exponent
    largest = float(np.abs(table).max()) or 1.0
    width, height = max(3.2, 0.55 * len(train_classes)), max(2.2, 0.42 * len(query_classes))
    with style.plot_style():
        figure = style.new_figure(width + 2.4, height + 1.9)
        figure.set_layout_engine("constrained")
        axes = figure.subplots()
        colours = require("matplotlib.colors", "plot").LinearSegmentedColormap.from_list(
            "helps", [style.HARMFUL, style.PAPER, style.HELPFUL]
        )
        image = axes.imshow(table, cmap=colours, vmin=-largest, vmax=largest, aspect="auto")
        names = [[style.shorten(scores.label_name(c), 14) for c in side] for side in (train_classes, query_classes)]
        axes.set_xticks(range(len(names[0])), names[0], rotation=45, ha="right", fontsize=8, parse_math=False)
        axes.set_yticks(range(len(names[1])), names[1], fontsize=8, parse_math=False)
        axes.tick_params(length=0)
        if max(table.shape) <= 12:
            for (i, j), value in np.ndenumerate(table):
                dark = abs(value) > 0.55 * largest
                axes.text(j, i, _two_digits(value, largest), ha="center", va="center", fontsize=7.5,
                          color=style.PAPER if dark else style.INK)  # fmt: skip
        axes.set_xlabel("training class, removed")
        axes.set_ylabel("class of the query")
        bar = figure.colorbar(image, ax=axes, fraction=0.05, pad=0.03)
        bar.set_label("harms  ←  change" + style.format_power(exponent) + "  →  helps", fontsize=8)
        bar.ax.tick_params(labelsize=7)
        axes.set_title("Which class helps which", fontsize=11, fontweight="bold", pad=10)
        style.save_figure(figure, path)
    return figure


def plot_convergence(scores: Scores, path: str | os.PathLike[str] | None = None) -> Figure:
    """The largest relative residual after every step of an iterative solve.

    Args:
        scores: of an iterative solve.
        path: also write the picture there; the ending says the format.

    Raises:
        InvalidInput: these scores were not solved for by conjugate gradients.
        MissingExtra: matplotlib is not installed.
    """
    d = scores.diagnostics
    if not d.residual_history:
        raise InvalidInput(
            f"No residuals were recorded for {d.method or 'these scores'}: only conjugate gradients go step by step "
            "with a residual; print(scores.diagnostics) has the final one."
        )
    with style.plot_style():
        figure = style.new_figure(5.4, 3.4)
        axes = figure.add_axes((0.14, 0.15, 0.82, 0.68))
        steps = range(1, len(d.residual_history) + 1)
        axes.plot(steps, d.residual_history, color=style.HELPFUL, linewidth=1.6)
        axes.set_yscale("log")
        if math.isfinite(d.residual_max) and d.residual_max > 0:
            axes.axhline(d.residual_max, color=style.FAINT, linewidth=1, linestyle="dashed")
            axes.annotate(f"at the end, recomputed: {d.residual_max:.1e}", (0.0, d.residual_max),
                          xycoords=("axes fraction", "data"), xytext=(4, 4), textcoords="offset points", ha="left",
                          fontsize=8, color=style.FAINT)  # fmt: skip
        axes.set_xlabel("products with the curvature")
        axes.set_ylabel("largest relative residual")
        axes.tick_params(labelsize=8)
        figure.text(0.14, 0.93, "How the solve converged", fontsize=11, fontweight="bold")
        figure.text(0.14, 0.87, style.shorten(d.method, 64), fontsize=8, color=style.FAINT, parse_math=False)
        style.save_figure(figure, path)
    return figure


def _two_digits(value: float, largest: float) -> str:
    """Format to two digits of the largest number in the figure."""
    digits = max(0, 1 - math.floor(math.log10(largest)))
    text = f"{value:+.{digits}f}".replace("-", "−")
    return "0" if float(f"{value:.{digits}f}") == 0 else text


def _as_mask(marked: Any, n: int) -> NDArray[Any] | None:
    if marked is None:
        return None
    array = np.asarray(marked.detach().cpu() if isinstance(marked, Tensor) else marked)
    if array.dtype == np.bool_ and array.shape == (n,):
        return array
    if array.dtype.kind in "iu" and array.ndim == 1 and (not len(array) or (array.min() >= 0 and array.max() < n)):
        mask = np.zeros(n, dtype=np.bool_)
        mask[array] = True
        return mask
    raise InvalidInput(f"`marked` must be indices from 0 to {n - 1}, or one bool for each of {n} examples.")


def _example_name(index: int, labels: Sequence[Any] | Tensor | None, class_names: Sequence[str] | None) -> str:
    label = indexing.plain_value(indexing.member_at(labels, index))
    if isinstance(label, int) and class_names is not None and 0 <= label < len(class_names):
        label = class_names[label]
    return f"#{index}" + (f" {style.shorten(str(label), 14)}" if label is not None else "")

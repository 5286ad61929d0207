"""Figures of one query's scores, of predicted against actual changes, and of scores over damping."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..core.errors import InvalidInput, require
from ..core.text import as_title, printable
from ..core.token_text import token_text_of
from ..problem.data import Source
from ..scores.scores import MEAN, Scores
from . import style
from .examples import Denormalize, ExampleView, example_target, share_scale, view_example, wrap_text
from .point_names import name_points
from .tokens import Pieces, label_text, plot_tokens

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
else:
    Axes = Figure = Any  # matplotlib is optional; annotations may be looked at when it is absent

_PER_ROW = 10  # examples in one row; further ones go to more rows
# Inches: a cell's width, the gap beside it, the text around it, the titles, the page.
_CELL, _GAP, _ABOVE, _BELOW, _TITLE = 1.22, 0.14, 0.25, 0.40, 0.30
_WIDEST, _MARGIN, _HEAD, _FOOT = 3.4, 0.25, 0.10, 0.26
_TITLES, _COLOURS = ("Most helpful", "Most harmful"), (style.HELPFUL, style.HARMFUL)


@dataclass(frozen=True, eq=False)
class _Tile:
    """An example with the text above and below it."""

    view: ExampleView
    above: str
    below: tuple[str, str]


def plot_influences(
    scores: Scores,
    q: int = 0,
    k: int = 5,
    train: Any = None,
    queries: Any = None,
    denormalize: Denormalize = None,
    class_names: list[str] | None = None,
    path: str | os.PathLike[str] | None = None,
    tokens: Any = None,
    pieces: Pieces = None,
) -> Figure:
    """The query large, and beside it a row of helpful and a row of harmful training examples.

    Above each example is its score, the predicted change of the measure on the query when the example is removed;
    below are its label and its position in the training dataset.

    Args:
        scores: row `q` of these is shown.
        k: examples per row, or fewer if fewer are stored; the two rows share examples if there are few.
        train, queries: the data scored, in any form `attribute` takes; by default those that the scores hold.
        denormalize: a function applied to an input before it is shown (undo a normalisation, reshape a flat
            picture, decode tokens), or `(mean, std)` per channel. Without it, values outside 0 to 1 are
            stretched, on one scale for the whole picture.
        class_names: names of integer labels; by default those of the scores.
        path: also write the picture there; the ending says the format.
        tokens: the fitted method that gave the scores, or training index -> [queries, tokens], from its `token_scores`:
            texts in full width, every token coloured by its share of the score; `pieces` then turns an input into its
            tokens as strings.
        q: which query, as a row of the scores.
        pieces: an input's tokens as strings, one per token score; not needed where inputs are strings.

    Raises:
        InvalidInput: no data at hand, or data of another length than the scores; token scores that do not fit.
        MissingExtra: matplotlib is not installed.
    """
    with style.plot_style():
        train_source = _require_data(train if train is not None else scores.train_source, scores.n_train, "train")
        if class_names is not None:
            scores = replace(scores, class_names=list(class_names))
        # A row of several queries (a mean, a group) has no example to show: its name stands there.
        has_example = int(scores[q].query_ids[0]) != MEAN
        query_source: Source | None = None
        if has_example or tokens is not None:
            query_source = _require_data(queries if queries is not None else scores.query_source, None, "queries")
        if tokens is not None:
            if not has_example:
                raise InvalidInput("A row of several queries has no text of its own to colour; plot one query.")
            assert query_source is not None
            return plot_tokens(scores, q, k, train_source, query_source, tokens, pieces, path)
        helpful, harmful = scores.helpful(q, k), scores.harmful(q, k)
        tiles, note = _make_tiles(scores, q, helpful + harmful, train_source, query_source, denormalize)
        first_harmful = 1 + len(helpful)
        figure = _lay_out(scores, tiles[0], tiles[1:first_harmful], tiles[first_harmful:], note)
        style.save_figure(figure, path)
    return figure


def _require_data(data: Any, size: int | None, name: str) -> Source:
    if data is None:
        raise InvalidInput(
            f"The scores do not remember the data (they were loaded, or made by hand); pass {name}= to show examples."
        )
    source = Source.of(data).whole
    if size is not None and len(source) != size:
        raise InvalidInput(
            f"{name}= has {len(source)} examples and the scores are of {size}; pass the dataset that was scored."
        )
    return source


def _make_tiles(
    scores: Scores,
    q: int,
    ranked: list[tuple[int, float]],
    train: Source,
    queries: Source | None,
    denormalize: Denormalize,
) -> tuple[list[_Tile], str]:
    """The tile of the query, then those of the ranked training examples; and a note on the scale of pictures."""
    asked = _query_tile(scores[q], queries, denormalize)
    views, captions = [asked.view], [(asked.above, asked.below)]
    for index, score in ranked:
        item = train.item(index)
        label = example_target(item) if scores.train_labels is None else scores.train_labels[index]
        name = "" if scores.train_names is None else f" {scores.train_names[index]}"
        views.append(_view(train, item, index, denormalize))
        captions.append((style.format_signed(score), (label_text(scores, label), f"#{index}{name}")))
    views, note = share_scale(views)
    return [_Tile(view, above, below) for view, (above, below) in zip(views, captions, strict=True)], note


def _query_tile(row: Scores, queries: Source | None, denormalize: Denormalize) -> _Tile:
    """The query's example and label; of a row of several queries its name on a card."""
    query, name = int(row.query_ids[0]), row.describe_query(0)
    if queries is None:
        return _Tile(ExampleView(card=name), "Asked together", ("", ""))
    if query >= len(queries):
        raise InvalidInput(f"queries= has {len(queries)} examples and the scores are of query {query}; pass theirs.")
    item = queries.item(query)
    label = example_target(item) if row.query_labels is None else row.query_labels[0]
    return _Tile(_view(queries, item, query, denormalize), name, (label_text(row, label), ""))


def _view(source: Source, item: Any, index: int, denormalize: Denormalize) -> ExampleView:
    """The view of an example; of a text whose tokens are known, its text."""
    text = None if callable(denormalize) else token_text_of(source.dataset, index)
    return view_example(item if text is None else text.text, index, denormalize)


def _lay_out(scores: Scores, query: _Tile, helpful: list[_Tile], harmful: list[_Tile], note: str) -> Figure:
    """Place everything in inches from the top left, so that nothing depends on the size of texts."""
    rows = [
        (tiles[i : i + _PER_ROW], kind, i == 0)
        for kind, tiles in enumerate((helpful, harmful))
        for i in range(0, len(tiles), _PER_ROW)
    ]
    aspect = _aspect([query, *helpful, *harmful])
    cell = _CELL * aspect
    # The query reaches from the top of the first row to the foot of the second, unless that is too wide.
    large = min((2 * cell + _BELOW + _TITLE + _ABOVE) / aspect, _WIDEST)
    left = _MARGIN + large + 0.4
    width = left + max(max(len(tiles) for tiles, *_ in rows) * (_CELL + _GAP) - _GAP + _MARGIN, 2.6)
    height = max(2 * _TITLE + len(rows) * (_ABOVE + cell + _BELOW), _TITLE + _ABOVE + large * aspect) + 2 * _FOOT
    page = _FigurePage(style.new_figure(width, height), width, height)
    page.heading(query, large)
    page.draw(query.view, (_MARGIN, _HEAD + _TITLE + _ABOVE, large, large * aspect), style.INK, "solid", 10.0)
    y = _HEAD
    for tiles, kind, first in rows:
        if first:
            page.text(left, y + 0.2, _TITLES[kind], color=_COLOURS[kind], fontsize=10.5, fontweight="bold")
            y += _TITLE
        for i, tile in enumerate(tiles):
            page.tile(tile, kind, left + i * (_CELL + _GAP), y, cell)
        y += _ABOVE + cell + _BELOW
    page.text(_MARGIN, height - 0.1, _footnote(scores, note), fontsize=7, color=style.FAINT, va="bottom")
    return page.figure


def _aspect(tiles: list[_Tile]) -> float:
    """Height over width of the cells: that of the tallest picture, between 0.5 and 1.6; cards are square."""
    shapes = [1.0 if t.view.pixels is None else t.view.pixels.shape[0] / t.view.pixels.shape[1] for t in tiles]
    return min(max(*shapes, 0.5), 1.6)


@dataclass(frozen=True, eq=False)
class _FigurePage:
    """A figure with positions in inches from the top left."""

    figure: Figure
    width: float
    height: float

    def text(self, x: float, y: float, text: str, room: float = math.inf, **kw: Any) -> None:
        """Write text at a place, cut with an ellipsis to `room` inches."""
        # parse_math=False: a dollar sign in the data is a dollar sign.
        options: dict[str, Any] = {"va": "baseline", "parse_math": False} | kw
        artist = self.figure.text(x / self.width, 1 - y / self.height, printable(text), **options)
        if math.isinf(room):
            return
        text = style.shorten(text, 80)
        artist.set_text(text)
        while (width := artist.get_window_extent().width / self.figure.dpi) > room and len(text) > 2:
            # The text is cut in proportion, and by at least one letter.
            text = style.shorten(text, max(2, min(len(text) - 1, int(len(text) * room / width) + 1)))
            artist.set_text(text)

    def heading(self, query: _Tile, room: float) -> None:
        """Write the query's name, level with the first row's title, and its label, level with the scores."""
        name, label = query.above, query.below[0]
        room += 0.2
        self.text(_MARGIN, _HEAD + 0.2, as_title(name), room, fontsize=10.5, fontweight="bold")
        if label:
            self.text(_MARGIN, _HEAD + _TITLE + _ABOVE - 0.07, f"label: {label}", room, fontsize=9)

    def tile(self, tile: _Tile, kind: int, x: float, y: float, cell: float) -> None:
        """Draw one training example, with its score above and its label and index below."""
        middle, colour, room = x + _CELL / 2, _COLOURS[kind], _CELL + 0.6 * _GAP
        self.text(middle, y + _ABOVE - 0.07, tile.above, ha="center", color=colour, fontsize=9)
        self.draw(tile.view, (x, y + _ABOVE, _CELL, cell), colour, ("solid", "dashed")[kind], 7.5)
        label, place = tile.below
        baseline = y + _ABOVE + cell + 0.15
        if label:
            self.text(middle, baseline, label, room, ha="center", fontsize=8)
            baseline += 0.145
        self.text(middle, baseline, place, room, ha="center", fontsize=8, color=style.FAINT)

    def draw(
        self, view: ExampleView, box: tuple[float, float, float, float], colour: str, line: str, size: float
    ) -> None:
        """Draw a picture, a series or a card of text in a frame; `box` is x, y, width, height."""
        x, y, width, height = box
        place = (x / self.width, 1 - (y + height) / self.height, width / self.width, height / self.height)
        axes = self.figure.add_axes(place)
        axes.set_xticks([])
        axes.set_yticks([])
        for spine in axes.spines.values():
            spine.set(visible=True, edgecolor=colour, linewidth=1.4, linestyle=line)
        if view.pixels is not None:
            axes.imshow(view.pixels, cmap="gray", vmin=0, vmax=1, interpolation="nearest", aspect="equal")
            return
        axes.set_facecolor(style.CARD)
        if view.lines is not None:
            low, high = view.limits
            margin = 0.06 * ((high - low) or 1.0)
            for channel, shade in zip(view.lines, style.PALETTE * len(view.lines), strict=False):
                axes.plot(channel, color=style.INK if len(view.lines) == 1 else shade, linewidth=0.9)
            axes.set(xlim=(0, view.lines.shape[1] - 1), ylim=(low - margin, high + margin))
            return
        # An average letter is 0.58 of the font size wide, a line 1.45 of it high.
        columns, lines = int(0.92 * width * 72 / size / 0.58), int(0.93 * height * 72 / size / 1.45)
        text = wrap_text(view.card, columns, lines)
        options: dict[str, Any] = {"parse_math": False, "clip_on": True, "linespacing": 1.25}
        axes.text(0.05, 0.95, text, transform=axes.transAxes, va="top", fontsize=size, **options)


def _footnote(scores: Scores, note: str) -> str:
    measure = "loss" if scores.lower_is_better else "measure"
    text = f"Numbers: predicted change of the query's {measure} when the example is removed and the model retrained."
    return f"{text}\n{note[:1].upper()}{note[1:]}." if note else text


# --------------------------------------------------------------------------- agreement


def plot_agreement(
    predicted: Any,
    actual: Any,
    path: str | os.PathLike[str] | None = None,
    title: str = "Predicted against actual change",
    xlabel: str = "predicted change",
    ylabel: str = "actual change after retraining",
    names: list[str] | None = None,
) -> Figure:
    """Predicted against measured change, with the diagonal, Pearson's r and the least-squares slope.

    Both axes have the same scale: points on the diagonal are predicted exactly, a slope above 1 means that
    the predictions are too small.

    Args:
        predicted, actual: equally many numbers, at least two.
        names: of the points; written beside them if there are at most 20.
        path: also write the picture there; the ending says the format.
        title, xlabel, ylabel: the text above the picture and beside its axes.

    Raises:
        InvalidInput: different lengths, fewer than two points, or NaN.
    """
    x = style.finite_numbers(predicted, "predicted").reshape(-1)
    y = style.finite_numbers(actual, "actual").reshape(-1)
    if len(x) != len(y) or len(x) < 2:
        raise InvalidInput(f"There are {len(x)} predicted and {len(y)} actual changes; give equally many, at least 2.")
    fit, exponent = _fit_text(x, y), style.power_of_ten(float(max(abs(x).max(), abs(y).max())))
    x, y = x / 10.0**exponent, y / 10.0**exponent
    low, high = min(x.min(), y.min(), 0.0), max(x.max(), y.max(), 0.0)
    margin = 0.06 * ((high - low) or 1.0)
    limits = (low - margin, high + margin)
    with style.plot_style():
        figure = style.new_figure(4.6, 4.8)
        axes = figure.add_axes((0.16, 0.12, 0.79, 0.757))
        axes.plot(
            limits, limits, color=style.FAINT, linewidth=1, linestyle="dashed", zorder=1, label="predicted = actual"
        )
        alpha = 0.85 if len(x) < 200 else 0.4
        dots: dict[str, Any] = {"edgecolor": style.PAPER, "linewidth": 0.5, "alpha": alpha, "zorder": 2}
        axes.scatter(x, y, s=26, color=style.HELPFUL, **dots)
        axes.set(xlim=limits, ylim=limits, aspect="equal")
        axes.set_xlabel(xlabel + style.format_power(exponent), parse_math=False)
        axes.set_ylabel(ylabel + style.format_power(exponent), parse_math=False)
        axes.tick_params(labelsize=8)
        for axis in (axes.xaxis, axes.yaxis):
            axis.set_major_locator(require("matplotlib.ticker", "plot").MaxNLocator(5))
        axes.legend(loc="lower right", frameon=False, fontsize=8, handlelength=1.8)
        if names is not None and len(x) <= 20:
            axes.apply_aspect()
            name_points(axes, x, y, names)
        figure.text(0.16, 0.95, printable(title), fontsize=11, fontweight="bold", parse_math=False)
        figure.text(0.16, 0.905, fit, fontsize=9, color=style.FAINT)
        style.save_figure(figure, path)
    return figure


def _fit_text(x: NDArray[Any], y: NDArray[Any]) -> str:
    if np.ptp(x) == 0 or np.ptp(y) == 0:
        return f"n = {len(x)}, r undefined: one side is constant"
    r, slope = float(np.corrcoef(x, y)[0, 1]), float(np.polyfit(x, y, 1)[0])
    return f"n = {len(x)}, r = {r:.3f}, slope = {slope:.3g}".replace("-", "−")


# --------------------------------------------------------------------------- damping


def plot_damping_curve(
    results: Mapping[float, Scores],
    q: int = 0,
    k: int = 4,
    path: str | os.PathLike[str] | None = None,
) -> Figure:
    """How scores depend on damping: those of the extreme examples, and the agreement of the whole ranking.

    Left: the `k` most helpful and `k` most harmful examples at the middle lambda, each score as a share of
    the largest at that lambda (scores shrink as lambda grows; their order is what matters). Right: Spearman's
    rank correlation of all scores with those at the middle lambda.

    Args:
        results: lambda -> scores of the same queries, as `Attribution.scores_over_damping` gives.
        q: which query, as a row of the scores.
        k: how many examples at either end.
        path: also write the picture there; the ending says the format.

    Raises:
        InvalidInput: fewer than two lambdas, one that is not positive, or scores that hold other examples.
    """
    lambdas = sorted(float(x) for x in results)
    if len(lambdas) < 2 or lambdas[0] <= 0:
        raise InvalidInput(f"A damping path needs at least two positive values of lambda, got {lambdas}.")
    by_lambda = {float(x): s for x, s in results.items()}
    middle = lambdas[len(lambdas) // 2]
    if any(s.indices is not None or s.shape != by_lambda[middle].shape for s in by_lambda.values()):
        raise InvalidInput("A damping path compares all scores of the same queries; score without top=.")
    values = torch.stack([by_lambda[x][q].values[0].double() for x in lambdas])
    shares = values / values.abs().amax(1, keepdim=True).clamp(min=torch.finfo(torch.float64).tiny)
    ends = [(i, 0) for i, _ in by_lambda[middle].helpful(q, k)]
    ends += [(i, 1) for i, _ in by_lambda[middle].harmful(q, k) if (i, 0) not in ends]
    ranks = torch.stack([_ranks(row) for row in values])
    agreement = torch.corrcoef(ranks)[len(lambdas) // 2] if values.shape[1] > 1 else torch.ones(len(lambdas))
    with style.plot_style():
        figure = style.new_figure(8.4, 3.9)
        left = figure.add_axes((0.085, 0.15, 0.42, 0.68))
        right = figure.add_axes((0.68, 0.15, 0.29, 0.68))
        _draw_paths(left, lambdas, shares, ends)
        right.plot(lambdas, agreement.tolist(), color=style.INK, marker="o", markersize=4)
        right.set(ylim=(min(-0.05, float(agreement.min()) - 0.05), 1.05), ylabel="rank correlation")
        for axes, title in ((left, "Score / largest score"), (right, f"Ranking against λ = {middle:.3g}")):
            axes.set_xscale("log")
            axes.set_xlabel("damping λ")
            axes.axvline(middle, color=style.FAINT, linewidth=0.8, linestyle="dotted", zorder=0)
            axes.tick_params(labelsize=8)
            axes.set_title(title, fontsize=10, fontweight="bold")
        name = printable(by_lambda[middle].describe_query(q))
        figure.text(0.085, 0.94, as_title(name), fontsize=9, color=style.FAINT, parse_math=False)
        style.save_figure(figure, path)
    return figure


def _ranks(values: Tensor) -> Tensor:
    """Ranks from 1; equal values share their mean rank."""
    _, place, counts = torch.unique(values, return_inverse=True, return_counts=True)
    shared: Tensor = counts.cumsum(0) - (counts - 1) / 2
    return shared[place].double()


def _draw_paths(axes: Axes, lambdas: list[float], shares: Tensor, ends: list[tuple[int, int]]) -> None:
    styles = ((style.HELPFUL, "solid", "helpful"), (style.HARMFUL, "dashed", "harmful"))
    heights = _move_apart([float(shares[-1, i]) for i, _ in ends], 0.085 * max(1.0, float(shares.max() - shares.min())))
    for (index, kind), height in zip(ends, heights, strict=True):
        colour, line, effect = styles[kind]
        axes.plot(lambdas, shares[:, index].tolist(), color=colour, linestyle=line, marker="o", markersize=3)
        # Labels stand beside the ends of the lines, moved apart if the lines meet.
        axes.annotate(
            f"#{index} {effect}",
            (1.02, height),
            xycoords=axes.get_yaxis_transform(),
            fontsize=7.5,
            color=colour,
            va="center",
        )
    axes.axhline(0, color=style.FAINT, linewidth=0.8, zorder=0)


def _move_apart(heights: list[float], gap: float) -> list[float]:
    """Move heights apart to at least `gap`; their order and their centre stay."""
    order = sorted(range(len(heights)), key=lambda i: heights[i])
    placed = dict.fromkeys(order, 0.0)
    last = -math.inf
    for i in order:
        last = max(heights[i], last + gap)
        placed[i] = last
    shift = sum(placed[i] - heights[i] for i in order) / max(1, len(order))
    return [placed[i] - shift for i in range(len(heights))]

"""Pictures of scores. Each function returns a matplotlib `Figure`, opens no window and changes no setting."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from ..data import Source
from ..errors import InvalidInput
from ..scores import Scores
from . import style
from .examples import Denormalize, Shown, exposed, see, target_of, wrapped

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
else:
    Axes = Figure = Any  # matplotlib is optional; annotations may be looked at when it is absent

_PER_ROW = 10  # examples in one row; more go to further rows
_CELL, _GAP, _ABOVE, _BELOW = 1.22, 0.14, 0.25, 0.40  # inches: picture, gap, and the text around it
_QUERY, _MARGIN, _HEAD, _FOOT = 2.5, 0.25, 0.62, 0.42


@dataclass(frozen=True, eq=False)
class _Tile:
    """An example with what is written above and below it."""

    shown: Shown
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
) -> Figure:
    """The seed's picture: the query large, beside it a row of helpful and a row of harmful training examples.

    Above each example stands its score, the predicted change of the measure on the query when the example is
    removed; below, its label and its position in the training dataset.

    Args:
        scores: whose row `q` is shown.
        k: examples per row, fewer where fewer are held; the two rows share examples where there are few.
        train, queries: the data scored, in any form that `attribute` takes; by default what the scores remember.
        denormalize: a function applied to an input before it is shown (undo a normalisation, reshape a flat
            picture, decode tokens), or `(mean, std)` per channel. Without it, values outside 0 to 1 are
            stretched, on one scale for the whole picture.
        class_names: what to call integer labels; by default what the scores know.
        path: also write the picture there; the ending says the format.

    Raises:
        InvalidInput: no data at hand, or data of another length than the scores.
        MissingExtra: matplotlib is not installed.
    """
    with style.styled():
        training = _data(train if train is not None else scores.train_source, scores.n_train, "train")
        asked = _data(queries if queries is not None else scores.query_source, None, "queries")
        if class_names is not None:
            from dataclasses import replace

            scores = replace(scores, class_names=list(class_names))
        found = [scores.helpful(q, k), scores.harmful(q, k)]
        tiles, note = _tiles(scores, q, found, training, asked, denormalize)
        figure = _laid_out(scores, tiles[0], tiles[1 : 1 + len(found[0])], tiles[1 + len(found[0]) :], note)
        style.save(figure, path)
    return figure


def _data(data: Any, size: int | None, name: str) -> Source:
    if data is None:
        raise InvalidInput(
            f"The scores do not remember the data (they were loaded, or made by hand); pass {name}= to show examples."
        )
    source = Source.of(data)
    if size is not None and len(source) != size:
        raise InvalidInput(
            f"{name}= has {len(source)} examples and the scores are of {size}; pass the dataset that was scored."
        )
    return source


def _tiles(
    scores: Scores,
    q: int,
    found: list[list[tuple[int, float]]],
    train: Source,
    queries: Source,
    denormalize: Denormalize,
) -> tuple[list[_Tile], str]:
    one = scores[q]
    at = int(one.query_ids[0])
    if at < 0:
        raise InvalidInput("A mean over queries has no example to show; plot one query.")
    if at >= len(queries):
        raise InvalidInput(
            f"queries= has {len(queries)} examples and the scores are of query {at}; pass theirs."
        )
    item = queries.item(at)
    label = target_of(item) if one.query_labels is None else one.query_labels[0]
    shown, captions = [see(item, at, denormalize)], [(one.query_words(0), (scores.label_name(label), ""))]
    for index, score in found[0] + found[1]:
        item = train.item(index)
        label = target_of(item) if scores.train_labels is None else scores.train_labels[index]
        name = "" if scores.train_names is None else f" {scores.train_names[index]}"
        shown.append(see(item, index, denormalize))
        captions.append((style.number(score), (scores.label_name(label), f"#{index}{name}")))
    shown, note = exposed(shown)
    return [_Tile(s, above, below) for s, (above, below) in zip(shown, captions, strict=True)], note


def _laid_out(scores: Scores, query: _Tile, helpful: list[_Tile], harmful: list[_Tile], note: str) -> Figure:
    """Everything placed in inches from the top left, so that nothing depends on what the texts measure."""
    rows = [
        (tiles[i : i + _PER_ROW], kind)
        for tiles, kind in ((helpful, 0), (harmful, 1))
        for i in range(0, len(tiles), _PER_ROW)
    ]
    columns = max(len(tiles) for tiles, _ in rows)
    step = _ABOVE + _CELL + _BELOW
    heads = 2 * 0.30
    left = _MARGIN + _QUERY + 0.45
    # Not narrower than the sentence at the foot.
    width = max(left + columns * (_CELL + _GAP) + _MARGIN - _GAP, 7.4)
    height = _HEAD + heads + len(rows) * step + _FOOT
    figure = style.new_figure(width, height)

    def axes(x: float, y: float, size: float) -> Axes:
        return figure.add_axes((x / width, 1 - (y + size) / height, size / width, size / height))

    def text(x: float, y: float, words: str, **kw: Any) -> None:
        # parse_math=False: a dollar sign in the data is a dollar sign.
        figure.text(x / width, 1 - y / height, words, **{"va": "baseline", "parse_math": False} | kw)

    top = _HEAD + 0.30 + _ABOVE
    text(_MARGIN, 0.38, style.shorten(_heading(query), int(width * 9)), fontsize=12, fontweight="bold")
    _draw(axes(_MARGIN, top, _QUERY), query.shown, style.INK, "solid", (28, 13), 10)
    y, before = _HEAD, -1
    for tiles, kind in rows:
        colour, line = ((style.HELPFUL, "solid"), (style.HARMFUL, "dashed"))[kind]
        if kind != before:
            words = ("Most helpful", "Most harmful")[kind]
            text(left, y + 0.2, words, color=colour, fontsize=10.5, fontweight="bold")
            y, before = y + 0.30, kind
        for i, tile in enumerate(tiles):
            x = left + i * (_CELL + _GAP)
            text(x + _CELL / 2, y + _ABOVE - 0.07, tile.above, ha="center", color=colour, fontsize=9)
            _draw(axes(x, y + _ABOVE, _CELL), tile.shown, colour, line, (18, 8), 7.5)
            for n, words in enumerate(part for part in tile.below if part):
                text(
                    x + _CELL / 2,
                    y + _ABOVE + _CELL + 0.15 + 0.145 * n,
                    style.shorten(words, 17),
                    ha="center",
                    fontsize=8,
                    color=(style.INK, style.FAINT)[words.startswith("#")],
                )
        y += step
    text(_MARGIN, height - 0.16, _footnote(scores, note), fontsize=7.5, color=style.FAINT)
    return figure


def _heading(query: _Tile) -> str:
    name, label = query.above, query.below[0]
    name = name[:1].upper() + name[1:]
    return f"{name}: {label}" if label else name


def _footnote(scores: Scores, note: str) -> str:
    measure = "loss" if scores.lower_is_better else "measure"
    words = f"Numbers: predicted change of the query's {measure} when the example is removed and the model retrained."
    return f"{words}\n{note[:1].upper()}{note[1:]}." if note else words


def _draw(axes: Axes, shown: Shown, colour: str, line: str, card: tuple[int, int], size: float) -> None:
    axes.set_xticks([])
    axes.set_yticks([])
    for spine in axes.spines.values():
        spine.set(visible=True, edgecolor=colour, linewidth=1.4, linestyle=line)
    if shown.pixels is None:
        axes.set_facecolor(style.CARD)
        words = wrapped(shown.words, *card)
        axes.text(
            0.05,
            0.95,
            words,
            transform=axes.transAxes,
            va="top",
            fontsize=size,
            parse_math=False,
            clip_on=True,
            linespacing=1.25,
            family="sans-serif",
        )
        return
    picture = shown.pixels
    axes.imshow(picture, cmap="gray", vmin=0, vmax=1, interpolation="nearest", aspect="equal")
    # imshow shrinks the axes of a picture that is not square; they stay centred in their cell.
    axes.set_anchor("C")


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
        names: what to call the points; written beside them when there are at most 20.

    Raises:
        InvalidInput: different lengths, fewer than two points, or NaN.
    """
    x, y = _numbers(predicted, "predicted"), _numbers(actual, "actual")
    if len(x) != len(y) or len(x) < 2:
        raise InvalidInput(
            f"There are {len(x)} predicted and {len(y)} actual changes; give equally many, at least 2."
        )
    low, high = min(x.min(), y.min(), 0.0), max(x.max(), y.max(), 0.0)
    margin = 0.06 * ((high - low) or 1.0)
    limits = (low - margin, high + margin)
    with style.styled():
        figure = style.new_figure(4.6, 4.8)
        axes = figure.add_axes((0.19, 0.13, 0.77, 0.74))
        axes.plot(limits, limits, color=style.FAINT, linewidth=1, linestyle="dashed", zorder=1)
        axes.text(
            *_along(limits),
            "predicted = actual",
            rotation=45,
            rotation_mode="anchor",
            ha="right",
            va="bottom",
            fontsize=7.5,
            color=style.FAINT,
        )
        alpha = 0.85 if len(x) < 200 else 0.4
        axes.scatter(
            x, y, s=26, color=style.HELPFUL, alpha=alpha, edgecolor=style.PAPER, linewidth=0.5, zorder=2
        )
        if names is not None and len(x) <= 20:
            for point in zip(x, y, names, strict=True):
                axes.annotate(
                    style.shorten(point[2], 20),
                    point[:2],
                    (4, 4),
                    textcoords="offset points",
                    fontsize=7,
                    parse_math=False,
                )
        axes.set(xlim=limits, ylim=limits, aspect="equal")
        axes.set_xlabel(xlabel, parse_math=False)
        axes.set_ylabel(ylabel, parse_math=False)
        figure.text(0.19, 0.945, title, fontsize=11, fontweight="bold", parse_math=False)
        figure.text(0.19, 0.9, _fit_words(x, y), fontsize=9, color=style.FAINT)
        _plain_ticks(axes)
        style.save(figure, path)
    return figure


def _along(limits: tuple[float, float]) -> tuple[float, float]:
    at = limits[0] + 0.97 * (limits[1] - limits[0])
    return at, at


def _plain_ticks(axes: Axes) -> None:
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_tick_params(labelsize=8)
        axis.get_offset_text().set_fontsize(8)
        if hasattr(axis.get_major_formatter(), "set_powerlimits"):
            axis.get_major_formatter().set_powerlimits((-3, 4))
        axis.set_major_locator(_locator())


def _locator() -> Any:
    from ..errors import require

    return require("matplotlib.ticker", "plot").MaxNLocator(5)


def _fit_words(x: np.ndarray[Any, Any], y: np.ndarray[Any, Any]) -> str:
    if np.ptp(x) == 0 or np.ptp(y) == 0:
        return f"n = {len(x)}, r undefined: one side is constant"
    r, slope = float(np.corrcoef(x, y)[0, 1]), float(np.polyfit(x, y, 1)[0])
    return f"n = {len(x)}, r = {style.number(r)[0:6]}, slope = {style.number(slope)}"


def _numbers(values: Any, name: str) -> np.ndarray[Any, Any]:
    held = values.detach().cpu() if isinstance(values, Tensor) else values
    found = np.asarray(held, dtype=np.float64).reshape(-1)
    bad = np.flatnonzero(~np.isfinite(found))
    if len(bad):
        raise InvalidInput(f"{name} holds NaN or infinity at position {int(bad[0])}; leave such points out.")
    return found


# --------------------------------------------------------------------------- damping


def plot_damping_path(
    results: Mapping[float, Scores],
    q: int = 0,
    k: int = 4,
    path: str | os.PathLike[str] | None = None,
) -> Figure:
    """How the answer depends on damping: scores of the extreme examples, and agreement of the whole ranking.

    Left: the `k` most helpful and `k` most harmful examples at the middle lambda, each score as a share of
    the largest at that lambda (scores shrink as lambda grows; their order is what matters). Right: Spearman's
    rank correlation of all scores with those at the middle lambda.

    Args:
        results: lambda -> scores of the same queries, as `Attribution.path` gives.

    Raises:
        InvalidInput: fewer than two lambdas, one that is not positive, or scores that hold other examples.
    """
    lambdas = sorted(float(x) for x in results)
    if len(lambdas) < 2 or lambdas[0] <= 0:
        raise InvalidInput(f"A damping path needs at least two positive values of lambda, got {lambdas}.")
    given = {float(x): s for x, s in results.items()}
    middle = lambdas[len(lambdas) // 2]
    if any(s.indices is not None or s.shape != given[middle].shape for s in given.values()):
        raise InvalidInput("A damping path compares all scores of the same queries; score without top=.")
    at = torch.stack([given[x][q].values[0].double() for x in lambdas])
    shares = at / at.abs().amax(1, keepdim=True).clamp(min=torch.finfo(torch.float64).tiny)
    ends = [(i, 0) for i, _ in given[middle].helpful(q, k)]
    ends += [(i, 1) for i, _ in given[middle].harmful(q, k) if (i, 0) not in ends]
    ranks = at.argsort(1, stable=True).argsort(1, stable=True).double()
    agreement = torch.corrcoef(ranks)[len(lambdas) // 2] if at.shape[1] > 1 else torch.ones(len(lambdas))
    with style.styled():
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
        name = given[middle].query_words(q)
        figure.text(0.085, 0.94, name[:1].upper() + name[1:], fontsize=9, color=style.FAINT, parse_math=False)
        style.save(figure, path)
    return figure


def _draw_paths(axes: Axes, lambdas: list[float], shares: Tensor, ends: list[tuple[int, int]]) -> None:
    styles = ((style.HELPFUL, "solid", "helpful"), (style.HARMFUL, "dashed", "harmful"))
    heights = _spread(
        [float(shares[-1, i]) for i, _ in ends], 0.085 * max(1.0, float(shares.max() - shares.min()))
    )
    for (index, kind), height in zip(ends, heights, strict=True):
        colour, line, word = styles[kind]
        axes.plot(lambdas, shares[:, index].tolist(), color=colour, linestyle=line, marker="o", markersize=3)
        # Labels beside the ends of the lines, moved apart where the lines meet.
        axes.annotate(
            f"#{index} {word}",
            (1.02, height),
            xycoords=axes.get_yaxis_transform(),
            fontsize=7.5,
            color=colour,
            va="center",
        )
    axes.axhline(0, color=style.FAINT, linewidth=0.8, zorder=0)


def _spread(heights: list[float], gap: float) -> list[float]:
    """The same heights moved apart to at least `gap`, order and centre kept."""
    order = sorted(range(len(heights)), key=lambda i: heights[i])
    placed = dict.fromkeys(order, 0.0)
    last = -math.inf
    for i in order:
        last = max(heights[i], last + gap)
        placed[i] = last
    shift = sum(placed[i] - heights[i] for i in order) / max(1, len(order))
    return [placed[i] - shift for i in range(len(heights))]

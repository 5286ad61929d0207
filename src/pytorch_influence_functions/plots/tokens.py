"""`scores.plot(q, tokens=...)`: texts whose tokens are coloured by what they do to the query."""

from __future__ import annotations

import math
import os
import textwrap
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeAlias

import torch
from torch import Tensor

from ..core.errors import InvalidInput, require
from ..problem.data import Source
from ..scores.scores import Scores
from . import style
from .examples import input_of, target_of

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
else:
    Axes = Figure = Any  # matplotlib is optional; annotations may be looked at when it is absent

Pieces: TypeAlias = Callable[[Any], Sequence[str]] | None

_SIZE = 8.0  # points; a letter of DejaVu Sans Mono is 0.602 of it wide
_LETTER, _LINE = 0.602 * _SIZE / 72, 1.55 * _SIZE / 72
_COLUMNS, _ROWS = 96, 4
_MARGIN, _SIDE, _GAP, _TITLE, _FOOT = 0.25, 1.25, 0.12, 0.34, 0.42
_DARKEST = 0.62
"""How much of the full colour the strongest token has: black letters stay legible on it."""
# What tokenizers write for a space and for a new line.
_SPELLED = str.maketrans({"Ġ": " ", "▁": " ", "Ċ": "↵", "\n": "↵", "\r": "", "\t": " "})
_CUT = "…"


@dataclass(frozen=True)
class _Text:
    """A text in pieces, each with its score (positive: helpful), and what stands beside it."""

    pieces: tuple[str, ...]
    values: tuple[float, ...]
    beside: tuple[str, ...]

    def lines(self) -> list[list[tuple[str, float]]]:
        """At most `_ROWS` lines: those around the strongest pieces, cut where the text goes on."""
        rows: list[list[tuple[str, float]]] = [[]]
        room = _COLUMNS
        for piece, value in zip(self.pieces, self.values, strict=True):
            for part in textwrap.wrap(piece, _COLUMNS, drop_whitespace=False, replace_whitespace=False) or [""]:
                if len(part) > room:
                    rows.append([])
                    room = _COLUMNS
                rows[-1].append((part, value))
                room -= len(part)
        weights = [sum(abs(v) for _, v in row) for row in rows]
        first = max(range(max(1, len(rows) - _ROWS + 1)), key=lambda i: (sum(weights[i : i + _ROWS]), -i))
        shown = rows[first : first + _ROWS]
        if first > 0:
            shown[0] = [(_CUT, 0.0), *shown[0]]
        if first + _ROWS < len(rows):
            shown[-1] = [*shown[-1], (_CUT, 0.0)]
        return shown


def plot_tokens(
    scores: Scores,
    q: int,
    k: int,
    train: Source,
    queries: Source,
    tokens: Mapping[int, Any],
    pieces: Pieces = None,
    path: str | os.PathLike[str] | None = None,
) -> Figure:
    """The query above its `k` most helpful and `k` most harmful training texts, every token coloured by its share.

    Blue tokens helped; vermillion, underlined ones harmed; the stronger the darker, on one scale for the picture. Long
    texts show the lines around their strongest tokens.

    Args:
        tokens: training index -> [queries, tokens], from `attribution.token_scores`.
        pieces: input -> its tokens as strings, as many as there are scores; by default a string's words or letters.

    Raises:
        InvalidInput: a text shown has no token scores, or not as many as it has pieces.
    """
    one = scores[q]
    at = int(one.query_ids[0])
    if not 0 <= at < len(queries):
        raise InvalidInput(f"The scores are of query {at} and queries= has {len(queries)} texts; pass theirs.")
    sign = 1.0 if scores.lower_is_better else -1.0
    found = [
        [_text(scores, train, i, score, tokens, at, sign, pieces) for i, score in side]
        for side in (scores.helpful(q, k), scores.harmful(q, k))
    ]
    asked = _spelled(queries.item(at), None, pieces, f"query {at}")
    label = one.query_labels[0] if one.query_labels is not None else target_of(queries.item(at))
    name = one.describe_query(0)
    with style.styled():
        figure = _drawn(_Text(asked, (0.0,) * len(asked), (_label(scores, label),)), found, name, sign)
        style.save(figure, path)
    return figure


def _text(
    scores: Scores,
    train: Source,
    index: int,
    score: float,
    tokens: Mapping[int, Any],
    at: int,
    sign: float,
    pieces: Pieces,
) -> _Text:
    if index not in tokens:
        raise InvalidInput(
            f"tokens= has nothing for training example {index}, which is shown; pass "
            "attribution.token_scores(queries, ids) with the ids of all shown."
        )
    values = torch.as_tensor(tokens[index]).detach().double().cpu()
    if values.ndim != 2 or not 0 <= at < len(values) or not bool(torch.isfinite(values).all()):
        raise InvalidInput(
            f"tokens[{index}] has shape {tuple(values.shape)} and query {at} is shown; expected finite numbers "
            "[queries, tokens], from attribution.token_scores(queries, ids)."
        )
    item = train.item(index)
    words = _spelled(item, values.shape[1], pieces, f"training example {index}")
    label = target_of(item) if scores.train_labels is None else scores.train_labels[index]
    named = "" if scores.train_names is None else str(scores.train_names[index])
    beside = (style.number(score), " ".join(w for w in (f"#{index}", _label(scores, label), named) if w))
    return _Text(words, tuple((sign * values[at]).tolist()), beside)


def _label(scores: Scores, label: Any) -> str:
    """A label in words; a text that is its own target has none worth writing."""
    many = label.numel() > 1 if isinstance(label, Tensor) else isinstance(label, (list, tuple))
    return "" if many else scores.label_name(label)


def _spelled(item: Any, count: int | None, pieces: Pieces, name: str) -> tuple[str, ...]:
    """The tokens of a text as strings, with spaces and line ends made visible where tokenizers spell them."""
    held = input_of(item)
    if pieces is not None:
        found = [str(p) for p in pieces(held)]
    elif isinstance(held, str):
        words = held.split()
        found = [w + " " for w in words] if count in (None, len(words)) else list(held)
    else:
        shape = f"a tensor of shape {tuple(held.shape)}" if isinstance(held, Tensor) else type(held).__name__
        raise InvalidInput(
            f"The input of {name} is {shape}; say with pieces= how it becomes a list of strings, one per token."
        )
    if count is not None and len(found) != count:
        raise InvalidInput(
            f"The text of {name} has {len(found)} pieces and {count} token scores; pieces= has to give one per token."
        )
    return tuple("".join(c if c.isprintable() else "·" for c in p.translate(_SPELLED)) for p in found)


# --------------------------------------------------------------------------- drawing


def _drawn(query: _Text, found: list[list[_Text]], name: str, sign: float) -> Figure:
    strongest = max((abs(v) for side in found for text in side for v in text.values), default=0.0) or 1.0
    wide = _COLUMNS * _LETTER + 0.2
    width = _MARGIN + _SIDE + wide + _MARGIN
    heights = [[_height(t) for t in side] for side in found]
    height = _TITLE + _height(query) + sum(_TITLE + sum(h) for h in heights) + _FOOT + 0.1
    figure = style.new_figure(width, height)
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set(xlim=(0, width), ylim=(height, 0))
    axes.axis("off")
    y = _TITLE
    _say(axes, _MARGIN, y - 0.1, name[:1].upper() + name[1:], fontsize=10.5, fontweight="bold")
    _card(axes, query, y, wide, strongest, style.INK)
    y += _height(query)
    for side, tall, title, colour in zip(
        found, heights, ("Most helpful", "Most harmful"), (style.HELPFUL, style.HARMFUL), strict=True
    ):
        y += _TITLE
        _say(axes, _MARGIN, y - 0.1, title, fontsize=10.5, fontweight="bold", color=colour)
        for text, h in zip(side, tall, strict=True):
            _card(axes, text, y, wide, strongest, colour)
            y += h
    measure = "loss" if sign > 0 else "measure"
    foot = (
        f"Numbers: predicted change of the query's {measure} when the text is removed and the model retrained.\n"
        f"Tokens: their share of it. Blue helped; vermillion, underlined, harmed; the darkest is {strongest:.2g}."
    )
    _say(axes, _MARGIN, height - 0.1, foot, fontsize=7, color=style.FAINT, va="bottom")
    return figure


def _height(text: _Text) -> float:
    return max(len(text.lines()) * _LINE + 0.16, 0.16 + 0.15 * len([b for b in text.beside if b])) + _GAP


def _say(axes: Axes, x: float, y: float, words: str, **options: Any) -> None:
    # parse_math=False: a dollar sign in the data is a dollar sign.
    axes.text(x, y, words, **{"va": "baseline", "parse_math": False, **options})


def _card(axes: Axes, text: _Text, y: float, wide: float, strongest: float, colour: str) -> None:
    patches = require("matplotlib.patches", "plot")
    left, tall = _MARGIN + _SIDE, _height(text) - _GAP
    for i, words in enumerate(b for b in text.beside if b):
        shade = style.INK if i == 0 else style.FAINT
        _say(axes, _MARGIN, y + 0.17 + 0.15 * i, style.shorten(words, 19), fontsize=9 if i == 0 else 8, color=shade)
    axes.add_patch(patches.Rectangle((left, y), wide, tall, facecolor=style.PAPER, edgecolor=colour, linewidth=0.9))
    for row, line in enumerate(text.lines()):
        x, top = left + 0.1, y + 0.08 + row * _LINE
        for piece, value in line:
            width = len(piece) * _LETTER
            if value:
                share = abs(value) / strongest
                hue = style.HELPFUL if value > 0 else style.HARMFUL
                patch = patches.Rectangle(
                    (x, top), width, _LINE * 0.94, facecolor=hue, alpha=_DARKEST * share, linewidth=0
                )
                axes.add_patch(patch)
                if value < 0 and share > 0.05:
                    foot = top + _LINE * 0.93
                    axes.plot([x + 0.01, x + width - 0.01], [foot, foot], color=hue, linewidth=0.9)
            if not math.isclose(width, 0) and piece.strip():
                _say(axes, x, top + _LINE * 0.70, piece, fontsize=_SIZE, family="DejaVu Sans Mono")
            x += width

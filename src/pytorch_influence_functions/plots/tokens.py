"""`scores.plot(q, tokens=...)`: texts whose tokens are coloured by their effect on the query."""

from __future__ import annotations

import math
import os
import textwrap
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, TypeAlias

import torch
from torch import Tensor

from ..core.errors import InvalidInput, require
from ..core.text import as_title, printable
from ..core.token_text import token_text_of
from ..influence.token_pairs import shown_token_scores
from ..problem.data import Source
from ..scores.scores import Scores
from . import style
from .examples import example_input, example_target

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
# The characters by which tokenizers write a space and a new line.
_VISIBLE = str.maketrans({"Ġ": " ", "▁": " ", "Ċ": "↵", "\n": "↵", "\r": "", "\t": " "})
_CUT = "…"


@dataclass(frozen=True)
class _TokenText:
    """A text in pieces, each with its score (positive: helpful), and the lines written beside it."""

    pieces: tuple[str, ...]
    values: tuple[float, ...]
    beside: tuple[str, ...]

    def lines(self) -> list[list[tuple[str, float]]]:
        """At most `_ROWS` lines around the strongest pieces, with ellipses where the text goes on."""
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
    tokens: Any,
    pieces: Pieces = None,
    path: str | os.PathLike[str] | None = None,
) -> Figure:
    """The query above its `k` most helpful and `k` most harmful training texts, every token coloured by its share.

    Blue tokens helped; vermillion, underlined ones harmed; the stronger the darker, on one scale for the picture. Long
    texts show the lines around their strongest tokens.

    Args:
        tokens: training index -> [queries, tokens], from `attribution.token_scores`; or the fitted method, which is
            asked about what is shown.
        pieces: input -> its tokens as strings, as many as there are scores; by default a string's words or letters.

    Raises:
        InvalidInput: a text shown has no token scores, or not as many as it has pieces.
    """
    query_scores = scores[q]
    query = int(query_scores.query_ids[0])
    if not 0 <= query < len(queries):
        raise InvalidInput(f"The scores are of query {query} and queries= has {len(queries)} texts; pass theirs.")
    sign = 1.0 if scores.lower_is_better else -1.0
    sides, row = (scores.helpful(q, k), scores.harmful(q, k)), query
    if not isinstance(tokens, Mapping):
        listed = [list(dict.fromkeys(i for side in sides for i, _ in side))]
        shares = shown_token_scores(tokens, replace(query_scores, query_source=queries), listed)[0]
        tokens, row = {i: share[None] for i, share in shares.items()}, 0
    texts = [[_scored_text(scores, train, i, score, tokens, row, sign, pieces) for i, score in side] for side in sides]
    known = token_text_of(queries.dataset, query) if pieces is None else None
    query_pieces = (
        _split_pieces(queries.item(query), None, pieces, f"query {query}") if known is None else readable(known.pieces)
    )
    query_labels = query_scores.query_labels
    label = query_labels[0] if query_labels is not None else example_target(queries.item(query))
    name = query_scores.describe_query(0)
    query_text = _TokenText(query_pieces, (0.0,) * len(query_pieces), (label_text(scores, label),))
    with style.plot_style():
        figure = _draw_texts(query_text, texts, name, sign)
        style.save_figure(figure, path)
    return figure


def _scored_text(
    scores: Scores,
    train: Source,
    index: int,
    score: float,
    tokens: Mapping[int, Any],
    query: int,
    sign: float,
    pieces: Pieces,
) -> _TokenText:
    if index not in tokens:
        raise InvalidInput(
            f"tokens= has nothing for training example {index}, which is shown; pass "
            "attribution.token_scores(queries, ids) with the ids of all shown."
        )
    values = torch.as_tensor(tokens[index]).detach().double().cpu()
    if values.ndim != 2 or not 0 <= query < len(values) or not bool(torch.isfinite(values).all()):
        raise InvalidInput(
            f"tokens[{index}] has shape {tuple(values.shape)} and query {query} is shown; expected finite numbers "
            "[queries, tokens], from attribution.token_scores(queries, ids)."
        )
    item = train.item(index)
    row: list[float] = (sign * values[query]).tolist()
    known = token_text_of(train.dataset, index) if pieces is None else None
    if known is not None:
        text_pieces, row = readable(known.pieces), known.by_piece(row)
    else:
        text_pieces = _split_pieces(item, values.shape[1], pieces, f"training example {index}")
    label = example_target(item) if scores.train_labels is None else scores.train_labels[index]
    name = "" if scores.train_names is None else str(scores.train_names[index])
    caption = " ".join(part for part in (f"#{index}", label_text(scores, label), name) if part)
    return _TokenText(text_pieces, tuple(row), (style.format_signed(score), caption))


def label_text(scores: Scores, label: Any) -> str:
    """The name of a label; empty for a text that is its own target."""
    many = label.numel() > 1 if isinstance(label, Tensor) else isinstance(label, (list, tuple))
    return "" if many else scores.label_name(label)


def _split_pieces(item: Any, count: int | None, pieces: Pieces, name: str) -> tuple[str, ...]:
    """The tokens of a text as strings, in which a tokenizer's signs for spaces and line ends are made readable."""
    inputs = example_input(item)
    if pieces is not None:
        tokens = [str(p) for p in pieces(inputs)]
    elif isinstance(inputs, str):
        words = inputs.split()
        tokens = [w + " " for w in words] if count in (None, len(words)) else list(inputs)
    else:
        shape = f"a tensor of shape {tuple(inputs.shape)}" if isinstance(inputs, Tensor) else type(inputs).__name__
        raise InvalidInput(
            f"The input of {name} is {shape}; say with pieces= how it becomes a list of strings, one per token."
        )
    if count is not None and len(tokens) != count:
        raise InvalidInput(
            f"The text of {name} has {len(tokens)} pieces and {count} token scores; pieces= has to give one per token."
        )
    return readable(tokens)


def readable(pieces: Sequence[str]) -> tuple[str, ...]:
    """Pieces of a text with a tokenizer's signs for spaces and line ends made readable."""
    return tuple("".join(c if c.isprintable() else "·" for c in p.translate(_VISIBLE)) for p in pieces)


# --------------------------------------------------------------------------- drawing


def _draw_texts(query: _TokenText, texts: list[list[_TokenText]], name: str, sign: float) -> Figure:
    strongest = max((abs(v) for side in texts for text in side for v in text.values), default=0.0) or 1.0
    card_width = _COLUMNS * _LETTER + 0.2
    width = _MARGIN + _SIDE + card_width + _MARGIN
    heights = [[_height(t) for t in side] for side in texts]
    height = _TITLE + _height(query) + sum(_TITLE + sum(h) for h in heights) + _FOOT + 0.1
    figure = style.new_figure(width, height)
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set(xlim=(0, width), ylim=(height, 0))
    axes.axis("off")
    y = _TITLE
    _write(axes, _MARGIN, y - 0.1, as_title(name), fontsize=10.5, fontweight="bold")
    _draw_card(axes, query, y, card_width, strongest, style.INK)
    y += _height(query)
    for side, side_heights, title, colour in zip(
        texts, heights, ("Most helpful", "Most harmful"), (style.HELPFUL, style.HARMFUL), strict=True
    ):
        y += _TITLE
        _write(axes, _MARGIN, y - 0.1, title, fontsize=10.5, fontweight="bold", color=colour)
        for text, h in zip(side, side_heights, strict=True):
            _draw_card(axes, text, y, card_width, strongest, colour)
            y += h
    measure = "loss" if sign > 0 else "measure"
    foot = (
        f"Numbers: predicted change of the query's {measure} when the text is removed and the model retrained.\n"
        f"Tokens: their share of it. Blue helped; vermillion, underlined, harmed; the darkest is {strongest:.2g}."
    )
    _write(axes, _MARGIN, height - 0.1, foot, fontsize=7, color=style.FAINT, va="bottom")
    return figure


def _height(text: _TokenText) -> float:
    return max(len(text.lines()) * _LINE + 0.16, 0.16 + 0.15 * len([b for b in text.beside if b])) + _GAP


def _write(axes: Axes, x: float, y: float, text: str, **options: Any) -> None:
    # parse_math=False: a dollar sign in the data is a dollar sign.
    axes.text(x, y, printable(text), **{"va": "baseline", "parse_math": False, **options})


def _draw_card(axes: Axes, text: _TokenText, y: float, card_width: float, strongest: float, colour: str) -> None:
    patches = require("matplotlib.patches", "plot")
    left, card_height = _MARGIN + _SIDE, _height(text) - _GAP
    for i, caption in enumerate(b for b in text.beside if b):
        shade = style.INK if i == 0 else style.FAINT
        _write(axes, _MARGIN, y + 0.17 + 0.15 * i, style.shorten(caption, 19), fontsize=9 if i == 0 else 8, color=shade)
    axes.add_patch(
        patches.Rectangle((left, y), card_width, card_height, facecolor=style.PAPER, edgecolor=colour, linewidth=0.9)
    )
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
                _write(axes, x, top + _LINE * 0.70, piece, fontsize=_SIZE, family="DejaVu Sans Mono")
            x += width

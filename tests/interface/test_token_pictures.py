"""Texts with coloured tokens: what is coloured how, what is cut, and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from matplotlib.colors import to_hex
from matplotlib.patches import Rectangle

from pytorch_influence_functions.core.errors import InvalidInput
from pytorch_influence_functions.plots import style
from pytorch_influence_functions.plots.tokens import _COLUMNS, _ROWS, _TokenText
from pytorch_influence_functions.scores.scores import Scores

WORDS = ["to be or not", "a $1$ b <i>", "one two three", "x y z"]
VALUES = {i: torch.tensor([[0.0] * n, [0.5] + [-0.25] * (n - 1)]) for i, n in enumerate((4, 4, 3, 3))}


def made(**options: Any) -> Scores:
    data = [(text, i % 2) for i, text in enumerate(WORDS)]
    given: dict[str, Any] = {"train_source": data, "query_source": data[:2], "class_names": ["no", "yes"]}
    return Scores(torch.tensor([[0.1, 0.2, 0.3, 0.4], [0.4, 0.3, -0.2, -0.1]]), **(given | options))


def drawn(figure: Any) -> tuple[list[str], list[tuple[str, float, float]]]:
    """What is written, and (colour, strength, width) of every coloured token."""
    axes = figure.axes[0]
    coloured = [
        (to_hex(p.get_facecolor()).upper(), round(p.get_alpha(), 3), p.get_width())
        for p in axes.patches
        if isinstance(p, Rectangle) and p.get_alpha() is not None
    ]
    return [t.get_text() for t in axes.texts], coloured


def test_tokens_have_the_colour_of_their_sign_and_the_strength_of_their_share(tmp_path: Path) -> None:
    figure = made().plot(1, 1, tokens=VALUES, path=tmp_path / "t.png")
    words, coloured = drawn(figure)
    assert [c[0] for c in coloured] == [style.HELPFUL, *[style.HARMFUL] * 3, style.HELPFUL, *[style.HARMFUL] * 2]
    assert coloured[0][1] == pytest.approx(2 * coloured[1][1], abs=2e-3)
    assert words[:3] == ["Query 1", "yes", "a "] and "Most helpful" in words and "#0 no" in words and "+0.400" in words
    assert "$1$ " in words and words.index("#0 no") < words.index("Most harmful") < words.index("#2 no")
    assert len(figure.axes[0].lines) == 5  # each harmful token is underlined, for who sees no colours
    assert (tmp_path / "t.png").stat().st_size > 5_000


def test_a_larger_measure_is_better_turns_the_colours() -> None:
    _, coloured = drawn(made(lower_is_better=False).plot(1, 1, tokens=VALUES))
    assert [c[0] for c in coloured[:2]] == [style.HARMFUL, style.HELPFUL]


def test_token_ids_are_spelled_by_pieces_and_their_own_targets_are_no_labels() -> None:
    ids = torch.arange(12).reshape(4, 3) % 5
    s = Scores(torch.ones(1, 4) * torch.arange(4), train_source=(ids, ids), query_source=(ids[:1], ids[:1]))
    tokens = {i: torch.ones(1, 3) for i in range(4)}
    words, _ = drawn(s.plot(0, 1, tokens=tokens, pieces=lambda held: [f"Ġ<{c}>" for c in held.tolist()]))
    assert " <0>" in words and not any("[" in w for w in words)
    with pytest.raises(InvalidInput, match="say with pieces= how it becomes a list of strings"):
        s.plot(0, 1, tokens=tokens)


def test_long_texts_show_the_lines_around_their_strongest_tokens() -> None:
    pieces = tuple(f"word{i:04} " for i in range(400))
    values = tuple(1.0 if i == 300 else 0.0 for i in range(400))
    lines = _TokenText(pieces, values, ()).lines()
    shown = [piece for line in lines for piece, _ in line]
    assert len(lines) == _ROWS and "word0300 " in shown and shown[0] == "…" and "word0000 " not in shown
    assert all(sum(len(p) for p, _ in line) <= _COLUMNS + 2 for line in lines)
    assert sum(v for line in lines for _, v in line) == 1.0
    endless = _TokenText(("x" * 1000,), (1.0,), ()).lines()
    assert len(endless) == _ROWS and all(len(piece) <= _COLUMNS for line in endless for piece, _ in line)


@pytest.mark.parametrize(
    ("tokens", "words"),
    [
        ({0: VALUES[0]}, "nothing for training example 2, which is shown"),
        (VALUES | {0: torch.ones(2, 9)}, "has 12 pieces and 9 token scores"),
        (VALUES | {0: torch.full((2, 4), float("nan"))}, "expected finite numbers"),
        (VALUES | {0: torch.ones(4)}, "expected finite numbers"),
    ],
)
def test_what_does_not_fit_is_refused_in_one_sentence(tokens: Any, words: str) -> None:
    with pytest.raises(InvalidInput, match=words):
        made().plot(1, 1, tokens=tokens)


def test_a_fitted_method_is_asked_about_what_a_picture_shows() -> None:
    import pytorch_influence_functions as ptif
    from tests.laws.test_token_scores import setting

    problem, queries = setting()
    attribution = ptif.methods.grad_dot().fit(problem)
    scores = attribution.score(queries)
    options: dict[str, Any] = {"pieces": lambda ids: [f"{i} " for i in ids.tolist()]}
    asked = drawn(scores.plot(1, 2, tokens=attribution, **options))
    assert asked == drawn(scores.plot(1, 2, tokens=attribution.token_scores(queries, range(9)), **options))
    assert asked[1]
    with pytest.raises(InvalidInput, match="tokens= is Tensor; pass the fitted method"):
        scores.plot(1, 2, tokens=torch.zeros(3), **options)

"""Texts token by token: what is taught, whose turn it is, and how strongly every token is coloured."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, final

import torch
from jaxtyping import Int
from torch import Tensor

from ..core.errors import InvalidInput, NonFinite
from ..core.text import printable
from ..core.token_text import TokenText
from ..influence.token_pairs import query_token_scores, shown_token_scores
from ..problem.data import Source
from ..scores.scores import Scores
from .ranking import four_digits, score_row

LETTERS = 10
"""A text of tokens may be so many times as long as other texts of the same detail: the page shows it cut."""
_SOURCES = 12  # of which the sums are shown
_STEPS = 99  # a colour is a whole number up to this


@final
@dataclass(frozen=True, eq=False)
class TokenColours:
    """How strongly tokens are coloured; positive helps. Empty where no token scores were given.

    Args:
        documents: training index -> {query row: whole number per token, 99 at that query's strongest token}.
        queries: query row -> {training index, or -1 for all that help most together: whole number per token}.
        strongest: query row -> the score of a training token with the number 99.
    """

    documents: Mapping[int, Mapping[int, list[int]]] = field(default_factory=dict)
    queries: Mapping[int, Mapping[int, list[int]]] = field(default_factory=dict)
    strongest: Mapping[int, float] = field(default_factory=dict)

    @staticmethod
    def of(scores: Scores, tokens: Any, shown: Sequence[Mapping[str, Any]]) -> TokenColours:
        """The colours of the examples that each query shows.

        Args:
            scores: the scores of the page.
            tokens: a fitted method, which is asked about them; or index -> [queries, tokens], from `token_scores`.
            shown: per query its lists `help` and `harm` of (index, score).

        Raises:
            InvalidInput: token scores that are no numbers [queries, tokens], or no queries to ask about.
        """
        if tokens is None:
            return TokenColours()
        listed = [[int(i) for side in ("help", "harm") for i, _ in entry[side]] for entry in shown]
        ids = sorted({i for some in listed for i in some})
        sign = 1.0 if scores.lower_is_better else -1.0
        explained: list[Tensor] = []
        if isinstance(tokens, Mapping):
            given = {i: sign * _checked(tokens, i, len(scores)) for i in ids if i in tokens}
            values = [{i: given[i][q] for i in some if i in given} for q, some in enumerate(listed)]
        else:
            values, explained = _ask(tokens, scores, listed, sign)
        documents: dict[int, dict[int, list[int]]] = {}
        strongest = {}
        for q, rows in enumerate(values):
            largest = max((float(row.abs().max()) for row in rows.values() if row.numel()), default=0.0)
            strongest[q] = four_digits(largest)
            for i, row in rows.items():
                documents.setdefault(i, {})[q] = _steps(row, largest)
        queries = {
            q: {-1: _own_steps(rows[: len(shown[q]["help"])].sum(0))}
            | {i: _own_steps(row) for i, row in zip(listed[q], rows, strict=True)}
            for q, rows in enumerate(explained)
            if len(rows)
        }
        return TokenColours(documents, queries, strongest)

    def of_document(self, index: int) -> dict[str, Any]:
        """`v`: query row -> a number per token, of a training example."""
        colours = self.documents.get(index)
        return {} if colours is None else {"v": colours}

    def of_query(self, q: int) -> dict[str, Any]:
        """`v`: training index -> a number per token, of a query; `x`: the score of the strongest training token."""
        record: dict[str, Any] = {"v": self.queries[q]} if q in self.queries else {}
        return record | ({"x": self.strongest[q]} if self.strongest.get(q) else {})


@final
@dataclass(frozen=True, eq=False)
class Sources:
    """Where the training examples come from.

    Args:
        names: of the sources, the largest first.
        numbers: [N], each training example's source.
    """

    names: list[str]
    numbers: Int[Tensor, " N"]

    @staticmethod
    def of(scores: Scores, train: Source | None, given: Sequence[Any] | None) -> Sources | None:
        """The sources that were given, else those that the training data know; None where nobody does.

        Raises:
            InvalidInput: another number of sources than of training examples.
        """
        known: Any = given
        if given is None:
            own = getattr(None if train is None else train.dataset, "sources", None)
            known = own if isinstance(own, tuple) else None
        if known is None:
            return None
        words = [printable(str(name))[:80] for name in known]
        if len(words) != scores.n_train:
            raise InvalidInput(
                f"sources= names {len(words):,} and there are {scores.n_train:,} training examples; give one each."
            )
        counts = Counter(words)
        names = sorted(counts, key=lambda name: (-counts[name], name))
        number = {name: at for at, name in enumerate(names)}
        return Sources(names, torch.tensor([number[word] for word in words]))

    def table(self) -> dict[str, Any]:
        """`names` and `counts` of the sources."""
        return {"names": self.names, "counts": torch.bincount(self.numbers, minlength=len(self.names)).tolist()}

    def sums(self, scores: Scores, q: int) -> list[tuple[int, float]]:
        """The sources whose examples together move a query most: (source, sum of the scores that are held)."""
        values, index = score_row(scores, q)
        total = torch.zeros(len(self.names), dtype=torch.float64)
        total.index_add_(0, self.numbers[index], values.double())
        order = total.abs().argsort(descending=True, stable=True)[:_SOURCES].tolist()
        return [(i, four_digits(float(total[i]))) for i in order]


def token_record(text: TokenText, colours: Mapping[str, Any], letters: int) -> dict[str, Any]:
    """The tokens of a text for the page: `p` pieces, `g` the runs that are taught, `r` turns, `v` colours.

    A text of more letters keeps the part around its strongest tokens, else its beginning; `m` are the tokens left out
    before and behind it.
    """
    rows = {key: text.by_piece(row) for key, row in colours.get("v", {}).items()}
    count = len(text.pieces)
    first, last = _kept(text, list(rows.values()), letters)
    taught = text.taught[first:last]
    edges = [at for at in range(len(taught) + 1) if (at < len(taught) and taught[at]) != (at > 0 and taught[at - 1])]
    turns = [(place - first, role) for place, role in text.turns if first <= place < last]
    before = [role for place, role in text.turns if place < first]
    if before and not (turns and turns[0][0] == 0):
        turns = [(0, before[-1]), *turns]
    record: dict[str, Any] = {
        "p": [printable(piece) for piece in text.pieces[first:last]],
        "g": [edges[at : at + 2] for at in range(0, len(edges), 2)],
        "r": [[place, printable(role)[:40]] for place, role in turns],
        "cut": [first, count - last],
    }
    return record | ({"v": {str(key): row[first:last] for key, row in rows.items()}} if rows else {})


def _kept(text: TokenText, rows: Sequence[Sequence[int]], letters: int) -> tuple[int, int]:
    """From where to where a text is kept: all of it, or so many letters around what is strongest."""
    ends = torch.tensor([0, *map(len, text.pieces)]).cumsum(0)
    count = len(text.pieces)
    if int(ends[-1]) <= letters:
        return 0, count
    weight = torch.tensor(rows).abs().sum(0) if rows else torch.zeros(count, dtype=torch.long)
    total = torch.cat([torch.zeros(1, dtype=torch.long), weight.cumsum(0)])
    last = torch.searchsorted(ends, ends[:-1] + letters, right=True) - 1
    first = int((total[last] - total[:-1]).argmax())
    return first, max(first + 1, int(last[first]))


def _steps(row: Tensor, largest: float) -> list[int]:
    steps: list[int] = (row * (_STEPS / largest) if largest > 0 else row * 0).round().long().tolist()
    return steps


def _own_steps(row: Tensor) -> list[int]:
    return _steps(row, float(row.abs().max()) if row.numel() else 0.0)


def _ask(
    tokens: Any, scores: Scores, listed: list[list[int]], sign: float
) -> tuple[list[dict[int, Tensor]], list[Tensor]]:
    """Token scores of the texts that each query lists, and of the queries for these, from a fitted method."""
    values = shown_token_scores(tokens, scores, listed)
    if not any(listed):
        return values, []
    # Of a pair the page shows the first answer.
    queries = scores.query_source.subset(scores.query_ids.tolist())
    explained = query_token_scores(tokens, queries, listed)
    return [{i: sign * row for i, row in own.items()} for own in values], [sign * row for row in explained]


def _checked(tokens: Mapping[int, Any], index: int, queries: int) -> Tensor:
    values = torch.as_tensor(tokens[index]).detach().double().cpu()
    if values.ndim != 2 or len(values) != queries:
        raise InvalidInput(
            f"tokens[{index}] has shape {tuple(values.shape)} and the scores are of {queries} queries; expected "
            "[queries, tokens], from attribution.token_scores(queries, ids)."
        )
    if not bool(torch.isfinite(values).all()):
        raise NonFinite(f"tokens[{index}] holds NaN or infinity; look for a broken text or weight.")
    return values

"""The tokens of all training texts that carry most of a score."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, final

import torch
from jaxtyping import Float, Int
from torch import Tensor

from ..core.errors import require
from ..core.token_text import token_text_of
from ..core.validate import whole_number

# How many tokens stand on either side of a token where it is shown.
_AROUND = 4


@final
@dataclass(frozen=True)
class ScoredToken:
    """One token of one training text.

    Args:
        index: of the text in the training dataset.
        position: of the token in the text, as `Attribution.token_scores` counts; padding of a batch does not count.
        score: the token's share of the text's score.
        token: the token as text, or its number where the dataset does not know its texts.
        context: the token among its neighbours, between « and ».
    """

    index: int
    position: int
    score: float
    token: str
    context: str


@final
@dataclass(frozen=True, eq=False, repr=False)
class TopTokens:
    """The k most helpful and k most harmful tokens of all training texts, for every query.

    Args:
        values: scores [Q, m], in the units of `Scores`; m is 2 k, or the number of tokens where that is less.
        indices: of the text of each.
        positions: of each token in its text.
        k: how many of either side were kept.
        lower_is_better: of the measure.
        query_names: what queries are called.
        train_source: the training texts, to show them.
    """

    values: Float[Tensor, "q m"]
    indices: Int[Tensor, "q m"]
    positions: Int[Tensor, "q m"]
    k: int
    lower_is_better: bool = True
    query_names: Sequence[str] | None = None
    train_source: Any = None

    def __len__(self) -> int:
        return len(self.values)

    def helpful(self, q: int = 0, k: int = 10) -> list[ScoredToken]:
        """The tokens that help query `q` most, most helpful first.

        Args:
            q: which query.
            k: how many, at most as many as were kept of a side.

        Raises:
            InvalidInput: no such query, or `k` below 1.
        """
        return self._tokens(q, min(whole_number("k", k, 1), self.k), self.lower_is_better)

    def harmful(self, q: int = 0, k: int = 10) -> list[ScoredToken]:
        """The tokens that harm query `q` most, most harmful first.

        Args:
            q: which query.
            k: how many, at most as many as were kept of a side.
        """
        return self._tokens(q, min(whole_number("k", k, 1), self.k), not self.lower_is_better)

    def to_frame(self) -> Any:
        """A pandas table with a row for each token: query, index, position, score, token, context.

        Needs pandas (`pip install 'pytorch-influence-functions[frame]'`).
        """
        pandas = require("pandas", "frame")
        every, first = self.values.shape[1], self.lower_is_better
        rows = [{"query": q, **vars(token)} for q in range(len(self)) for token in self._tokens(q, every, first)]
        return pandas.DataFrame(rows, columns=["query", *ScoredToken.__annotations__])

    def __str__(self) -> str:
        lines = []
        for q in range(len(self)):
            name = f"query {q}" if self.query_names is None else _on_one_line(self.query_names[q])
            for side, tokens in (("helpful", self.helpful(q, 5)), ("harmful", self.harmful(q, 5))):
                lines.append(f"{name}: most {side} tokens")
                lines += [f"  {t.score:+10.3g}  text {t.index}, {t.position}: {t.context}" for t in tokens]
        return "\n".join(lines)

    __repr__ = __str__

    def _tokens(self, q: int, k: int, descending: bool) -> list[ScoredToken]:
        q = whole_number("q", q, -len(self), len(self) - 1, hint="queries are counted from 0")
        order = torch.argsort(self.values[q], descending=descending, stable=True)[:k]
        return [self._token(q, int(column)) for column in order]

    def _token(self, q: int, column: int) -> ScoredToken:
        index, position = int(self.indices[q, column]), int(self.positions[q, column])
        token, context = self._shown(index, position)
        return ScoredToken(index, position, float(self.values[q, column]), token, context)

    def _shown(self, index: int, position: int) -> tuple[str, str]:
        """The token as text, and among its neighbours; its number and nothing else where texts are not known."""
        dataset = getattr(self.train_source, "dataset", self.train_source)
        text = None if dataset is None else token_text_of(dataset, index)
        if text is not None:
            pieces, place = list(text.pieces), position + text.start
        else:
            pieces, place = _numbers(dataset, index), position
        if not 0 <= place < len(pieces):
            return "", ""
        before, after = pieces[max(0, place - _AROUND) : place], pieces[place + 1 : place + 1 + _AROUND]
        between = "" if text is not None else " "
        bare = pieces[place].lstrip()
        space = pieces[place][: len(pieces[place]) - len(bare)]
        marked = between.join([*before, f"{space}«{bare}»", *after])
        return pieces[place], _on_one_line(marked)


def _on_one_line(text: str) -> str:
    """A dot for line ends and other characters that do not print."""
    return "".join(c if c.isprintable() else "·" for c in text)


def _numbers(dataset: Any, index: int) -> list[str]:
    """The token numbers of a text without a tokenizer, where its item is a mapping that holds them."""
    item = None if dataset is None else dataset[index]
    numbers = item.get("input_ids") if isinstance(item, Mapping) else None
    return [] if numbers is None else [str(n) for n in torch.as_tensor(numbers).flatten().tolist()]

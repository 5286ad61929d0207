"""A text as its tokens, ready to be shown: what a dataset of texts says of each of its examples."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from torch.utils.data import Subset

_Number = TypeVar("_Number", int, float)


@dataclass(frozen=True)
class TokenText:
    """One text in pieces. A dataset whose method `token_text(index)` returns it is shown token by token.

    Args:
        pieces: the tokens as strings; put together they are the text.
        taught: which of them are predicted, so that their loss counts; the others are context.
        turns: where each turn of a chat begins: (piece, role).
        start: the piece that the first token score belongs to; a decoder's own text stands behind the one it reads.
            Below 0: so many token scores come before the first piece, those of padding.
    """

    pieces: tuple[str, ...]
    taught: tuple[bool, ...]
    turns: tuple[tuple[int, str], ...] = ()
    start: int = 0

    @property
    def text(self) -> str:
        """The whole text."""
        return "".join(self.pieces)

    def by_piece(self, values: Sequence[_Number]) -> list[_Number | int]:
        """One number for every piece, from one for every token that was scored; 0 where there is none.

        >>> TokenText(("a", "b"), (True, True), start=-1).by_piece([0.0, 2.0])
        [2.0, 0]

        Args:
            values: token scores, as many as the padded text has tokens.
        """
        placed = [0] * self.start + list(values[max(0, -self.start) :])
        return (placed + [0] * len(self.pieces))[: len(self.pieces)]


def split_into_pieces(tokenizer: Any, ids: list[int]) -> tuple[str, ...]:
    """The tokens of a text as strings that make up the text when put together.

    A letter of several tokens stands at the last of them, and the others are empty.

    Args:
        tokenizer: what `decode`s token numbers, as those of transformers do.
        ids: the token numbers.
    """

    def decode(some: list[int]) -> str:
        return str(tokenizer.decode(some, clean_up_tokenization_spaces=False))

    whole = decode(ids)
    alone = [decode([token]) for token in ids]
    if "".join(alone) == whole:
        return tuple(alone)
    pieces: list[str] = []
    first, read = 0, 0  # from the token before the last piece up to where pieces are written
    for end in range(1, len(ids) + 1):
        before, after = decode(ids[first:read]), decode(ids[first:end])
        unfinished = after.endswith("\ufffd") and end < len(ids)
        pieces.append("" if unfinished else after[len(before) :])
        first, read = (first, read) if unfinished else (read, end)
    return tuple(pieces)


def token_text_of(dataset: Any, index: int) -> TokenText | None:
    """An example as tokens, where its dataset knows them, or the one that it is a subset of; else None.

    Args:
        dataset: any dataset.
        index: which example.
    """
    index, dataset = _inside(index, dataset)
    known = getattr(dataset, "token_text", None)
    return known(index) if callable(known) and 0 <= index < len(dataset) else None


def text_name_of(source: Any, index: int) -> str | None:
    """What to call an example in a list: the beginning of its text, where its dataset has `name` beside `token_text`.

    Args:
        source: a dataset, what holds it as `dataset`, or None.
        index: which example.
    """
    if source is None:
        return None
    index, dataset = _inside(index, getattr(source, "dataset", source))
    known = getattr(dataset, "name", None) if hasattr(dataset, "token_text") else None
    return str(known(index)) if callable(known) and 0 <= index < len(dataset) else None


def _inside(index: int, dataset: Any) -> tuple[int, Any]:
    """The example and the dataset that a subset, perhaps of a subset, takes it from."""
    while type(dataset) is Subset:
        index, dataset = int(dataset.indices[index]), dataset.dataset
    return index, dataset

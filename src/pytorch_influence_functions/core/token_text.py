"""A text as its tokens, ready to be shown: what a dataset of texts says of each of its examples."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch.utils.data import Subset


@dataclass(frozen=True)
class TokenText:
    """One text in pieces. A dataset whose method `token_text(index)` returns it is shown token by token.

    Args:
        pieces: the tokens as strings; put together they are the text.
        taught: which of them are predicted, so that their loss counts; the others are context.
        turns: where each turn of a chat begins: (piece, role).
        start: the piece that the first token score belongs to; a decoder's own text stands behind the one it reads.
    """

    pieces: tuple[str, ...]
    taught: tuple[bool, ...]
    turns: tuple[tuple[int, str], ...] = ()
    start: int = 0

    @property
    def text(self) -> str:
        """The whole text."""
        return "".join(self.pieces)


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
    while type(dataset) is Subset:
        index, dataset = dataset.indices[index], dataset.dataset
    known = getattr(dataset, "token_text", None)
    return known(index) if callable(known) and 0 <= index < len(dataset) else None

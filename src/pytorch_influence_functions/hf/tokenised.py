"""Examples that a Trainer was given as token numbers, shown as the texts that these stand for."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..core.token_text import TokenText, split_into_pieces
from ..problem.random_state import same_rng
from .encoding import IGNORED, begin_of

IDS = "input_ids"


@dataclass(frozen=True, eq=False)
class TokenisedRows:
    """The examples of a dataset as they are, with the text of each.

    Args:
        rows: the dataset, whose examples hold `input_ids`.
        tokenizer: turns token numbers into text.
        collate: the Trainer's collate function, which says which tokens are taught.
        shift: whether a token is predicted at the one before it; None where labels are no tokens.
        encode_queries: makes such examples of what is asked in texts (with True, refusing texts without a label); None:
            texts are asked otherwise.
        classes: what labels are called, in their order; None: as the dataset says.
    """

    rows: Any
    tokenizer: Any
    collate: Callable[[list[Any]], Any]
    shift: bool | None
    encode_queries: Callable[[Any, bool], list[dict[str, Any]]] | None = None
    classes: tuple[str, ...] | None = None

    @staticmethod
    def of(rows: Any, tokenizer: Any, collate: Callable[[list[Any]], Any], shift: bool | None) -> Any:
        """The examples with their texts, where they hold token numbers and there is a tokenizer; else as they are."""
        if tokenizer is None or not callable(getattr(tokenizer, "decode", None)) or len(rows) == 0:
            return rows
        if IDS in (getattr(rows, "column_names", None) or ()):
            return TokenisedRows(rows, tokenizer, collate, shift)
        first = None if hasattr(rows, "column_names") else rows[0]
        return TokenisedRows(rows, tokenizer, collate, shift) if isinstance(first, Mapping) and IDS in first else rows

    @property
    def features(self) -> Any:
        """What the dataset says of its columns, such as the names of classes."""
        return getattr(self.rows, "features", None)

    @property
    def columns(self) -> list[str] | None:
        """The names of its columns; None where only the rows say them."""
        names = getattr(self.rows, "column_names", None)
        return None if names is None else list(names)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Any:
        return self.rows[index]

    def __getitems__(self, ids: list[int]) -> list[Any]:
        together = getattr(self.rows, "__getitems__", None)
        return list(together(ids)) if callable(together) else [self.rows[i] for i in ids]

    def text(self, index: int) -> str:
        """An example as the tokenizer writes its tokens.

        Args:
            index: which example.
        """
        return str(self.tokenizer.decode(_numbers(self.rows[index][IDS])))

    def name(self, index: int) -> str:
        """The beginning of an example's text, for lists and titles.

        Args:
            index: which example.
        """
        return begin_of(self.tokenizer, _numbers(self.rows[index][IDS]))

    def token_text(self, index: int) -> TokenText:
        """An example as the report page shows it, without padding; taught is what its collate function leaves labels.

        Args:
            index: which example.
        """
        with same_rng():
            batch = self.collate([self.rows[index]])
        own, read = _numbers(self.rows[index][IDS]), _first_row(batch, IDS)
        labels, mask = _first_row(batch, "labels"), _first_row(batch, "attention_mask")
        read = own if read is None else read
        seen = range(len(read)) if mask is None or len(mask) != len(read) else [t for t, m in enumerate(mask) if m]
        shown = slice(seen[0], seen[-1] + 1) if seen else slice(0, 0)
        # What a collate function hides (filling in blanks) is read in the example itself.
        ids = own if len(own) == shown.stop - shown.start else (own if len(own) == len(read) else read)[shown]
        pieces = split_into_pieces(self.tokenizer, ids)
        if self.shift is None or labels is None:
            return TokenText(pieces, (True,) * len(pieces), start=-shown.start)
        if len(labels) != len(read) or "decoder_input_ids" in batch:
            return self._with_answer(pieces, [label for label in labels if label != IGNORED])
        taught = [label != IGNORED and not (self.shift and at == 0) for at, label in enumerate(labels[shown])]
        return TokenText(pieces, tuple(taught), start=-shown.start)

    def _with_answer(self, read: tuple[str, ...], answer: list[int]) -> TokenText:
        """What an encoder-decoder writes, behind what it reads."""
        written = split_into_pieces(self.tokenizer, answer)
        taught = (*(False for _ in read), *(True for _ in written))
        return TokenText((*read, *written), taught, ((0, "reads"), (len(read), "writes")), len(read))


def _first_row(batch: Any, key: str) -> list[int] | None:
    values = batch.get(key) if isinstance(batch, Mapping) else None
    if not isinstance(values, Tensor) or values.dim() != 2 or len(values) != 1:
        return None
    row: list[int] = values[0].tolist()
    return row


def _numbers(values: Any) -> list[int]:
    numbers: list[int] = torch.as_tensor(values).reshape(-1).tolist()
    return numbers

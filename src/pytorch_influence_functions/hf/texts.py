"""Texts as a dataset: token numbers by index, in dataset order, with the words they came from."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Final, TypeAlias

import torch
from jaxtyping import Int
from torch import Tensor, nn

from ..core.errors import InvalidInput, TrainingDataWarning, name_ids
from ..core.token_text import TokenText, split_into_pieces
from ..core.validate import whole_number
from ..core.warn import warn_caller
from .chats import is_chat, naming, read_chat
from .columns import Columns, read_cell
from .encoding import IGNORED, Encoded, begin_of, encode_chat, encode_chat_pair, encode_pair, encode_text, find_turns
from .models import base_model, is_seq2seq, token_shift

Item: TypeAlias = dict[str, Tensor]

# Tokenizers say "no limit" by a number like 1e30.
_NO_LIMIT: Final = 10**7


@dataclass(frozen=True, eq=False)
class Texts:
    """Encoded texts; item i is `{"input_ids": [T], "labels": [T]}`, with `IGNORED` where a token is not taught.

    Args:
        encoded: one per text.
        tokenizer: the tokenizer.
        targets: for a decoder that reads another text than it writes: what it writes, one per text; None for others.
        kinds: where each text comes from, in words; None where that is not known.
        limit: the most tokens of a text.
        shift: whether a token is predicted at the one before it, so that the first is not predicted.
        encode: what makes texts of other rows in the same way, for queries.
        columns: the columns that they were read from.
        ends: whether they end with the token that ends a text, as `problem(add_eos=)` says it.
    """

    encoded: tuple[Encoded, ...]
    tokenizer: Any
    targets: tuple[Encoded, ...] | None = None
    kinds: tuple[str, ...] | None = None
    limit: int | None = None
    shift: bool = True
    encode: Callable[[Any], Texts] | None = None
    columns: Columns | None = None
    ends: bool | None = None

    def __len__(self) -> int:
        return len(self.encoded)

    def __getitem__(self, index: int) -> Item:
        labels = (self.encoded if self.targets is None else self.targets)[index].labels
        return {"input_ids": torch.tensor(self.encoded[index].ids), "labels": torch.tensor(labels)}

    def text(self, index: int) -> str:
        """A text as the tokenizer writes its tokens.

        Args:
            index: which text.
        """
        return str(self.tokenizer.decode(list(self.encoded[index].ids)))

    def pieces(self, index: int) -> list[str]:
        """The tokens of a text as strings, which make up the text when put together.

        Args:
            index: which text.
        """
        return list(split_into_pieces(self.tokenizer, list(self.encoded[index].ids)))

    def token_text(self, index: int) -> TokenText:
        """A text as the report page shows it: its pieces, which of them are taught, and the turns of a chat.

        Of a decoder that reads another text than it writes, what it writes stands behind what it reads.

        Args:
            index: which text.
        """
        row = self.encoded[index]
        pieces = split_into_pieces(self.tokenizer, list(row.ids))
        if self.targets is None:
            taught = tuple(teach and (place > 0 or not self.shift) for place, teach in enumerate(row.taught))
            return TokenText(pieces, taught, find_turns(self.tokenizer, row))
        written = self.targets[index]
        more = split_into_pieces(self.tokenizer, list(written.ids))
        start = len(pieces)
        turns = ((0, "reads"), (start, "writes"))
        return TokenText((*pieces, *more), (*(False,) * start, *written.taught), turns, start)

    @property
    def sources(self) -> tuple[str, ...] | None:
        """Where each text comes from, by which the report page groups them; None where no column says it."""
        return self.kinds

    def name(self, index: int) -> str:
        """The beginning of a text, or of what is taught of it, for lists and titles.

        Args:
            index: which text.
        """
        row = self.encoded[index] if self.targets is None else self.targets[index]
        first = row.taught.index(True) if True in row.taught else 0
        return begin_of(self.tokenizer, row.filled(getattr(self.tokenizer, "mask_token_id", None))[first:])

    @property
    def taught(self) -> Int[Tensor, " n"]:
        """How many tokens of each text are predicted; the first of a text that a causal model reads never is."""
        first = 1 if self.targets is None and self.shift else 0
        rows = self.encoded if self.targets is None else self.targets
        return torch.tensor([sum(row.taught[first:]) for row in rows])

    def check_taught(self, what: str = "text") -> None:
        """Refuse texts of which nothing is predicted.

        Args:
            what: what to call them in the message.

        Raises:
            InvalidInput: names them.
        """
        empty = (self.taught == 0).nonzero()[:, 0].tolist()
        if empty:
            cut = any(self.encoded[i].cut for i in empty)
            why = "what they teach was cut off; give a larger max_length=" if cut else "leave them out"
            raise InvalidInput(f"No token is taught by {what} {name_ids(empty)}: {why}.")

    def check_length(self, most: int | None) -> None:
        """Refuse queries that are longer than model and tokenizer were made for; training texts are cut.

        Args:
            most: the most tokens; None: nobody says.

        Raises:
            InvalidInput: names the first of them.
        """
        rows = [row for pair in zip(self.encoded, self.targets or self.encoded, strict=True) for row in pair]
        longer = next((i // 2 for i, row in enumerate(rows) if most is not None and len(row.ids) > most), None)
        if longer is not None:
            count = max(len(row.ids) for row in rows[2 * longer : 2 * longer + 2])
            raise InvalidInput(
                f"Query {longer} has {count:,} tokens, and model and tokenizer were made for {most:,}; ask about a "
                "part of it."
            )


def encode_rows(
    rows: Sequence[Any],
    columns: Columns,
    tokenizer: Any,
    model: nn.Module,
    *,
    completion_only: bool = True,
    end: bool | None = None,
    max_length: int | None = None,
    kind_column: str | None = None,
) -> Texts:
    """Encode rows, cut them to the longest text allowed, and warn once with how much was cut.

    Raises:
        InvalidInput: a cell is empty or of the wrong type, or a text teaches nothing.
    """
    limit = longest(model, tokenizer) if max_length is None else whole_number("max_length", max_length, 1)
    encode = _encoder(columns, tokenizer, completion_only, end, limit)
    side = str(getattr(tokenizer, "truncation_side", "right"))
    targets: tuple[Encoded, ...] | None = None
    if is_seq2seq(model):
        source, written = _source_and_written(columns)
        whole = tuple(encode_text(tokenizer, read_cell(rows[i], source, i), None, limit) for i in range(len(rows)))
        answers = (read_cell(rows[i], written, i) for i in range(len(rows)))
        targets = tuple(encode_text(tokenizer, answer, end is not False, limit) for answer in answers)
        targets = tuple(row if limit is None else row.shortened(limit) for row in targets)
    else:
        whole = tuple(encode(rows[i], i) for i in range(len(rows)))
    encoded = tuple(row if limit is None else row.shortened(limit, side) for row in whole)
    kinds = None if kind_column is None else tuple(str(read_cell(rows[i], kind_column, i)) for i in range(len(rows)))
    shift = token_shift(model) is not False
    texts = Texts(encoded, tokenizer, targets, kinds, limit, shift, columns=columns, ends=end)
    texts.check_taught()
    warn_of_cut(texts, max_length is not None)
    _warn_of_padding_left_out(rows, columns)
    if token_shift(model) is False and targets is None and columns.ids is None:
        warn_caller(
            f"{type(base_model(model)).__name__} fills in blanks and these texts have none: every token is taught "
            "while the model reads it; pass rows in which tokens are hidden once, with input_ids and labels.",
            TrainingDataWarning,
        )
    return texts


def _warn_of_padding_left_out(rows: Sequence[Any], columns: Columns) -> None:
    """Say where labels of one's own stand at padding, which is no part of a text."""
    if columns.ids is None or columns.labels is None or not len(rows) or "attention_mask" not in rows[0]:
        return
    lost = sum(
        int(label) != IGNORED and not int(kept)
        for row in rows
        for label, kept in zip(row[columns.labels], row["attention_mask"], strict=False)
    )
    if lost:
        warn_caller(
            f"{lost:,} labels stand at padding (attention_mask 0) and take no part; where training taught them, pass "
            "the Trainer, or ptif.attribute(model, loader, queries) with its loader, which count them as it did.",
            TrainingDataWarning,
        )


def _source_and_written(columns: Columns) -> tuple[str, str]:
    if columns.prompt is None or columns.completion is None:
        raise InvalidInput(
            "A model with an encoder and a decoder reads one text and writes another; name both with prompt_column= "
            "and completion_column=."
        )
    return columns.prompt, columns.completion


def _encoder(
    columns: Columns, tokenizer: Any, completion_only: bool, end: bool | None, limit: int | None
) -> Callable[[Any, int], Encoded]:
    def encode(row: Any, index: int) -> Encoded:
        if columns.messages is not None:
            cell = read_cell(row, columns.messages, index)
            with naming(f"Example {index}"):
                return encode_chat(tokenizer, read_chat(cell, row), not completion_only)
        if columns.prompt is not None and columns.completion is not None:
            given, written = (read_cell(row, name, index) for name in (columns.prompt, columns.completion))
            if is_chat(given) or is_chat(written):
                with naming(f"Example {index}"):
                    return encode_chat_pair(tokenizer, given, written, not completion_only, row)
            return encode_pair(tokenizer, given, written, end is not False, not completion_only)
        if columns.ids is not None:
            return _read_tokens(row, columns, index, completion_only)
        with naming(f"Example {index}"):
            # What training code puts behind a text (as TRL does) is cut off with it, what the tokenizer does is kept.
            most = limit if end is None else None
            return encode_text(tokenizer, read_cell(row, columns.text or "text", index), end, most)

    return encode


def _read_tokens(row: Any, columns: Columns, index: int, completion_only: bool) -> Encoded:
    """A row of token numbers, with its labels and without its padding."""
    ids = [int(token) for token in read_cell(row, columns.ids or "input_ids", index)]

    def beside(name: str, what: str) -> list[int]:
        cells = [int(cell) for cell in read_cell(row, name, index)]
        if len(cells) != len(ids):
            raise InvalidInput(f"Example {index} has {len(ids)} token numbers and {len(cells)} {what}; give as many.")
        return cells

    labels = ids if columns.labels is None else beside(columns.labels, "labels")
    for name in columns.masks if completion_only else ():
        mask = beside(name, f"under {name!r}")
        labels = [label if taught else IGNORED for label, taught in zip(labels, mask, strict=True)]
    mask = row.get("attention_mask")
    if mask is not None and len(mask) == len(ids):  # what the tokenizer has padded is no part of the text
        ids, labels = ([t for t, kept in zip(side, mask, strict=True) if int(kept)] for side in (ids, labels))
    return Encoded(tuple(ids), tuple(label != IGNORED for label in labels), own_labels=tuple(labels))


def longest(model: nn.Module, tokenizer: Any) -> int | None:
    """The most tokens that model and tokenizer were made for; None where neither says."""
    config: Any = getattr(base_model(model), "config", None)
    sizes = [getattr(config, name, None) for name in ("max_position_embeddings", "n_positions")]
    sizes.append(getattr(tokenizer, "model_max_length", None))
    known = [int(size) for size in sizes if isinstance(size, (int, float)) and 0 < size < _NO_LIMIT]
    return min(known) if known else None


def warn_of_cut(texts: Texts, asked: bool) -> None:
    """Say once how many texts, and how much of them, were cut off."""
    rows = (*texts.encoded, *(texts.targets or ()))
    cut = [row for row in rows if row.cut]
    if not cut:
        return
    lost, total = sum(row.cut for row in cut), sum(len(row.ids) + row.cut for row in rows)
    source = "max_length" if asked else "the most that model and tokenizer were made for"
    warn_caller(
        f"{len(cut):,} of {len(rows):,} texts are longer than {texts.limit:,} tokens ({source}) and were cut: "
        f"{lost:,} of {total:,} tokens take no part; give max_length= as training did.",
        TrainingDataWarning,
    )

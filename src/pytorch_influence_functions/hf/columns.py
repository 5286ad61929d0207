"""Rows of texts, whatever holds them, and which of their columns are what."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from ..core.errors import InvalidInput, UnknownName, nearest
from .chats import is_chat, is_nothing
from .streams import only_iterates, read_stream

MESSAGES: Final = ("messages", "conversations", "conversation")
# Which tokens of a tokenised row are taught, as TRL leaves them: of completions, and of the assistant's turns.
_MASKS: Final = ("completion_mask", "assistant_masks")
_ONE_OF: Final = "messages_column=, text_column=, or prompt_column= with completion_column="


@dataclass(frozen=True)
class Columns:
    """Which columns hold what; exactly one reading is set.

    Args:
        messages: chats, lists of `{"role": …, "content": …}`.
        text: texts.
        prompt: what the model is given; with `completion`, what it is taught to answer.
        completion: see `prompt`.
        ids: token numbers; `labels` beside them where there are any.
        labels: see `ids`.
        masks: beside `ids`, 1 where a token is taught and 0 where it is not.
    """

    messages: str | None = None
    text: str | None = None
    prompt: str | None = None
    completion: str | None = None
    ids: str | None = None
    labels: str | None = None
    masks: tuple[str, ...] = ()

    @property
    def names(self) -> tuple[str, ...]:
        """Those that are read."""
        every = (self.messages, self.text, self.prompt, self.completion, self.ids)
        return tuple(name for name in every if name)

    def are_in(self, row: Mapping[str, Any]) -> bool:
        """Whether a row has them.

        Args:
            row: with named cells.
        """
        return bool(self.names) and all(name in row for name in self.names)

    @property
    def described(self) -> str:
        """In words."""
        return " and ".join(map(repr, self.names))


def rows_of(data: Any) -> tuple[Sequence[Any], list[str]]:
    """The rows of a dataset as plain Python objects, and the names of its columns; a list of texts has one, `text`.

    Args:
        data: a `datasets.Dataset` in any format, a frame, or a list of texts, of chats or of mappings; or what can only
            be iterated, which is read once.

    Raises:
        InvalidInput: several splits, data without an index, or rows that are none of these.
    """
    columns = getattr(data, "column_names", None)
    refuse_splits(data, "The dataset has", "was trained on, dataset")
    if isinstance(data, (str, os.PathLike)):
        shown = str(data) if len(str(data)) <= 60 else f"{str(data)[:28]}…{str(data)[-28:]}"
        raise InvalidInput(
            f"The dataset is one string, {shown!r}; pass a list of texts, or what a file holds: "
            "datasets.load_dataset('json', data_files=path, split='train')."
        )
    if isinstance(data, Mapping):
        return rows_of_columns(data), [str(name) for name in data]
    if not hasattr(data, "__iter__") and not hasattr(data, "__getitem__"):
        raise InvalidInput(
            f"The dataset is of type {type(data).__name__}; pass a list of texts, chats (lists of messages), or rows "
            "with named columns."
        )
    if only_iterates(data):
        data, columns = read_stream(data), None
    data = rows_of_frame(data)
    if columns is not None and callable(getattr(data, "with_format", None)):
        return data.with_format(None), list(columns)
    if len(data) == 0:
        raise InvalidInput("The dataset holds no text; at least one is needed.")
    first = data[0]
    if isinstance(first, str):
        return [{"text": text} for text in data], ["text"]
    if is_chat(first):
        return [{"messages": chat} for chat in data], ["messages"]
    if isinstance(first, Mapping):
        return data, [str(name) for name in first]
    raise InvalidInput(
        f"Example 0 is of type {type(first).__name__}; expected texts, chats (lists of messages), or rows with "
        "named columns."
    )


def rows_of_frame(data: Any) -> Any:
    """The rows of a frame of pandas or polars as dictionaries; anything else as it is.

    Args:
        data: anything.
    """
    if callable(getattr(data, "to_dicts", None)):  # of polars
        return data.to_dicts()
    if callable(getattr(data, "to_dict", None)) and hasattr(data, "columns"):
        return data.to_dict("records")
    return data


def rows_of_columns(columns: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The rows of named columns, as a tokenizer gives them for one text or a list of texts.

    Raises:
        InvalidInput: the columns are of different lengths, or hold no token numbers.
    """
    ids: Any = columns.get("input_ids")
    if not _is_list(ids) or len(ids) == 0:
        raise InvalidInput(
            f"The dataset is a mapping of {listed([str(name) for name in columns])}; pass a list of rows, a "
            "datasets.Dataset.from_dict(...), or what the tokenizer gives for a list of texts."
        )
    if not _is_list(ids[0]):
        return [dict(columns)]
    if any(not _is_list(column) or len(column) != len(ids) for column in columns.values()):
        raise InvalidInput(
            f"There are {len(ids)} rows of 'input_ids' and other columns of "
            f"{listed([str(name) for name in columns])} have another number; give as many."
        )
    return [{name: column[i] for name, column in columns.items()} for i in range(len(ids))]


def _is_list(value: Any) -> bool:
    return isinstance(value, (list, tuple)) or getattr(value, "ndim", 0) > 0


def refuse_splits(data: Any, has: str, use: str) -> None:
    """Refuse several splits at once.

    Args:
        data: anything.
        has: whose splits they are, in words.
        use: what the one to pass is for, and its name.

    Raises:
        InvalidInput: it names the splits.
    """
    columns = getattr(data, "column_names", None)
    if isinstance(data, Mapping) and data and all(hasattr(part, "column_names") for part in data.values()):
        columns = data  # a plain dictionary of datasets, as eval_dataset= takes it
    if isinstance(columns, Mapping):
        first = next(iter(columns), "train")
        raise InvalidInput(f"{has} the splits {', '.join(map(repr, columns))}; pass the one that {use}[{first!r}].")


def choose_columns(
    names: Sequence[str],
    messages: str | None = None,
    text: str | None = None,
    prompt: str | None = None,
    completion: str | None = None,
) -> Columns:
    """The columns that were named, checked; else those with the usual names.

    Raises:
        UnknownName: a column that there is not.
        InvalidInput: two readings at once, or none that can be told.
    """
    asked = {"messages": messages, "text": text, "prompt": prompt, "completion": completion}
    for role, name in asked.items():
        if name is not None:
            check_column(f"{role}_column", name, names)
    if (prompt is None) != (completion is None):
        raise InvalidInput("prompt_column= and completion_column= belong together; give both.")
    readings = [reading for reading in (messages, text, prompt) if reading is not None]
    if len(readings) > 1:
        raise InvalidInput(f"Texts are read from one place: give one of {_ONE_OF}.")
    if readings:
        return Columns(messages, text, prompt, completion)
    usual = next((name for name in MESSAGES if name in names), None)
    if usual is not None:
        return Columns(messages=usual)
    if "prompt" in names and "completion" in names:
        return Columns(prompt="prompt", completion="completion")
    if "input_ids" in names:
        masks = tuple(name for name in _MASKS if name in names)
        return Columns(ids="input_ids", labels="labels" if "labels" in names else None, masks=masks)
    if "text" in names:
        return Columns(text="text")
    raise InvalidInput(f"Which of the columns {listed(names)} holds the texts cannot be told; give {_cure(names)}.")


def check_column(argument: str, name: str, names: Sequence[str]) -> None:
    """Refuse a column that there is not.

    Args:
        argument: which names it.
        name: the column.
        names: of all columns.

    Raises:
        UnknownName: there is none of that name.
    """
    if name not in names:
        raise UnknownName(f"{argument}={name!r} is not a column; there are {listed(names)}.{nearest(name, names)}")


def _cure(names: Sequence[str]) -> str:
    """Which columns to name; of preferences the answer that was preferred is what a text can teach."""
    if "chosen" not in names:
        return _ONE_OF
    if "prompt" in names:
        return 'prompt_column="prompt" with completion_column="chosen" for the answers that were preferred'
    return 'messages_column="chosen" (chats) or text_column="chosen" (texts) for the answers that were preferred'


def listed(names: Sequence[str]) -> str:
    """Names of columns in words, six at most.

    Args:
        names: those.
    """
    return ", ".join(map(repr, list(names)[:6])) + (f" and {len(names) - 6} more" if len(names) > 6 else "")


def read_cell(row: Any, name: str, index: int) -> Any:
    """One cell of a row, refused where it is missing."""
    value = row.get(name)
    if is_nothing(value):
        raise InvalidInput(f"Example {index} has nothing under {name!r}; fill it or leave the example out.")
    return value

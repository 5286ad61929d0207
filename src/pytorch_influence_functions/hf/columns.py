"""Rows of texts, whatever holds them, and which of their columns are what."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from ..core.errors import InvalidInput, UnknownName, nearest

_MESSAGES: Final = ("messages", "conversations", "conversation")
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
    """

    messages: str | None = None
    text: str | None = None
    prompt: str | None = None
    completion: str | None = None
    ids: str | None = None
    labels: str | None = None

    @property
    def described(self) -> str:
        """In words."""
        names = [repr(name) for name in (self.messages, self.text, self.prompt, self.completion, self.ids) if name]
        return " and ".join(names)


def rows_of(data: Any) -> tuple[Sequence[Any], list[str]]:
    """The rows of a dataset as plain Python objects, and the names of its columns; a list of texts has one, `text`.

    Args:
        data: a `datasets.Dataset` in any format, a frame, or a list of texts, of chats or of mappings.

    Raises:
        InvalidInput: several splits, data without an index, or rows that are none of these.
    """
    columns = getattr(data, "column_names", None)
    if isinstance(columns, Mapping):
        raise InvalidInput(
            f"The dataset has the splits {', '.join(map(repr, columns))}; pass the one that was trained on, "
            f"dataset[{next(iter(columns))!r}]."
        )
    if not hasattr(data, "__len__") or not hasattr(data, "__getitem__"):
        raise InvalidInput(
            f"{type(data).__name__} can only be iterated, but texts are named by index; pass list(dataset.take(n)) "
            "of as many as fit in memory."
        )
    if callable(getattr(data, "to_dict", None)) and hasattr(data, "columns"):
        data = data.to_dict("records")
    elif columns is not None and callable(getattr(data, "with_format", None)):
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
        f"The first example is of type {type(first).__name__}; expected texts, chats (lists of messages), or rows with "
        "named columns."
    )


def is_chat(value: Any) -> bool:
    """Whether it is a list of messages with a role."""
    messages = value if isinstance(value, (list, tuple)) else ()
    return bool(messages) and all(isinstance(message, Mapping) and "role" in message for message in messages)


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
        if name is not None and name not in names:
            raise UnknownName(
                f"{role}_column={name!r} is not a column; there are {_listed(names)}.{nearest(name, names)}"
            )
    if (prompt is None) != (completion is None):
        raise InvalidInput("prompt_column= and completion_column= belong together; give both.")
    readings = [reading for reading in (messages, text, prompt) if reading is not None]
    if len(readings) > 1:
        raise InvalidInput(f"Texts are read from one place: give one of {_ONE_OF}.")
    if readings:
        return Columns(messages, text, prompt, completion)
    usual = next((name for name in _MESSAGES if name in names), None)
    if usual is not None:
        return Columns(messages=usual)
    if "prompt" in names and "completion" in names:
        return Columns(prompt="prompt", completion="completion")
    if "input_ids" in names:
        return Columns(ids="input_ids", labels="labels" if "labels" in names else None)
    if "text" in names:
        return Columns(text="text")
    raise InvalidInput(f"Which of the columns {_listed(names)} holds the texts cannot be told; give {_ONE_OF}.")


def _listed(names: Sequence[str]) -> str:
    return ", ".join(map(repr, list(names)[:6])) + (f" and {len(names) - 6} more" if len(names) > 6 else "")


def read_cell(row: Any, name: str, index: int) -> Any:
    """One cell of a row, refused where it is missing."""
    value = row.get(name)
    if value is None:
        raise InvalidInput(f"Example {index} has nothing under {name!r}; fill it or leave the example out.")
    return value

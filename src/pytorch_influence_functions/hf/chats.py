"""Chats in one form, whatever the data set calls speakers and words, with what a template is told beside them."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, Final, overload

from ..core.errors import InvalidInput

Message = Mapping[str, Any]

# Who speaks, in data sets of the form {"from", "value"} (ShareGPT), and as templates call it.
_SPEAKERS: Final = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "system": "system",
    "tool": "tool",
    "observation": "tool",
}
# Columns that chat templates are told of beside the messages.
_BESIDE: Final = ("tools", "documents")
_SETTINGS: Final = "chat_template_kwargs"
BESIDE_A_CHAT: Final = (*_BESIDE, _SETTINGS)


@dataclass(frozen=True, eq=False)
class Chat(Sequence[Message]):
    """Messages with role and content, and what the template is told beside them.

    Args:
        messages: one per turn.
        beside: further arguments of the template, such as `tools`.
    """

    messages: tuple[Message, ...]
    beside: Mapping[str, Any] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.messages)

    def __iter__(self) -> Iterator[Message]:
        return iter(self.messages)

    @overload
    def __getitem__(self, index: int) -> Message: ...
    @overload
    def __getitem__(self, index: slice) -> Chat: ...
    def __getitem__(self, index: int | slice) -> Message | Chat:
        return replace(self, messages=self.messages[index]) if isinstance(index, slice) else self.messages[index]

    def followed_by(self, more: Iterable[Message]) -> Chat:
        """With further messages behind.

        Args:
            more: those.
        """
        return replace(self, messages=(*self.messages, *more))

    @property
    def is_plain(self) -> bool:
        """Whether every content is a text."""
        return all(isinstance(message.get("content"), str) for message in self.messages)

    @property
    def in_plain_texts(self) -> Chat:
        """With the texts of each content put together, and an empty one where there is none."""
        return replace(self, messages=tuple({**m, "content": text_of(m.get("content"))} for m in self.messages))

    @property
    def opening(self) -> Chat:
        """Without the answer that it ends with."""
        return self[:-1] if self.messages and self.messages[-1]["role"] == "assistant" else self


def is_chat(value: Any) -> bool:
    """Whether it is a list of messages, each with who speaks: `role`, or `from` with `value`."""
    messages = _listed(value) or ()
    return bool(messages) and all(isinstance(m, Mapping) and ("role" in m or "from" in m) for m in messages)


def is_nothing(value: Any) -> bool:
    """Whether a cell holds nothing: None, or the NaN that frames put in its place."""
    return value is None or (isinstance(value, float) and value != value)


@contextmanager
def naming(row: str) -> Iterator[None]:
    """Begin what is refused inside with the row that it is about.

    Args:
        row: what it is called, `"Example 3"`.
    """
    try:
        yield
    except InvalidInput as cause:
        if str(cause).startswith(f"{row} "):
            raise
        raise type(cause)(f"{row} cannot be read: {cause}") from cause


def read_chat(value: Any, row: Mapping[str, Any] | None = None) -> Chat:
    """A chat in one form, with what the template is told of the other columns of its row.

    Columns of Arrow hold nothing (None) where a row lacks what another row has; those entries are left out.

    Args:
        value: a list of messages.
        row: may hold `tools`, `documents` and `chat_template_kwargs`.

    Raises:
        InvalidInput: it is no chat, a speaker is not known, or a content holds something that is no text.
    """
    beside = _read_beside(row or {})
    if isinstance(value, Chat):
        return replace(value, beside={**value.beside, **beside})
    if not is_chat(value):
        raise InvalidInput(
            f"A chat was expected, got {type(value).__name__}; give a list of messages with role and content."
        )
    return Chat(tuple(_read_message(message) for message in _listed(value) or ()), beside)


def join_answer(prompt: Any, answer: Any, row: Mapping[str, Any] | None = None) -> tuple[Chat, int]:
    """A whole chat, and how many of its messages are given, from a prompt and an answer, one of which is a chat.

    The answer is a text, the messages behind the prompt, or the whole chat with its prompt (as preferences are often
    kept, where the prompt beside it may be a text).

    Args:
        prompt: a chat; a text where the answer is a whole chat.
        answer: a text or a chat.
        row: what the template is told beside them, see `read_chat`.

    Raises:
        InvalidInput: the prompt is a text, which the answer does not hold.
    """
    if isinstance(prompt, str):
        whole = read_chat(answer, row)
        if not any(text_of(m.get("content")).strip() == prompt.strip() for m in whole[:-1] if m["role"] == "user"):
            raise InvalidInput(
                "A prompt is a text and its answer a chat that does not hold it; give both as texts, or both as lists "
                "of messages."
            )
        return whole, len(whole) - 1
    given = read_chat(prompt, row).opening
    if isinstance(answer, str):
        return given.followed_by([{"role": "assistant", "content": answer}]), len(given)
    more = read_chat(answer)
    inside = len(more) > len(given) and list(more[: len(given)]) == list(given)
    if not inside and more[0]["role"] in ("system", "user"):
        raise InvalidInput(
            f"An answer begins with a turn of the {more[0]['role']} and does not hold the prompt; give the messages "
            "behind the prompt, or the whole chat with it."
        )
    return given.followed_by(more[len(given) :] if inside else more), len(given)


def text_of(content: Any) -> str:
    """The words of a message: a text, parts of the type text, or nothing.

    Args:
        content: that.

    Raises:
        InvalidInput: a part is no text.
    """
    if content is None or isinstance(content, str):
        return content or ""
    parts = list(content) if isinstance(content, (list, tuple)) else [content]
    return "".join(_text_of_part(part) for part in parts)


def _text_of_part(part: Any) -> str:
    words = part.get("text") if isinstance(part, Mapping) else part
    if not isinstance(words, str):
        kind = part.get("type", "unknown") if isinstance(part, Mapping) else type(part).__name__
        raise InvalidInput(
            f"A message holds a part of the type {kind}; only texts can be read, so leave out chats with other parts."
        )
    return words


def _read_message(message: Message) -> Message:
    if message.get("role") is None:
        speaker = str(message.get("from"))
        if speaker not in _SPEAKERS:
            raise InvalidInput(
                f"A message is from {speaker!r}, which is none of {', '.join(_SPEAKERS)}; write its chat as "
                '{"role": …, "content": …} with the roles of the chat template.'
            )
        message = {"role": _SPEAKERS[speaker], "content": message.get("value")}
    read: Message = _without_nothing(message)
    text_of(read.get("content"))  # refuses parts that are no texts
    return read


def _read_beside(row: Mapping[str, Any]) -> dict[str, Any]:
    beside = {name: value for name in _BESIDE if (value := _read_column(row, name, list, "a list"))}
    return {**beside, **(_read_column(row, _SETTINGS, dict, "a mapping") or {})}


def _read_column(row: Mapping[str, Any], name: str, kind: type, expected: str) -> Any:
    """A column beside a chat, also where it is kept as JSON; None where it holds nothing."""
    value = row.get(name)
    if isinstance(value, str):
        try:
            value = json.loads(value.strip() or "null")
        except ValueError as cause:
            raise InvalidInput(
                f"The column {name!r} beside a chat holds a text that is no JSON; give {expected}, as chat templates "
                "take it, or rename the column."
            ) from cause
    else:
        value = _without_nothing(value)
    if is_nothing(value):
        return None
    if not isinstance(value, kind):
        raise InvalidInput(
            f"The column {name!r} beside a chat is of type {type(value).__name__}; give {expected}, as chat templates "
            "take it, or rename the column."
        )
    return value


def _without_nothing(value: Any) -> Any:
    """Without the entries that hold nothing, at every depth."""
    if isinstance(value, Mapping):
        return {key: _without_nothing(inside) for key, inside in value.items() if inside is not None}
    listed = _listed(value)
    return value if listed is None else [_without_nothing(inside) for inside in listed]


def _listed(value: Any) -> Sequence[Any] | None:
    """The members of a list, also of the arrays that frames hold; None of anything else."""
    if isinstance(value, (list, tuple, Chat)):
        return value
    return list(value) if type(value).__name__ == "ndarray" and value.ndim else None

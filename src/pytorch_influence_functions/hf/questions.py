"""Rows that ask a language model: which of their columns is the prompt, the answer, and what it is held against."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from ..core.errors import InvalidInput, nearest
from .chats import BESIDE_A_CHAT, is_chat, is_nothing, naming, read_chat
from .columns import MESSAGES, listed

# What a question's columns are called: its answer, and the one that this is held against.
ANSWERS: Final = ("completion", "chosen")
OTHERS: Final = ("against", "rejected")
_KNOWN: Final = ("prompt", *ANSWERS, *OTHERS, *BESIDE_A_CHAT)
_TEXT: Final = "text"


def is_question(row: Any) -> bool:
    """Whether a row has a prompt, or an answer that is a whole chat."""
    if not isinstance(row, Mapping):
        return False
    return isinstance(row.get("prompt"), (str, list, tuple)) or is_chat(row.get("chosen"))


def _is_message(row: Mapping[str, Any]) -> bool:
    """Whether it is one message of a chat rather than a row."""
    return is_chat([row]) and ("content" in row or "value" in row)


def check_alike(asked: Any) -> None:
    """Refuse a list that mixes texts, chats and rows: each is asked about in a way of its own.

    Raises:
        InvalidInput: names two that differ.
    """
    if not isinstance(asked, (list, tuple)):
        return
    if isinstance(asked, tuple) and not all(isinstance(one, (str, Mapping)) or is_chat(one) for one in asked):
        return  # inputs and targets
    kinds = [_kind_of(one) for one in asked]
    other = next((i for i, kind in enumerate(kinds) if kind != kinds[0]), None)
    if other is not None:
        raise InvalidInput(
            f"Query {other} is {kinds[other]} and query 0 is {kinds[0]}; ask texts, chats and rows in calls of their "
            "own, or write all as rows: {'text': …}, {'messages': …} or {'prompt': …, 'completion': …}."
        )


def _kind_of(one: Any) -> str:
    if isinstance(one, str):
        return "a text"
    if is_chat(one):
        return "a chat"
    return "a row with columns" if isinstance(one, Mapping) else f"of type {type(one).__name__}"


@dataclass(frozen=True)
class Questions:
    """What rows ask, one each.

    Args:
        prompts: texts or chats.
        answers: to these; None: they hold their answers, or the model writes them.
        others: what the answers are held against; None: nothing.
        whole: whether the texts are asked about as a whole.
    """

    prompts: list[Any]
    answers: list[Any] | None = None
    others: list[Any] | None = None
    whole: bool = False

    @staticmethod
    def of(rows: Sequence[Any]) -> Questions | None:
        """Read rows by the columns of the first: `prompt`, `text` or `messages`; single messages are chats of one.

        None where it has no such column.

        Raises:
            InvalidInput: a row lacks what the first one has, or has two answers; it names the row.
        """
        first = rows[0]
        if is_question(first):
            return _read_questions(rows)
        if _is_message(first):
            return Questions([read_chat([row]) for row in rows])
        if isinstance(first.get(_TEXT), str):
            return Questions([_cell(row, _TEXT, index) for index, row in enumerate(rows)], whole=True)
        name = next((name for name in MESSAGES if is_chat(first.get(name))), None)
        if name is None:
            return None
        chats = []
        for index, row in enumerate(rows):
            with naming(f"Query {index}"):
                chats.append(read_chat(_cell(row, name, index), row))
        return Questions(chats)


def _cell(row: Any, name: str, index: int) -> Any:
    value = row.get(name) if isinstance(row, Mapping) else None
    if is_nothing(value):
        raise InvalidInput(f"Query {index} has nothing under {name!r} and query 0 has; give rows of one form.")
    return value


def _read_questions(rows: Sequence[Any]) -> Questions:
    questions = []
    for index, row in enumerate(rows):
        with naming(f"Query {index}"):
            questions.append(_read_question(row))
    prompts, answers, others = (list(column) for column in zip(*questions, strict=True))
    completion, against = (
        column if any(value is not None for value in column) else None for column in (answers, others)
    )
    return Questions(prompts, completion, against)


def _read_question(row: Any) -> tuple[Any, Any, Any]:
    """Prompt, answer and the answer that it is held against; None where there is none."""
    answer, other = (_only(row, names) for names in (ANSWERS, OTHERS))
    prompt = row.get("prompt")
    prompt = read_chat(answer, row).opening if prompt is None and is_chat(answer) else prompt
    unknown = [str(name) for name in row if name not in _KNOWN]
    if answer is None and unknown and not (is_chat(prompt) and len(read_chat(prompt).opening) < len(prompt)):
        raise InvalidInput(
            f"A query has the columns {listed(list(row))}, of which none is known to hold the answer; call the answer "
            "'completion' (or 'chosen') and the one that it is held against 'against' (or 'rejected'), or give "
            f"'prompt' alone for an answer that the model writes.{nearest(unknown[0], _KNOWN)}"
        )
    prompt, answer, other = (read_chat(value, row) if is_chat(value) else value for value in (prompt, answer, other))
    return prompt, answer, other


def _only(row: Any, names: tuple[str, ...]) -> Any:
    values = [row[name] for name in names if not is_nothing(row.get(name))]
    if len(values) > 1:
        raise InvalidInput(f"A query has both {names[0]!r} and {names[1]!r}, which mean the same; leave one out.")
    return values[0] if values else None

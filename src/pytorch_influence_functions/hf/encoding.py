"""A text, a prompt with its completion, or a chat as token numbers, with the tokens that are taught."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from ..core.errors import InvalidInput, first_line

IGNORED: Final = -100
"""The label of a token that does not count, as torch and transformers write it."""


_SHOWN: Final = 60  # letters, and tokens to find them in


@dataclass(frozen=True)
class Encoded:
    """One text: its token numbers, which of them are taught, and how many were cut off.

    `own_labels` are given where a token is taught to be another one (filling in blanks) or of a class. `chat` is what
    it was written from, and `dropped` how many tokens were cut off at its left.
    """

    ids: tuple[int, ...]
    taught: tuple[bool, ...]
    cut: int = 0
    own_labels: tuple[int, ...] | None = None
    chat: Sequence[Mapping[str, Any]] | None = None
    dropped: int = 0

    @property
    def labels(self) -> list[int]:
        """What each token is taught to be, by default itself; `IGNORED` where it is not taught."""
        if self.own_labels is not None:
            return list(self.own_labels)
        return [token if teach else IGNORED for token, teach in zip(self.ids, self.taught, strict=True)]

    def shortened(self, most: int, side: str = "right") -> Encoded:
        """At most so many tokens, cut off at one side."""
        extra = len(self.ids) - most
        if extra <= 0:
            return self
        kept = slice(extra, None) if side == "left" else slice(0, most)
        own = None if self.own_labels is None else self.own_labels[kept]
        dropped = extra if side == "left" else 0
        return Encoded(self.ids[kept], self.taught[kept], extra, own, self.chat, dropped)


def encode_text(tokenizer: Any, text: str, end: bool = False) -> Encoded:
    """A text with the special tokens that the tokenizer adds; all of them taught.

    Args:
        tokenizer: a tokenizer of transformers.
        text: the text.
        end: whether the token that ends a text is put behind it.
    """
    ids = [*_ids(tokenizer, text), *(_end(tokenizer) if end else ())]
    return Encoded(tuple(ids), (True,) * len(ids))


def encode_pair(tokenizer: Any, prompt: str, completion: str, end: bool = True, everything: bool = False) -> Encoded:
    """A prompt and the completion behind it, the completion alone taught.

    Args:
        tokenizer: a tokenizer of transformers.
        prompt: what the model is given.
        completion: what it is taught to answer.
        end: whether the token that ends a text is put behind it.
        everything: whether the prompt is taught as well.
    """
    given = _without_end(tokenizer, _ids(tokenizer, prompt))
    whole = _without_end(tokenizer, _ids(tokenizer, prompt + completion))
    if whole[: len(given)] != given:
        # A token spans the border: training code that puts token numbers together never sees that token.
        whole = given + _ids(tokenizer, completion, special=False)
    whole += _end(tokenizer) if end else []
    return Encoded(tuple(whole), (everything,) * len(given) + (True,) * (len(whole) - len(given)))


def encode_chat(tokenizer: Any, messages: Sequence[Mapping[str, Any]], everything: bool = False) -> Encoded:
    """A chat by the tokenizer's template, the answers of the assistant taught.

    Where the template marks them (`{% generation %}`) its marks are taken; else each answer is what the chat up to it
    has more than the chat before it.

    Args:
        tokenizer: a tokenizer of transformers with a chat template.
        messages: role and content of each turn.
        everything: whether all other tokens are taught as well.

    Raises:
        InvalidInput: there is no template, it refuses the chat, or it changes earlier turns.
    """
    if _marks_answers(tokenizer):
        out = _apply(tokenizer, messages, return_assistant_tokens_mask=True)
        ids, marks = list(out["input_ids"]), [bool(mark) for mark in out["assistant_masks"]]
        if everything or not _run_over(tokenizer, messages, ids, marks):
            return Encoded(tuple(ids), tuple(everything or mark for mark in marks), chat=messages)
    ids = list(_apply(tokenizer, messages)["input_ids"])
    taught = [everything] * len(ids)
    for turn, message in enumerate(messages):
        if everything or message["role"] != "assistant":
            continue
        before = encode_chat_prompt(tokenizer, messages[:turn]) if turn else []
        after = ids if turn + 1 == len(messages) else list(_apply(tokenizer, messages[: turn + 1])["input_ids"])
        if after[: len(before)] != before or ids[: len(after)] != after:
            raise InvalidInput(
                f"The chat template writes turn {turn} in another way when more turns follow, so the tokens of an "
                "answer cannot be told; put {% generation %} around answers in the template, or teach all tokens with "
                "completion_only=False."
            )
        taught[len(before) : len(after)] = [True] * (len(after) - len(before))
    return Encoded(tuple(ids), tuple(taught), chat=messages)


def begin_of(tokenizer: Any, ids: Sequence[int]) -> str:
    """The beginning of a text on one line, to call it by.

    Args:
        tokenizer: a tokenizer of transformers.
        ids: its token numbers.
    """
    words = " ".join(str(tokenizer.decode(list(ids[:_SHOWN]))).split())
    return words if len(words) <= _SHOWN else words[: _SHOWN - 1] + "…"


def find_turns(tokenizer: Any, row: Encoded) -> tuple[tuple[int, str], ...]:
    """Where each turn of a chat begins, with its role; none where the template does not write turn after turn.

    Args:
        tokenizer: that wrote the chat.
        row: the chat.
    """
    turns: list[tuple[int, str]] = []
    for turn, message in enumerate(row.chat or ()):
        before: list[int] = []
        if turn and row.chat is not None:
            try:
                before = list(_apply(tokenizer, row.chat[:turn])["input_ids"])
            except InvalidInput:  # a template may refuse the beginning of a chat
                return ()
        place = len(before) - row.dropped
        shown = before[row.dropped : row.dropped + len(row.ids)]
        if list(row.ids[: len(shown)]) != shown:
            return ()
        if place < len(row.ids):
            turns.append((max(0, place), str(message["role"])))
    # Of turns that were cut off at the left the last is the one that the text begins with.
    return tuple(turn for at, turn in enumerate(turns) if at + 1 == len(turns) or turns[at + 1][0] > turn[0])


def encode_chat_prompt(tokenizer: Any, messages: Sequence[Mapping[str, Any]]) -> list[int]:
    """A chat up to where the assistant answers."""
    return list(_apply(tokenizer, messages, add_generation_prompt=True)["input_ids"])


def encode_prompt(tokenizer: Any, prompt: str) -> list[int]:
    """A prompt up to where the model goes on."""
    return _without_end(tokenizer, _ids(tokenizer, prompt))


# --------------------------------------------------------------------------- the tokenizer


def _ids(tokenizer: Any, text: str, special: bool = True) -> list[int]:
    if not isinstance(text, str):
        raise InvalidInput(f"A text was expected, got {type(text).__name__}; give strings.")
    # verbose: it warns of texts longer than the model's, which we count and tell.
    return list(tokenizer(text, add_special_tokens=special, verbose=False)["input_ids"])


def _end(tokenizer: Any) -> list[int]:
    token = getattr(tokenizer, "eos_token_id", None)
    return [] if token is None else [int(token)]


def _without_end(tokenizer: Any, ids: list[int]) -> list[int]:
    ends = {token for token in (*_end(tokenizer), getattr(tokenizer, "sep_token_id", None)) if token is not None}
    while len(ids) > 1 and ids[-1] in ends:
        ids = ids[:-1]
    return ids


def _marks_answers(tokenizer: Any) -> bool:
    template = getattr(tokenizer, "chat_template", None)
    return isinstance(template, str) and "generation %}" in template


def _run_over(tokenizer: Any, messages: Sequence[Mapping[str, Any]], ids: list[int], marks: list[bool]) -> bool:
    """Whether the marks of an earlier answer go on over all that follows.

    Versions of transformers up to 5.0 mark everything behind an answer that ends with a blank which is no token.
    """
    if len(messages) < 2 or not marks or not marks[-1]:
        return False
    try:
        before = list(_apply(tokenizer, messages[:-1])["input_ids"])
    except InvalidInput:  # a template may refuse the beginning of a chat
        return False
    return 0 < len(before) <= len(ids) and ids[: len(before)] == before and all(marks[len(before) - 1 :])


def _apply(tokenizer: Any, messages: Sequence[Mapping[str, Any]], **options: Any) -> Any:
    if not getattr(tokenizer, "chat_template", None):
        raise InvalidInput(
            "The tokenizer has no chat template, so chats cannot be written out; set tokenizer.chat_template to the "
            "one that training used, or give texts with text_column=."
        )
    try:
        return tokenizer.apply_chat_template(list(messages), tokenize=True, return_dict=True, **options)
    except Exception as cause:
        raise InvalidInput(
            f"The chat template refused a chat of {len(messages)} messages ({first_line(cause)}); give messages with "
            "the roles that it knows."
        ) from cause

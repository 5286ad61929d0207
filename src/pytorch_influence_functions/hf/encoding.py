"""A text, a prompt with its completion, or a chat as token numbers, with the tokens that are taught."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from ..core.errors import InvalidInput, first_line
from .chats import Chat, join_answer, read_chat

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
    chat: Chat | None = None
    dropped: int = 0

    def filled(self, mask: int | None) -> tuple[int, ...]:
        """The token numbers, with what is taught of blanks in their place.

        Args:
            mask: the token number of a blank; None: there are none.
        """
        if self.own_labels is None or mask is None:
            return self.ids
        pairs = zip(self.ids, self.own_labels, strict=True)
        return tuple(label if token == mask and label != IGNORED else token for token, label in pairs)

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


def encode_text(tokenizer: Any, text: str, end: bool | None = None, most: int | None = None) -> Encoded:
    """A text with the special tokens that the tokenizer adds; all of them taught.

    Args:
        tokenizer: a tokenizer of transformers.
        text: the text.
        end: whether the token that ends a text stands behind it, once; None: as the tokenizer has it.
        most: where it is cut if it is as the tokenizer has it, which keeps what it puts around a text.
    """
    own = ids = _ids(tokenizer, text)
    if end is not None:
        ids = _ended(tokenizer, ids) if end else _without_end(tokenizer, text, ids)
    kept = _cut(tokenizer, text, most) if most is not None and len(ids) > most and ids == own else ids
    return Encoded(tuple(kept), (True,) * len(kept), len(ids) - len(kept))


def encode_pair(tokenizer: Any, prompt: str, completion: str, end: bool = True, everything: bool = False) -> Encoded:
    """A prompt and the completion behind it, the completion alone taught.

    Args:
        tokenizer: a tokenizer of transformers.
        prompt: what the model is given.
        completion: what it is taught to answer.
        end: whether the token that ends a text is put behind it, where the completion does not end with it.
        everything: whether the prompt is taught as well.
    """
    given = encode_prompt(tokenizer, prompt)
    whole = encode_prompt(tokenizer, prompt + completion)
    if whole[: len(given)] != given:
        # A token spans the border: training code that puts token numbers together never sees that token.
        whole = given + _ids(tokenizer, completion, special=False)
    whole = _ended(tokenizer, whole) if end else whole
    return Encoded(tuple(whole), (everything,) * len(given) + (True,) * (len(whole) - len(given)))


def encode_chat(tokenizer: Any, chat: Sequence[Mapping[str, Any]], everything: bool = False) -> Encoded:
    """A chat by the tokenizer's template, the answers of the assistant taught.

    Where the template marks them (`{% generation %}`) its marks are taken; else each answer is what the chat up to it
    has more than the chat before it.

    Args:
        tokenizer: a tokenizer of transformers with a chat template.
        chat: role and content of each turn.
        everything: whether all other tokens are taught as well.

    Raises:
        InvalidInput: there is no template, it refuses the chat, or it changes earlier turns.
    """
    messages = _suit(tokenizer, read_chat(chat))
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
        before = _prompt_ids(tokenizer, messages[:turn]) if turn else []
        after = ids if turn + 1 == len(messages) else list(_apply(tokenizer, messages[: turn + 1])["input_ids"])
        if after[: len(before)] != before or ids[: len(after)] != after:
            raise InvalidInput(
                f"The chat template writes turn {turn} in another way when more turns follow, so the tokens of an "
                "answer cannot be told; put {% generation %} around answers in the template, or teach all tokens with "
                "completion_only=False."
            )
        taught[len(before) : len(after)] = [True] * (len(after) - len(before))
    return Encoded(tuple(ids), tuple(taught), chat=messages)


def encode_chat_pair(
    tokenizer: Any, prompt: Any, completion: Any, everything: bool = False, row: Mapping[str, Any] | None = None
) -> Encoded:
    """A prompt and a completion that are chats, all that stands behind the prompt taught.

    Args:
        tokenizer: a tokenizer of transformers with a chat template.
        prompt: a chat; a text where the completion is a whole chat that holds it.
        completion: messages, a whole chat, or the text of the answer.
        everything: whether the prompt is taught as well.
        row: what the template is told beside the messages, see `read_chat`.

    Raises:
        InvalidInput: as for `encode_chat`, or the completion does not follow the prompt.
    """
    whole, count = join_answer(prompt, completion, row)
    chat = _suit(tokenizer, whole)
    given, ids = _prompt_ids(tokenizer, chat[:count]), list(_apply(tokenizer, chat)["input_ids"])
    if ids[: len(given)] != given:
        raise InvalidInput(
            "The chat template writes a prompt in another way when its answer follows, so the tokens of the answer "
            "cannot be told; put both into one column of messages, messages_column=, with {% generation %} around "
            "answers in the template."
        )
    return Encoded(tuple(ids), (everything,) * len(given) + (True,) * (len(ids) - len(given)), chat=chat)


def encode_blanks(tokenizer: Any, text: str, words: str) -> Encoded:
    """A text with blanks, of which alone it is taught what stands there.

    Args:
        tokenizer: a tokenizer of transformers with a token for blanks.
        text: the text, with that token.
        words: what stands in the blanks, a token for each.

    Raises:
        InvalidInput: there is no blank, or another number of them than of tokens.
    """
    blank, mask = (getattr(tokenizer, name, None) for name in ("mask_token", "mask_token_id"))
    ids, fill = _ids(tokenizer, text), _ids(tokenizer, words, special=False)
    places = [place for place, token in enumerate(ids) if token == mask]
    if mask is None or not places:
        write = "give rows with input_ids and labels" if mask is None else f"write {blank} where the answer stands"
        raise InvalidInput(f"The model fills in blanks and the prompt {text[:_SHOWN]!r} has none; {write}.")
    if len(places) != len(fill):
        raise InvalidInput(
            f"The number of blanks in the prompt is {len(places)} and that of tokens in the answer "
            f"{words[:_SHOWN]!r} is {len(fill)}; write {blank} once for each token."
        )
    labels = [IGNORED] * len(ids)
    for place, token in zip(places, fill, strict=True):
        labels[place] = token
    return Encoded(tuple(ids), tuple(label != IGNORED for label in labels), own_labels=tuple(labels))


def begin_of(tokenizer: Any, ids: Sequence[int]) -> str:
    """The beginning of a text on one line, to call it by; marks of start and end are left out where words are left.

    Args:
        tokenizer: a tokenizer of transformers.
        ids: its token numbers.
    """
    start = list(ids[:_SHOWN])
    words = " ".join(str(tokenizer.decode(start, skip_special_tokens=True)).split())
    words = words or " ".join(str(tokenizer.decode(start)).split())
    return words if len(words) <= _SHOWN else words[: _SHOWN - 1] + "…"


def find_turns(tokenizer: Any, row: Encoded) -> tuple[tuple[int, str], ...]:
    """Where each turn of a chat begins, with its role; none where the template does not write turn after turn.

    Args:
        tokenizer: that wrote the chat.
        row: the chat.
    """
    turns: list[tuple[int, str]] = []
    chat = Chat(()) if row.chat is None else _suit(tokenizer, row.chat)
    for turn, message in enumerate(chat):
        before: list[int] = []
        if turn:
            try:
                before = list(_apply(tokenizer, chat[:turn])["input_ids"])
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


def encode_chat_prompt(tokenizer: Any, chat: Sequence[Mapping[str, Any]]) -> list[int]:
    """A chat up to where the assistant answers."""
    return _prompt_ids(tokenizer, _suit(tokenizer, read_chat(chat)))


def encode_prompt(tokenizer: Any, prompt: str) -> list[int]:
    """A prompt up to where the model goes on."""
    return _without_end(tokenizer, prompt, _ids(tokenizer, prompt))


# --------------------------------------------------------------------------- the tokenizer


def _ids(tokenizer: Any, text: str, special: bool = True) -> list[int]:
    if not isinstance(text, str):
        raise InvalidInput(f"A text was expected, got {type(text).__name__}; give strings.")
    # verbose: it warns of texts longer than the model's, which we count and tell.
    return list(tokenizer(text, add_special_tokens=special, verbose=False)["input_ids"])


def _cut(tokenizer: Any, text: str, most: int) -> list[int]:
    """A text as the tokenizer cuts it; whole where it cannot, as where it adds more tokens than are allowed."""
    try:
        return list(tokenizer(text, truncation=True, max_length=most, verbose=False)["input_ids"])
    except Exception:
        return _ids(tokenizer, text)


def _end(tokenizer: Any) -> list[int]:
    token = getattr(tokenizer, "eos_token_id", None)
    return [] if token is None else [int(token)]


def _ended(tokenizer: Any, ids: list[int]) -> list[int]:
    """With the token that ends a text, once."""
    end = _end(tokenizer)
    while end and ids[-2:] == end * 2:  # written out, and put there by the tokenizer
        ids = ids[:-1]
    return ids if ids[-1:] == end else ids + end


def _without_end(tokenizer: Any, text: str, ids: list[int]) -> list[int]:
    """Without what the tokenizer itself puts behind a text; an end token that is written out in the text stays."""
    ends = {token for token in (*_end(tokenizer), getattr(tokenizer, "sep_token_id", None)) if token is not None}
    if not ids or ids[-1] not in ends:
        return ids
    own = _ids(tokenizer, text, special=False)
    starts = range(len(ids) - len(own) + 1) if own else ()
    start = next((start for start in starts if ids[start : start + len(own)] == own), None)
    if start is not None:
        return ids[: start + len(own)]
    while len(ids) > 1 and ids[-1] in ends:
        ids = ids[:-1]
    return ids


def _marks_answers(tokenizer: Any) -> bool:
    template = getattr(tokenizer, "chat_template", None)
    return isinstance(template, str) and "generation %}" in template


def _run_over(tokenizer: Any, messages: Chat, ids: list[int], marks: list[bool]) -> bool:
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


def _prompt_ids(tokenizer: Any, chat: Chat) -> list[int]:
    return list(_apply(tokenizer, chat, add_generation_prompt=True)["input_ids"])


def _suit(tokenizer: Any, chat: Chat) -> Chat:
    """The chat with each content as the template writes it: in parts where it reads parts, else as one text."""
    if chat.is_plain:
        return chat
    plain = chat.in_plain_texts
    try:
        written, expected = (str(_apply(tokenizer, one, tokenize=False, return_dict=False)) for one in (chat, plain))
    except InvalidInput:  # the template puts contents behind other strings
        return plain
    # A template that knows no parts writes the list itself, and "None" where there is nothing.
    odd = {str(message.get("content")) for message in chat if not isinstance(message.get("content"), str)}
    return plain if any(written.count(words) > expected.count(words) for words in odd) else chat


def _apply(tokenizer: Any, chat: Chat, **options: Any) -> Any:
    if not getattr(tokenizer, "chat_template", None):
        raise InvalidInput(
            "The tokenizer has no chat template, so chats cannot be written out; set tokenizer.chat_template to the "
            "one that training used, or give texts with text_column=."
        )
    try:
        asked = {"tokenize": True, "return_dict": True} | options
        return tokenizer.apply_chat_template(list(chat), **chat.beside, **asked)
    except Exception as cause:
        raise InvalidInput(
            f"The chat template refused a chat of {len(chat)} messages ({first_line(cause)}); give messages with "
            "the roles that it knows."
        ) from cause

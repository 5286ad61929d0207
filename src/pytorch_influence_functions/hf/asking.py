"""What `ptif.attribute` is asked about a Trainer or a problem: texts, chats, or examples in the form of its data."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, Final

from torch.utils.data import DataLoader

from ..core.errors import InvalidInput, nearest
from ..problem.data import Source
from ..problem.problem import Problem
from .chats import BESIDE_A_CHAT, is_chat, is_nothing, naming, read_chat
from .columns import MESSAGES, Columns, listed, refuse_splits, rows_of_columns, rows_of_frame
from .encoding import encode_text
from .models import find_tokenizer, is_seq2seq, token_shift
from .padding import Padding
from .queries import TextQueries, as_queries, ask_texts
from .texts import Texts, longest
from .tokenised import IDS, TokenisedRows
from .trainers import padding_as_trained, trainers_tokenizer

# What a question's columns are called: its answer, and the one that this is held against.
_ANSWERS: Final = ("completion", "chosen")
_OTHERS: Final = ("against", "rejected")
_KNOWN: Final = ("prompt", *_ANSWERS, *_OTHERS, *BESIDE_A_CHAT)
_LABELS: Final = ("label", "labels", "label_ids")


def queries_for(problem: Problem, queries: Any, trainer: Any = None) -> Source:
    """Queries as data for a problem.

    A text is asked about as a whole, a chat about the assistant's last turn (generated where it ends with the user's),
    `{"prompt", "completion", "against"}` (or `{"prompt", "chosen", "rejected"}`) about the completion, `{"text"}` and
    `{"messages"}` as a text and a chat where the training data have no such column. Anything else is examples in the
    form of the training data.

    Args:
        problem: the problem.
        queries: what is asked.
        trainer: the Trainer, whose tokenizer is taken where the problem's texts have none.

    Raises:
        InvalidInput: nothing is asked, texts of a model that predicts no tokens, or columns that say neither what is
            asked nor what the training data hold.
    """
    if queries is None:
        raise InvalidInput(
            "Nothing is asked: pass queries=, texts, chats, or examples in the form of the training data."
        )
    if isinstance(queries, (Source, DataLoader)):
        return Source.of(queries)
    refuse_splits(queries, "There are", "is asked, queries")
    queries = rows_of_frame(queries)
    if isinstance(queries, Mapping) and IDS in queries:
        queries = rows_of_columns(queries)
    single = isinstance(queries, (str, Mapping)) or is_chat(queries)
    asked = [queries] if single else queries
    first = asked[0] if hasattr(asked, "__getitem__") and hasattr(asked, "__len__") and len(asked) else None
    if isinstance(first, Mapping) and not _is_question(first, problem.data):
        asked = _plain(problem, asked, first)
        first = asked[0]
    labelled = _labelled_queries(problem.data, asked, first)
    if labelled is not None:
        return _in_the_form_of(problem.data, labelled)
    if not (isinstance(first, str) or is_chat(first) or _is_question(first, problem.data)):
        return _in_the_form_of(problem.data, asked)
    if token_shift(problem.model) is None:
        raise InvalidInput(
            f"{type(problem.model).__name__} predicts no tokens, so a text alone asks nothing; pass queries= with "
            "their labels, in the form of the training data."
        )
    tokenizer = _tokenizer(problem, trainer)
    padding = padding_as_trained(Padding.of(problem.model, tokenizer), problem.data)
    if isinstance(first, str):
        return _whole_texts(problem, tokenizer, list(asked), padding)
    if is_chat(first):
        return ask_texts(problem.model, tokenizer, list(asked), None, None, padding)
    questions = []
    for index, row in enumerate(asked):
        with naming(f"Query {index}"):
            questions.append(_read_question(row))
    prompts, answers, others = zip(*questions, strict=True)
    completion, against = (
        list(column) if any(value is not None for value in column) else None for column in (answers, others)
    )
    return ask_texts(problem.model, tokenizer, list(prompts), completion, against, padding)


def _labelled_queries(data: Source, asked: Any, first: Any) -> list[dict[str, Any]] | None:
    """Texts, with labels or without, as examples of a model for classes; None where nothing such is asked."""
    encode = data.dataset.encode_queries if isinstance(data.dataset, TokenisedRows) else None
    texts = isinstance(first, str) or (isinstance(first, Mapping) and IDS not in first)
    return encode(asked) if encode is not None and texts else None


def _is_question(row: Any, data: Source) -> bool:
    """Whether a row asks: it has a prompt, or an answer that is a whole chat, and is no row of the training data."""
    if not isinstance(row, Mapping):
        return False
    named = _columns(data)
    if not any(name in row for name in (*_ANSWERS, *_OTHERS)) and named is not None and named.are_in(row):
        return False
    return isinstance(row.get("prompt"), (str, list, tuple)) or is_chat(row.get("chosen"))


def _read_question(row: Any) -> tuple[Any, Any, Any]:
    """Prompt, answer and the answer that it is held against; None where there is none.

    Raises:
        InvalidInput: two answers, or columns of which one may be the answer.
    """
    answer, other = (_only(row, names) for names in (_ANSWERS, _OTHERS))
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


def _columns(data: Source) -> Columns | None:
    return data.dataset.columns if isinstance(data.dataset, Texts) else None


def _plain(problem: Problem, asked: Any, first: Mapping[str, Any]) -> Any:
    """Rows of `text` or `messages` as texts or chats, where the training data are not read from such columns."""
    named = _columns(problem.data)
    tokenised = isinstance(problem.data.dataset, TokenisedRows)
    if token_shift(problem.model) is None or not (named or tokenised):
        return asked
    if IDS in first or (named is not None and named.are_in(first)):
        return asked
    if isinstance(first.get("text"), str):
        return [row["text"] for row in asked]
    chats = next((name for name in MESSAGES if is_chat(first.get(name))), None)
    if chats is not None:
        read_chats = []
        for index, row in enumerate(asked):
            with naming(f"Query {index}"):
                read_chats.append(read_chat(row.get(chats), row))
        return read_chats
    read = "token numbers, 'input_ids'" if named is None else named.described
    raise InvalidInput(
        f"A query has the columns {listed([str(name) for name in first])} and the training data were read from {read}; "
        "give the same columns, 'prompt' with 'completion', 'text' or 'messages', or texts and chats themselves."
    )


def _tokenizer(problem: Problem, trainer: Any) -> Any:
    own = getattr(problem.data.dataset, "tokenizer", None)
    if own is None and trainer is not None:
        own = trainers_tokenizer(trainer)
    return find_tokenizer(problem.model, own)


def _whole_texts(problem: Problem, tokenizer: Any, asked: list[str], padding: Padding) -> TextQueries:
    if is_seq2seq(problem.model):
        raise InvalidInput("An encoder-decoder reads one text and writes another; ask {'prompt': …, 'completion': …}.")
    texts = Texts(tuple(encode_text(tokenizer, text) for text in asked), tokenizer)
    texts.check_taught("query")
    texts.check_length(longest(problem.model, tokenizer))
    return as_queries(texts, padding)


def _in_the_form_of(data: Source, queries: Any) -> Source:
    """Examples read and collated as the training data are; texts with labels of a Trainer's classes tokenised."""
    first = queries[0] if isinstance(data.dataset, TokenisedRows) and len(queries) else None
    if isinstance(first, Mapping) and IDS not in first and isinstance(first.get("text"), str):
        words = data.dataset.tokenizer
        queries = [
            dict(words(row["text"], truncation=True)) | {k: row[k] for k in _LABELS if k in row} for row in queries
        ]
    encode = getattr(data.dataset, "encode", None)
    if encode is not None:
        return as_queries(encode(queries), data.collate)
    rows = data.read_alike(queries).dataset
    if isinstance(data.dataset, TokenisedRows):
        rows = replace(data.dataset, rows=rows)
    return replace(data, dataset=rows, reading="", _determinism={})

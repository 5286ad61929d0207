"""What `ptif.attribute` is asked about a Trainer or a problem: texts, chats, or examples in the form of its data."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from torch.utils.data import DataLoader

from ..core.errors import InvalidInput
from ..problem.data import Source
from ..problem.problem import Problem
from .columns import is_chat
from .encoding import encode_text
from .models import find_tokenizer, is_seq2seq, token_shift
from .padding import Padding
from .queries import TextQueries, as_queries, ask_texts
from .texts import Texts
from .tokenised import TokenisedRows
from .trainers import padding_as_trained, trainers_tokenizer


def queries_for(problem: Problem, queries: Any, trainer: Any = None) -> Source:
    """Queries as data for a problem.

    A text is asked about as a whole, a chat about the assistant's last turn (generated where it ends with the user's),
    `{"prompt", "completion", "against"}` about the completion. Anything else is examples in the form of the training
    data.

    Args:
        problem: the problem.
        queries: what is asked.
        trainer: the Trainer, whose tokenizer is taken where the problem's texts have none.

    Raises:
        InvalidInput: nothing is asked, or texts of a model that predicts no tokens.
    """
    if queries is None:
        raise InvalidInput(
            "Nothing is asked: pass queries=, texts, chats, or examples in the form of the training data."
        )
    if isinstance(queries, (Source, DataLoader)):
        return Source.of(queries)
    single = isinstance(queries, str) or is_chat(queries) or _is_question(queries)
    asked = [queries] if single else queries
    first = asked[0] if hasattr(asked, "__getitem__") and hasattr(asked, "__len__") and len(asked) else None
    if not (isinstance(first, str) or is_chat(first) or _is_question(first)):
        return _in_the_form_of(problem.data, queries)
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
    columns = {name: [row.get(name) for row in asked] for name in ("prompt", "completion", "against")}
    completion, against = (
        columns[name] if any(value is not None for value in columns[name]) else None
        for name in ("completion", "against")
    )
    return ask_texts(problem.model, tokenizer, columns["prompt"], completion, against, padding)


def _is_question(row: Any) -> bool:
    return isinstance(row, Mapping) and "prompt" in row and isinstance(row["prompt"], (str, list, tuple))


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
    return as_queries(texts, padding)


def _in_the_form_of(data: Source, queries: Any) -> Source:
    """Examples read and collated as the training data are."""
    if isinstance(queries, Mapping):
        queries = [queries]
    encode = getattr(data.dataset, "encode", None)
    if encode is not None:
        return as_queries(encode(queries), data.collate)
    rows = Source.of(queries).dataset
    if isinstance(data.dataset, TokenisedRows):
        rows = replace(data.dataset, rows=rows)
    return replace(data, dataset=rows, reading="", _determinism={})

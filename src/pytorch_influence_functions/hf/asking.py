"""What `ptif.attribute` is asked about a Trainer or a problem: texts, chats, or examples in the form of its data."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, Final

import torch
from torch.utils.data import DataLoader

from ..core.errors import InvalidInput
from ..problem.data import Source
from ..problem.problem import Problem
from ..problem.random_state import same_rng
from .chats import is_chat, is_nothing
from .columns import Columns, refuse_splits, rows_of_columns, rows_of_frame
from .models import find_tokenizer, is_seq2seq, token_shift
from .padding import Padding
from .queries import as_queries, ask_rows, ask_texts, ask_whole_texts, check_says_texts
from .questions import ANSWERS, OTHERS, check_alike, is_question
from .texts import Texts
from .tokenised import IDS, TokenisedRows
from .trainers import padding_as_trained

_BY_HAND: Final = (
    "give the one that training used, ptif.attribute(ptif.hf.problem(trainer, tokenizer), queries=...), or "
    "ptif.hf.problem(model, tokenizer, texts)"
)


def queries_for(problem: Problem, queries: Any, labelled: bool = False, tokenizer: Any = None) -> Source:
    """Queries as data for a problem.

    A text is asked about as a whole, a chat about the assistant's last turn (generated where it ends with the user's),
    `{"prompt", "completion", "against"}` (or `{"prompt", "chosen", "rejected"}`) about the completion, without the end
    of the text, `{"text"}` and `{"messages"}` as a text and a chat. Rows with the columns of the training data alone,
    and anything else, are examples in their form: they end as those do.

    Args:
        problem: the problem.
        queries: what is asked.
        labelled: whether texts asked of a model for classes have to have their own labels.
        tokenizer: taken where the problem's texts have none.

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
    check_alike(asked)
    first = asked[0] if hasattr(asked, "__getitem__") and hasattr(asked, "__len__") and len(asked) else None
    rows = _labelled_queries(problem.data, asked, first, labelled)
    if rows is not None:
        return _in_the_form_of(problem.data, rows)
    if not _asks(problem, first):
        return _in_the_form_of(problem.data, asked)
    check_says_texts(problem.model)
    if token_shift(problem.model) is None:
        raise InvalidInput(
            f"{type(problem.model).__name__} predicts no tokens, so a text alone asks nothing; pass queries= with "
            "their labels, in the form of the training data."
        )
    own = getattr(problem.data.dataset, "tokenizer", None)
    tokenizer = find_tokenizer(problem.model, tokenizer if own is None else own, _BY_HAND)
    padding = padding_as_trained(Padding.of(problem.model, tokenizer), problem.data)
    if isinstance(first, str):
        return ask_whole_texts(problem.model, tokenizer, list(asked), padding)
    ends = _ends(problem) if is_seq2seq(problem.model) else None
    if is_chat(first):
        return ask_texts(problem.model, tokenizer, list(asked), None, None, padding, add_eos=ends)
    named = _columns(problem.data)
    read_from = "token numbers, 'input_ids'" if named is None else named.described
    return ask_rows(problem.model, tokenizer, list(asked), padding, add_eos=ends, read_from=read_from)


def _labelled_queries(data: Source, asked: Any, first: Any, labelled: bool) -> list[dict[str, Any]] | None:
    """Texts, with labels or without, as examples of a model for classes; None where nothing such is asked."""
    encode = data.dataset.encode_queries if isinstance(data.dataset, TokenisedRows) else None
    pair = isinstance(first, (list, tuple)) and any(isinstance(part, str) for part in first)
    texts = pair or isinstance(first, str) or (isinstance(first, Mapping) and IDS not in first)
    return encode(asked, labelled) if encode is not None and texts else None


def _asks(problem: Problem, first: Any) -> bool:
    """Whether it is a text, a chat, or a row that asks, and no example in the form of the training data."""
    if isinstance(first, str) or is_chat(first):
        return True
    if not isinstance(first, Mapping):
        return False
    named = _columns(problem.data)
    if named is not None and _is_training_row(first, named):
        return False
    if is_question(first):
        return True
    texts = named is not None or isinstance(problem.data.dataset, TokenisedRows)
    return texts and token_shift(problem.model) is not None and IDS not in first


def _is_training_row(row: Mapping[str, Any], named: Columns) -> bool:
    """Whether a row has the columns of the training data, filled, and none beside them that asks more."""
    more = any(name in row and name not in named.names for name in (*ANSWERS, *OTHERS))
    return named.are_in(row) and not more and not any(is_nothing(row[name]) for name in named.names)


def _columns(data: Source) -> Columns | None:
    return data.dataset.columns if isinstance(data.dataset, Texts) else None


def _ends(problem: Problem) -> bool:
    """Whether what an encoder-decoder was taught to write ends with the token that ends a text."""
    texts = problem.data.dataset
    if not isinstance(texts, TokenisedRows):
        return not isinstance(texts, Texts) or texts.ends is not False
    with same_rng():
        labels = texts[0].get("labels")
    end = getattr(texts.tokenizer, "eos_token_id", None)
    return labels is None or end in torch.as_tensor(labels).reshape(-1).tolist()


def _in_the_form_of(data: Source, queries: Any) -> Source:
    """Examples read and collated as the training data are."""
    encode = getattr(data.dataset, "encode", None)
    if encode is not None:
        return as_queries(encode(queries), data.collate)
    rows = data.read_alike(queries).dataset
    if isinstance(data.dataset, TokenisedRows):
        rows = replace(data.dataset, rows=rows)
    return replace(data, dataset=rows, reading="", _determinism={})

"""Texts with labels, for a model that tells classes of whole texts apart or gives each a number."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, Final

import torch
from torch import nn

from ..core.batches import to_device
from ..core.errors import InvalidInput, TrainingDataWarning, UnknownName, nearest, require
from ..core.warn import warn_caller
from ..problem.data import BATCH_SIZE, Source
from ..problem.model_state import preserved
from ..problem.problem import model_device
from ..problem.random_state import same_rng
from ..problem.tables import class_names_in
from .chats import is_nothing
from .columns import check_column, listed, read_cell, rows_of
from .models import accepted_arguments, base_model, is_kind, marks_answers
from .padding import Padding, TrainersCollate
from .texts import longest
from .tokenised import IDS, TokenisedRows

_LABELS: Final = ("label", "labels", "label_ids")
_TEXTS: Final = ("text", "sentence", "review", "content")
_PAIRS: Final = (
    ("premise", "hypothesis"),
    ("sentence1", "sentence2"),
    ("question1", "question2"),
    ("question", "sentence"),
    ("query", "passage"),
    ("text", "text_pair"),
)
_MULTIPLE: Final = "multi_label_classification"


def reads_labelled_texts(model: nn.Module) -> bool:
    """Whether the model gives a whole text its class, or a number."""
    return is_kind(model, "ForSequenceClassification")


@dataclass(frozen=True, eq=False)
class LabelledTexts:
    """How rows of texts with labels become token numbers with labels.

    Args:
        model: which answers where a query has no label, and whose configuration names the classes.
        tokenizer: of training.
        texts: the column with the text, or the two with a pair of them; None: not known, the usual names.
        label: the column with the label.
        limit: the most tokens of a text; None: any number.
        numbers: what the data call the classes, beside the names in the configuration -> their numbers.
    """

    model: nn.Module
    tokenizer: Any
    texts: tuple[str, ...] | None
    label: str
    limit: int | None
    numbers: Mapping[str, int] = field(default_factory=dict)

    def training_rows(self, rows: Sequence[Any]) -> list[dict[str, Any]]:
        """All rows, each with its label.

        Raises:
            InvalidInput: a cell is empty, or a label is none of the model's.
        """
        encoded = [self._encode(rows[i], i, self.texts or ()) for i in range(len(rows))]
        labelled = [tokens | {"labels": self._label(rows[i], self.label, i)} for i, tokens in enumerate(encoded)]
        self._warn_of_cut(rows, labelled)
        return labelled

    def query_rows(self, queries: Any, labelled: bool = False) -> list[dict[str, Any]]:
        """Queries as rows: with their labels, and of texts alone with the class that the model gives them.

        The usual names are understood beside the columns' own, and pairs of strings where the data hold pairs.

        Args:
            queries: texts, pairs of texts, or rows.
            labelled: whether each has to have its own label.

        Raises:
            InvalidInput: a query lacks a column, or its label where that must be given: it has to be its own, or the
                model gives no single class.
        """
        rows, _ = rows_of(self._pairs_as_rows(queries))
        encoded = []
        for index in range(len(rows)):
            row = dict(rows[index])
            tokens = self._encode(row, index, self._texts_of(row, index))
            named = (name for name in (self.label, *_LABELS) if not is_nothing(row.get(name)))
            label = next(named, None)
            if label is None and labelled:
                raise InvalidInput(
                    f"Example {index} has no {self.label!r}, and labels are trusted here; give rows with it."
                )
            encoded.append(
                tokens | {"labels": self._answer(tokens) if label is None else self._label(row, label, index)}
            )
        return encoded

    def _pairs_as_rows(self, queries: Any) -> Any:
        first = queries[0] if isinstance(queries, (list, tuple)) and queries else None
        if not isinstance(first, (list, tuple)):
            return queries
        names = self.texts or _PAIRS[1]
        if any(len(pair) != len(names) or not all(isinstance(text, str) for text in pair) for pair in queries):
            written = ", ".join(f"{name!r}: …" for name in names)
            raise InvalidInput(
                f"A query is of type {type(first).__name__} and holds no text for each of {listed(names)}; give a row "
                f"{{{written}, {self.label!r}: …}}."
            )
        return [dict(zip(names, pair, strict=True)) for pair in queries]

    def _texts_of(self, row: dict[str, Any], index: int) -> tuple[str, ...]:
        """The columns of a query with its texts."""
        if self.texts is None:
            names = [name for name in row if isinstance(row[name], str)]
            texts = _usual_texts(names)
        else:
            texts = self.texts
            if "text" in row and len(texts) == 1:
                row.setdefault(texts[0], row["text"])
        if texts is None or any(is_nothing(row.get(name)) for name in texts):
            expected = "'text', or two texts such as 'sentence1' and 'sentence2'" if texts is None else listed(texts)
            raise InvalidInput(
                f"Query {index} has the columns {listed([str(name) for name in row])}; expected {expected}, and "
                f"{self.label!r} beside them."
            )
        return texts

    def _encode(self, row: Any, index: int, texts: tuple[str, ...]) -> dict[str, Any]:
        words = [str(read_cell(row, name, index)) for name in texts]
        tokens = self.tokenizer(*words, truncation=self.limit is not None, max_length=self.limit)
        return {name: tokens[name] for name in tokens if name in self._accepted}

    @cached_property
    def _accepted(self) -> tuple[str, ...]:
        return accepted_arguments(self.model)

    def _label(self, row: Any, name: str, index: int) -> Any:
        value = read_cell(row, name, index)
        known = {**self._config("label2id", {}), **self.numbers}
        if isinstance(value, str):
            if value not in known:
                names = list(self.numbers or known)
                raise UnknownName(
                    f"Example {index} has the label {value!r}, and the model knows {listed(names)}."
                    f"{nearest(value, known)} Give numbers, or set model.config.label2id."
                )
            return int(known[value])
        if not reads_labelled_texts(self.model):  # a class of one's own, whose configuration need not say how many
            return value
        count = self._config("num_labels", 0)
        if self._config("problem_type") == _MULTIPLE or hasattr(value, "__len__"):
            return [float(one) for one in value]
        if self._config("problem_type") == "regression" or count == 1:
            return float(value)
        if int(value) != value or not 0 <= value < count:
            raise InvalidInput(
                f"Example {index} has the label {value!r}; expected a whole number from 0 to {count - 1}, "
                "or one of the names in model.config.label2id."
            )
        return int(value)

    def _config(self, name: str, otherwise: Any = None) -> Any:
        return getattr(getattr(base_model(self.model), "config", None), name, otherwise)

    def _answer(self, tokens: Mapping[str, Any]) -> int:
        """The class that the model gives."""
        single = self._config("problem_type") in (None, "single_label_classification")
        if not reads_labelled_texts(self.model) or self._config("num_labels") == 1 or not single:
            raise InvalidInput(
                f"A query has no {self.label!r}, and the model gives no single class that could stand in its place; "
                f"give rows with {self.label!r}."
            )
        given = {name: torch.tensor([values]) for name, values in tokens.items()}
        with preserved(self.model), torch.no_grad():
            self.model.eval()
            return int(self.model(**to_device(given, model_device(self.model))).logits[0].argmax())

    def _warn_of_cut(self, rows: Sequence[Any], encoded: Sequence[Mapping[str, Any]]) -> None:
        if self.limit is None:
            return
        # Only a text that is as long as allowed may have been longer.
        full = [i for i, tokens in enumerate(encoded) if len(tokens[IDS]) >= self.limit]
        names = self.texts or ()
        whole = (self.tokenizer(*(str(rows[i][name]) for name in names), verbose=False) for i in full)
        cut = sum(len(tokens[IDS]) > self.limit for tokens in whole)
        if cut:
            warn_caller(
                f"{cut:,} of {len(rows):,} texts are longer than {self.limit:,} tokens and were cut; give max_length= "
                "as training did.",
                TrainingDataWarning,
            )


def labelled_source(
    model: nn.Module,
    tokenizer: Any,
    dataset: Any,
    text_column: str | None = None,
    label_column: str | None = None,
    max_length: int | None = None,
    batch_size: int | None = None,
) -> Source:
    """Texts with labels as data by index, padded for a model.

    Args:
        model: a model for the classes of whole texts.
        tokenizer: of training.
        dataset: rows of texts and labels.
        text_column: the column with texts; None: the usual names, pairs of texts too.
        label_column: the column with labels; None: the usual names.
        max_length: the most tokens of a text; None: the most that model and tokenizer were made for.
        batch_size: the most examples of a batch.

    Raises:
        InvalidInput: columns cannot be told, a cell is empty, or texts cannot be padded.
        UnknownName: a column or a label that there is not.
    """
    rows, names = rows_of(dataset)
    label = _choose(names, label_column, "label_column", _LABELS)
    texts = _usual_texts(names) if text_column is None else None
    texts = texts or (_choose(names, text_column, "text_column", ()),)
    limit = longest(model, tokenizer) if max_length is None else max_length
    called = class_names_in(dataset, label) or []
    numbers = {name: number for number, name in enumerate(called)}
    reading = LabelledTexts(model, tokenizer, texts, label, limit, numbers)
    config: Any = base_model(model).config
    if getattr(tokenizer, "pad_token_id", None) is None or config.pad_token_id is None:
        raise InvalidInput(
            "Tokenizer and model do not both name a padding token, so texts cannot stand in one batch; set "
            "tokenizer.pad_token = tokenizer.eos_token and model.config.pad_token_id = tokenizer.pad_token_id."
        )
    padding = Padding.of(model, tokenizer)
    collator = require("transformers", "hf").DataCollatorWithPadding(tokenizer)
    encoded = reading.training_rows(rows)
    collate = TrainersCollate(collator, None, padding).asking(model, encoded)
    classes = _class_names(config) or tuple(called) or None
    data = TokenisedRows(encoded, tokenizer, collate, None, reading.query_rows, classes)
    return Source(data, collate, batch_size=batch_size or BATCH_SIZE, fixed=batch_size is not None)


def with_labelled_queries(data: Source, model: nn.Module) -> Source:
    """A Trainer's data, asked in texts with labels, or without, as `labelled_source` is.

    Args:
        data: the Trainer's.
        model: the Trainer's; of one whose labels are tokens, or places, the data are left as they are.
    """
    rows = data.dataset
    if not isinstance(rows, TokenisedRows) or rows.shift is not None or marks_answers(model):
        return data
    if rows.columns is None:
        with same_rng():
            names: Sequence[str] = [str(name) for name in rows.rows[0]]
    else:
        names = rows.columns
    label = next((name for name in _LABELS if name in names), _LABELS[0])
    numbers = {name: number for number, name in enumerate(class_names_in(rows, label) or ())}
    limit = longest(model, rows.tokenizer)
    reading = LabelledTexts(model, rows.tokenizer, _usual_texts(names), label, limit, numbers)
    return replace(data, dataset=replace(rows, encode_queries=reading.query_rows))


def _usual_texts(names: Sequence[str]) -> tuple[str, ...] | None:
    """The columns with a pair of texts, or with one, by their usual names; None where there are none of these."""
    pair = next((pair for pair in _PAIRS if set(pair) <= set(names)), None)
    return pair or next(((name,) for name in _TEXTS if name in names), None)


def _class_names(config: Any) -> tuple[str, ...] | None:
    """What the model calls its classes; None where nobody named them."""
    names = tuple(str(config.id2label.get(i)) for i in range(config.num_labels))
    return None if names == tuple(f"LABEL_{i}" for i in range(config.num_labels)) else names


def _choose(names: Sequence[str], given: str | None, argument: str, usual: Sequence[str]) -> str:
    """The column that was named, checked; else the one with a usual name."""
    if given is not None:
        check_column(argument, given, names)
        return given
    for name in usual:
        if name in names:
            return name
    what = "labels" if argument == "label_column" else "texts"
    raise InvalidInput(
        f"Which of the columns {listed(names)} holds the {what} of a model for classes cannot be told; give "
        f"{argument}=."
    )

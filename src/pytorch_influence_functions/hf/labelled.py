"""Texts with labels, for a model that tells classes of whole texts apart or gives each a number."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
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
from .chats import is_nothing
from .columns import check_column, listed, read_cell, rows_of
from .models import accepted_arguments, base_model, is_kind
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
        texts: the column with the text, or the two with a pair of them.
        label: the column with the label.
        limit: the most tokens of a text; None: any number.
    """

    model: nn.Module
    tokenizer: Any
    texts: tuple[str, ...]
    label: str
    limit: int | None

    def training_rows(self, rows: Sequence[Any]) -> list[dict[str, Any]]:
        """All rows, each with its label.

        Raises:
            InvalidInput: a cell is empty, or a label is none of the model's.
        """
        encoded = [self._encode(rows[i], i) | {"labels": self._label(rows[i], i)} for i in range(len(rows))]
        self._warn_of_cut(rows, encoded)
        return encoded

    def query_rows(self, queries: Any) -> list[dict[str, Any]]:
        """Queries as rows: with their labels, and of texts alone with the class that the model gives them.

        `text` and `label` are understood beside the columns' own names.

        Raises:
            InvalidInput: a query lacks a column, or a model that gives no single class is asked without a label.
        """
        rows, _ = rows_of(queries)
        encoded = []
        for index in range(len(rows)):
            row = dict(rows[index])
            for usual, own in (("text", self.texts[0]), ("label", self.label)):
                if usual in row:
                    row.setdefault(own, row[usual])
            tokens = self._encode(row, index)
            named = self.label in row and not is_nothing(row[self.label])
            encoded.append(tokens | {"labels": self._label(row, index) if named else self._answer(tokens)})
        return encoded

    def _encode(self, row: Any, index: int) -> dict[str, Any]:
        texts = [str(read_cell(row, name, index)) for name in self.texts]
        tokens = self.tokenizer(*texts, truncation=self.limit is not None, max_length=self.limit)
        return {name: tokens[name] for name in tokens if name in self._accepted}

    @cached_property
    def _accepted(self) -> tuple[str, ...]:
        return accepted_arguments(self.model)

    def _label(self, row: Any, index: int) -> Any:
        value = read_cell(row, self.label, index)
        config: Any = base_model(self.model).config
        if config.problem_type == _MULTIPLE:
            return [float(one) for one in value]
        if config.problem_type == "regression" or config.num_labels == 1:
            return [float(one) for one in value] if isinstance(value, Sequence) else float(value)
        if isinstance(value, str):
            if value not in config.label2id:
                raise UnknownName(
                    f"Example {index} has the label {value!r}, and the model knows {listed(list(config.label2id))}."
                    f"{nearest(value, config.label2id)} Give numbers, or set model.config.label2id."
                )
            return int(config.label2id[value])
        if int(value) != value or not 0 <= value < config.num_labels:
            raise InvalidInput(
                f"Example {index} has the label {value!r}; expected a whole number from 0 to {config.num_labels - 1}, "
                "or one of the names in model.config.label2id."
            )
        return int(value)

    def _answer(self, tokens: Mapping[str, Any]) -> int:
        """The class that the model gives."""
        config: Any = base_model(self.model).config
        if config.num_labels == 1 or config.problem_type not in (None, "single_label_classification"):
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
        whole = (self.tokenizer(*(str(rows[i][name]) for name in self.texts), verbose=False) for i in full)
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
    if text_column is None:
        pair = next((pair for pair in _PAIRS if set(pair) <= set(names)), None)
        texts = pair or (_choose(names, None, "text_column", _TEXTS),)
    else:
        texts = (_choose(names, text_column, "text_column", ()),)
    limit = longest(model, tokenizer) if max_length is None else max_length
    reading = LabelledTexts(model, tokenizer, texts, label, limit)
    config: Any = base_model(model).config
    if getattr(tokenizer, "pad_token_id", None) is None or config.pad_token_id is None:
        raise InvalidInput(
            "Tokenizer and model do not both name a padding token, so texts cannot stand in one batch; set "
            "tokenizer.pad_token = tokenizer.eos_token and model.config.pad_token_id = tokenizer.pad_token_id."
        )
    padding = Padding.of(model, tokenizer)
    collator = require("transformers", "hf").DataCollatorWithPadding(tokenizer)
    collate = TrainersCollate(collator, None, padding)
    classes = _class_names(config)
    data = TokenisedRows(reading.training_rows(rows), tokenizer, collate, None, reading.query_rows, classes)
    return Source(data, collate, batch_size=batch_size or BATCH_SIZE, fixed=batch_size is not None)


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

"""What a Trainer was given: its model, its training data with the columns it takes, and its collate function."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn

from ..core.errors import InvalidInput
from ..problem.data import BATCH_SIZE, Source
from .models import accepted_arguments, token_shift
from .padding import Padding, TrainersCollate
from .tokenised import TokenisedRows


def trainers_model(trainer: Any) -> nn.Module:
    """The model as it was trained, without what accelerate wrapped around it."""
    model: nn.Module = trainer.model
    return model


def trainers_tokenizer(trainer: Any) -> Any:
    """The tokenizer that the Trainer was given, or None; of a processor its tokenizer."""
    processor = getattr(trainer, "processing_class", None)
    if processor is None:
        processor = getattr(getattr(trainer, "data_collator", None), "tokenizer", None)
    return getattr(processor, "tokenizer", processor)


def trainers_data(trainer: Any, dataset: Any, padding: Padding, batch_size: int | None, reading: str = "") -> Source:
    """Examples through the Trainer's own columns and collate function.

    Args:
        trainer: the Trainer.
        dataset: examples in the form of its training set; None: its training set.
        padding: what the model has to be told about padded texts.
        batch_size: the most examples of a batch.
        reading: how the texts are weighed, in words.

    Raises:
        InvalidInput: there is no training set, or it can only be iterated.
    """
    data = getattr(trainer, "train_dataset", None) if dataset is None else dataset
    if data is None:
        raise InvalidInput("The Trainer has no train_dataset; pass the data it was trained on as dataset=.")
    if not hasattr(data, "__len__") or not hasattr(data, "__getitem__"):
        raise InvalidInput(
            f"The Trainer's data, a {type(data).__name__}, can only be iterated, but examples are named by index; pass "
            "list(dataset.take(n)) of as many as fit in memory as dataset=."
        )
    if callable(getattr(data, "with_format", None)) and getattr(data, "format", {}).get("type") not in (None, "torch"):
        data = data.with_format(None)
    collate = TrainersCollate(trainer.data_collator, _accepted(trainer), padding)
    return Source(
        TokenisedRows.of(data, trainers_tokenizer(trainer), collate, token_shift(trainer.model)),
        collate,
        batch_size=batch_size or BATCH_SIZE,
        fixed=batch_size is not None,
        reading=reading,
    )


def _accepted(trainer: Any) -> tuple[str, ...] | None:
    """The columns that reach the collate function; None: all."""
    if not getattr(trainer.args, "remove_unused_columns", True):
        return None
    before = getattr(trainer, "_signature_columns", None)
    look = getattr(trainer, "_set_signature_columns_if_needed", None)
    columns: Sequence[str] | None = None
    if callable(look):
        # Trainers of other libraries add the columns of their own collate functions here.
        look()
        columns = trainer._signature_columns
        trainer._signature_columns = before
    names = accepted_arguments(trainer.model) if columns is None else columns
    return tuple(
        dict.fromkeys([*names, "labels", "label", "label_ids", *(getattr(trainer, "label_names", None) or ())])
    )

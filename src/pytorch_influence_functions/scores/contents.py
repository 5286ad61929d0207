"""What of scores is kept in a file: their tensors, and a record of plain values."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

from torch import Tensor

from .diagnostics import Diagnostics

_TENSORS: Final = ("values", "indices", "query_ids", "train_labels", "query_labels")
_RECORD: Final = ("lower_is_better", "n_train", "train_names", "query_names", "class_names", "provenance")


def contents_of(scores: Any) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Everything of `Scores` but the data handles."""
    tensors = {name: value for name in _TENSORS if isinstance(value := getattr(scores, name), Tensor)}
    record = {name: getattr(scores, name) for name in _RECORD}
    record |= {n: labels for n in ("train_labels", "query_labels") if isinstance(labels := getattr(scores, n), list)}
    return tensors, record | {"diagnostics": scores.diagnostics.to_dict()}


def fields_of(tensors: Mapping[str, Tensor], record: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of `Scores` from `contents_of`."""
    fields: dict[str, Any] = {**tensors, **record}
    return fields | {"diagnostics": Diagnostics.from_dict(fields["diagnostics"])}

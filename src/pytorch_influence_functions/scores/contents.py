"""What of scores is kept in a file: their tensors, and a record of plain values."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from typing import Any, Final, TypeVar

from torch import Tensor

from ..core.errors import InvalidInput
from ..core.files import read_tensors
from .diagnostics import Diagnostics

T = TypeVar("T")
_TENSORS: Final = ("values", "indices", "query_ids", "train_labels", "query_labels")
_RECORD: Final = ("lower_is_better", "n_train", "train_names", "query_names", "class_names", "provenance")


def contents_of(scores: Any) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Everything of `Scores` but the data handles."""
    tensors = {name: value for name in _TENSORS if isinstance(value := getattr(scores, name), Tensor)}
    record = {name: getattr(scores, name) for name in _RECORD}
    record |= {n: labels for n in ("train_labels", "query_labels") if isinstance(labels := getattr(scores, n), list)}
    return tensors, record | {"diagnostics": scores.diagnostics.to_dict()}


def read_contents(
    path: str | os.PathLike[str], kind: str, fingerprint: str | None
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """What a file of scores holds.

    Raises:
        InvalidInput: no such file, a damaged one, or one of another kind, version or fingerprint.
    """
    tensors, record = read_tensors(path, kind)
    if record.pop("fingerprint", None) != fingerprint and fingerprint is not None:
        raise InvalidInput(f"{os.fspath(path)!r} holds scores of another run; run it again.")
    return tensors, record


def rebuild(
    scores: Callable[..., T], path: str | os.PathLike[str], tensors: Mapping[str, Tensor], record: Mapping[str, Any]
) -> T:
    """`Scores` from what `contents_of` gave.

    Raises:
        InvalidInput: something is missing, or is none of the fields of scores.
    """
    try:
        fields: dict[str, Any] = {**tensors, **record}
        return scores(**fields | {"diagnostics": Diagnostics.from_dict(fields["diagnostics"])})
    except (KeyError, TypeError) as cause:
        raise InvalidInput(f"{os.fspath(path)!r} does not hold what scores are made of; save them anew.") from cause

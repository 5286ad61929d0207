"""The difference of two results: of two models, two measures, two groups."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, TypeAlias

import torch

from ..core.errors import InvalidInput
from .diagnostics import Diagnostics

Scores: TypeAlias = Any  # the class is of the file above, which imports this one
CONTRASTED = "each row is the measure of a query less that of the one that it is contrasted with"
"""How rows of pairs are described: `Diagnostics.rows`."""


def check_comparable(a: Scores, b: Scores) -> None:
    """Refuse two results whose difference would mean nothing.

    Raises:
        InvalidInput: they differ in queries, training examples or the direction of their measures.
    """
    if a.shape != b.shape or a.n_train != b.n_train:
        raise InvalidInput(
            f"The difference of scores of {a.shape[0]} x {a.shape[1]} of {a.n_train} training examples and "
            f"{b.shape[0]} x {b.shape[1]} of {b.n_train} is none; score the same queries and the same training data."
        )
    indices = [s.indices for s in (a, b)]
    alike = indices[0] is indices[1] or (None not in indices and torch.equal(*indices))
    if not alike:
        raise InvalidInput(
            "The two hold other training examples per query (top=), so they cannot be subtracted; score without top=."
        )
    if a.lower_is_better != b.lower_is_better:
        raise InvalidInput(
            "Of one measure smaller is better and of the other larger is, so their difference has no helpful end; "
            "score both with the same measure."
        )


def of_diagnostics(a: Diagnostics, b: Diagnostics) -> Diagnostics:
    """What is said of a difference: the facts of the first, and the notes of both."""
    notes = (*a.notes, *(f"of what was subtracted: {note}" for note in b.notes if note not in a.notes))
    rows = f"the scores of {a.method or 'one result'} less those of {b.method or 'another'}"
    return replace(a, notes=notes, rows=f"{rows}; {a.rows}" if a.rows else rows)

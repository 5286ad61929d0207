"""Which queries a training example moves: the other side of a query's list of examples."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeAlias

import torch

from ..scores.scores import Scores
from .ranking import four_digits, harm_sign, score_columns

Moved: TypeAlias = list[tuple[int, float]]
"""Query rows with the example's score on each."""

_MOVED = 4
_BLOCK = 2048


def moved_queries(scores: Scores, ids: Sequence[int]) -> dict[int, tuple[Moved, Moved]]:
    """For each of some training examples, the queries that it helps most and those that it harms most.

    Queries on which its score is 0, or is not held, are left out.
    """
    moved: dict[int, tuple[Moved, Moved]] = {}
    for start in range(0, len(ids), _BLOCK):
        block = torch.tensor(list(ids[start : start + _BLOCK]), dtype=torch.long)
        harm = harm_sign(scores) * score_columns(scores, block)
        ends = [(sign * harm).topk(min(_MOVED, len(scores)), 0) for sign in (-1.0, 1.0)]
        for place, i in enumerate(block.tolist()):
            helped, harmed = (
                [
                    (q, four_digits(sign * harm_sign(scores) * size))
                    for q, size in zip(rows[:, place].tolist(), sizes[:, place].tolist(), strict=True)
                    if size > 0
                ]
                for sign, (sizes, rows) in zip((-1.0, 1.0), ends, strict=True)
            )
            moved[i] = (helped, harmed)
    return moved

"""Which queries a training example moves, and by how much each: the other side of a query's list of examples."""

from __future__ import annotations

import base64
from collections.abc import Iterator, Sequence
from typing import TypeAlias

import torch
from jaxtyping import Float
from torch import Tensor

from ..scores.scores import Scores
from .ranking import four_digits, harm_sign, score_columns

Moved: TypeAlias = list[tuple[int, float]]
"""Query rows with the example's score on each."""

_MOVED = 4
_BLOCK = 2048
_ROOM = 3_000_000
"""Bytes of the page for the effects of examples on every query."""
_LARGEST = 32767  # of 16 bits with a sign


def moved_queries(scores: Scores, ids: Sequence[int]) -> dict[int, tuple[Moved, Moved]]:
    """For each of some training examples, the queries that it helps most and those that it harms most.

    Queries on which its score is 0, or is not held, are left out.
    """
    moved: dict[int, tuple[Moved, Moved]] = {}
    for block, columns in _blocks(scores, ids):
        harm = harm_sign(scores) * columns
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


def choose_summed(scores: Scores, most_wanted: Sequence[int], others: Sequence[int]) -> list[int]:
    """The examples whose effect on every query the page holds: as many as it has room for, all or the most wanted."""
    each = 8 / 3 * len(scores)  # two bytes, four letters for three
    everything = sorted({*most_wanted, *others})
    if each * len(everything) <= _ROOM:
        return everything
    return sorted(most_wanted[: int(_ROOM / each)])


def effects_on_queries(scores: Scores, ids: Sequence[int]) -> dict[int, tuple[float, str]]:
    """For each of some training examples its scores on all queries: (unit, whole numbers of it), which a page can sum.

    The numbers have 16 bits, the low byte first, as base64; the largest is 32,767 units, so that rounding errs by less
    than 2e-5 of it. Scores that are not held are 0.
    """
    packed: dict[int, tuple[float, str]] = {}
    for block, columns in _blocks(scores, ids):
        for place, i in enumerate(block.tolist()):
            packed[i] = _pack(columns[:, place])
    return packed


def _pack(values: Float[Tensor, " Q"]) -> tuple[float, str]:
    unit = float(values.abs().max()) / _LARGEST
    steps = values / unit if unit > 0 else values
    return float(f"{unit:.7g}"), base64.b64encode(steps.round().numpy().astype("<i2").tobytes()).decode()


def _blocks(scores: Scores, ids: Sequence[int]) -> Iterator[tuple[Tensor, Float[Tensor, "Q n"]]]:
    """Some examples at a time with their scores."""
    for start in range(0, len(ids), _BLOCK):
        block = torch.tensor(list(ids[start : start + _BLOCK]), dtype=torch.long)
        yield block, score_columns(scores, block)

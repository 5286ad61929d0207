"""Blocks of queries, and the scores of all blocks joined to one."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any, Final

import torch
from torch import Tensor

from ..scores.diagnostics import Diagnostics
from ..scores.scores import Labels, Scores

FIRST: Final = 8
LARGEST: Final = 256


def block_ranges(queries: int, block: int | None = None) -> Iterator[tuple[int, int]]:
    """(first, last + 1) of every block: `block` queries each, or 8, 16, 32, … up to 256.

    The first blocks are small, so that something is kept early; later ones are larger, because many methods pass over
    the training data once per block. The blocks depend on these two numbers alone, so that a resumed run has the same
    blocks as one that was never interrupted.

    >>> list(block_ranges(30)), list(block_ranges(5, block=2))
    ([(0, 8), (8, 24), (24, 30)], [(0, 2), (2, 4), (4, 5)])
    """
    first, size = 0, block or FIRST
    while first < queries:
        yield first, min(first + size, queries)
        first += size
        size = block or min(2 * size, LARGEST)


def join_blocks(parts: Sequence[Scores]) -> Scores:
    """Join the scores of several blocks of queries, in the order given, and their diagnostics."""
    first = parts[0]
    indices = [p.indices for p in parts]
    return replace(
        first,
        values=torch.cat([p.values for p in parts]),
        indices=None if first.indices is None else torch.cat([i for i in indices if i is not None]),
        query_ids=torch.cat([p.query_ids for p in parts]),
        query_labels=_join_labels([p.query_labels for p in parts]),
        diagnostics=_join_diagnostics([p.diagnostics for p in parts]),
    )


def _join_labels(parts: Sequence[Labels]) -> list[Any] | None:
    labels: list[Any] = []
    for part in parts:
        if part is None:
            return None
        labels += part.tolist() if isinstance(part, Tensor) else list(part)
    return labels


def _join_diagnostics(parts: Sequence[Diagnostics]) -> Diagnostics:
    queries = [d.n_queries for d in parts]
    smallest = [d.smallest_curvature for d in parts if d.smallest_curvature is not None]
    # Fields that describe one solve are those of the slowest block.
    return replace(
        max(parts, key=lambda d: d.steps),
        n_queries=sum(queries),
        residual_max=_max_if_known([d.residual_max for d in parts]),
        residual_mean=_weighted_mean([d.residual_mean for d in parts], queries),
        error_max=_max_if_known([d.error_max for d in parts]),
        lost_to_damping=_weighted_mean([d.lost_to_damping for d in parts], queries),
        steps=max(d.steps for d in parts),
        smallest_curvature=min(smallest, default=None),
        seconds=sum(d.seconds for d in parts),
        notes=tuple(dict.fromkeys(note for d in parts for note in d.notes)),
    )


def _max_if_known(values: Sequence[float]) -> float:
    """The maximum, or NaN if any value is NaN: then one block was not measured, so the maximum is not known."""
    return math.nan if any(map(math.isnan, values)) else max(values)


def _weighted_mean(values: Sequence[float], weights: Sequence[int]) -> float:
    total = sum(weights)
    return sum(v * w for v, w in zip(values, weights, strict=True)) / total if total else math.nan

"""Whether a batch is cut into examples along the first axis of its tensors, found out by collating a few alone."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from itertools import combinations
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..core.batches import batch_slice
from ..core.errors import InvalidInput

_PLAIN = (type(None), str, bytes, bool, int, float, complex)


def is_cut_by_rows(collate: Callable[[list[Any]], Any], items: Sequence[Any]) -> bool:
    """Whether row e of every tensor of a batch is what the collate function makes of example e alone, but for padding.

    Bags of words with offsets, lists of images, packed sequences and graphs put together as one are not.

    Args:
        collate: from a list of examples to a batch.
        items: three examples, which may repeat.

    Example:
        >>> items = [(torch.zeros(length), 0) for length in (2, 3, 1)]
        >>> is_cut_by_rows(lambda xs: torch.nn.utils.rnn.pad_sequence([x for x, _ in xs], batch_first=True), items)
        True
        >>> is_cut_by_rows(lambda xs: torch.cat([x for x, _ in xs]), items)
        False
    """
    try:
        alone = [collate([item]) for item in items]
        together = {n: collate(list(items[:n])) for n in range(2, len(items) + 1)}
    except InvalidInput:
        return True  # it says so where the batch is made
    return all(
        _agrees(batch_slice(batch, n, slice(e, e + 1)), alone[e]) for n, batch in together.items() for e in range(n)
    )


def reordered_pair(collate: Callable[[list[Any]], Any], items: Sequence[Any]) -> tuple[int, int] | None:
    """Places of two examples that a collate function puts in an order of its own, as one that sorts by length does.

    It makes the same batch of them whichever comes first.

    Args:
        collate: from a list of examples to a batch.
        items: a few examples.

    Example:
        >>> items = [torch.ones(length) for length in (2, 3, 2)]
        >>> reordered_pair(lambda xs: torch.nn.utils.rnn.pad_sequence(sorted(xs, key=len)), items)
        (0, 1)
        >>> reordered_pair(torch.nn.utils.rnn.pad_sequence, items)
    """
    for i, j in combinations(range(len(items)), 2):
        first, second = items[i], items[j]
        alike = same(collate([first, second]), collate([second, first]))
        if alike and not same(collate([first]), collate([second])):
            return i, j
    return None


def holds_words(item: Any) -> bool:
    """Whether an example holds a text.

    Args:
        item: one example as the dataset gives it.
    """
    if isinstance(item, Mapping):
        return any(map(holds_words, item.values()))
    return isinstance(item, (str, bytes)) or (isinstance(item, (tuple, list)) and any(map(holds_words, item[:1000])))


def _agrees(row: Any, alone: Any) -> bool:
    """Whether a row of a batch is the example alone, or the same with padding."""
    if isinstance(row, Tensor) and isinstance(alone, Tensor):
        if row.shape == alone.shape:
            return same(row, alone)
        padded = row.dim() == alone.dim() > 1 and row.shape[0] == alone.shape[0] == 1
        return padded and all(a >= b for a, b in zip(row.shape, alone.shape, strict=True))
    if isinstance(row, Mapping) and isinstance(alone, Mapping):
        return row.keys() == alone.keys() and all(_agrees(row[key], alone[key]) for key in row)
    if isinstance(row, (tuple, list)) and isinstance(alone, (tuple, list)):
        return len(row) == len(alone) and all(map(_agrees, row, alone))
    return isinstance(row, _PLAIN) and same(row, alone)


# --------------------------------------------------------------------------- comparing


def same(a: Any, b: Any) -> bool:
    """Whether two readings of an example agree; NaN agrees with NaN."""
    if a is b:
        return True
    if type(a) is not type(b):
        return False
    if isinstance(a, Tensor):
        if a.shape != b.shape or a.dtype != b.dtype:
            return False
        both_nan = torch.isnan(a) & torch.isnan(b) if a.is_floating_point() or a.is_complex() else None
        return bool(((a == b) if both_nan is None else (a == b) | both_nan).all())
    if isinstance(a, np.ndarray):
        return a.shape == b.shape and bool(np.array_equal(a, b, equal_nan=a.dtype.kind in "fc"))
    if isinstance(a, Mapping):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, (tuple, list)):
        return len(a) == len(b) and all(map(same, a, b))
    if isinstance(a, float) and math.isnan(a):
        return math.isnan(b)
    return _same_objects(a, b)


def _same_objects(a: Any, b: Any) -> bool:
    if "__eq__" in {name for kind in type(a).__mro__[:-1] for name in vars(kind)}:
        try:
            return bool(a == b)
        except Exception:
            pass
    # Objects without a comparison are compared by their attributes; without attributes they count as the same.
    return same(vars(a), vars(b)) if hasattr(a, "__dict__") else True

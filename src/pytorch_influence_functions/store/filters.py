"""Which stored examples are scored."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Set
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool
from torch import Tensor

from ..core.errors import InvalidInput, first_line, name_ids
from ..influence.candidates import Candidates, lists_of, parse_candidates
from .columns import Columns
from .folder import IndexFolder


def choose_examples(
    folder: IndexFolder, ids: Any, where: Any, labels: Callable[[], Tensor | None]
) -> Bool[Tensor, " n"]:
    """A mask over all examples that were given: those that count and were asked for.

    Args:
        folder: the index.
        ids: positions, a slice, a mask or None.
        where: values by the name of a column, a function of the labels, or None.
        labels: gives the labels, one per example.

    Raises:
        InvalidInput: nothing is left, a position is outside or was removed, or there are no labels.
    """
    alive = folder.manifest.mask()
    mask = alive
    if ids is not None:
        asked = mask_of(ids, len(alive))
        gone = (asked & ~alive).nonzero().flatten().tolist()
        if gone and not isinstance(ids, slice):
            raise InvalidInput(f"Example {name_ids(gone)} was removed from the index; leave it out of ids=.")
        mask = mask & asked
    if where is not None:
        if isinstance(where, Mapping):
            mask = mask & Columns.stored(folder).matching(where, labels)
        else:
            mask = mask & _matching(where, labels(), len(alive))
    if not bool(mask.any()):
        raise InvalidInput("No example is left to score; ids= and where= together choose none.")
    return mask


def candidates_of(ids: Any, where: Any, n_rows: int, size: int) -> Candidates | None:
    """The examples of every row of scores, where `ids` are a list for each; None for anything else.

    Args:
        ids: as for `choose_examples`, or a list of positions for every row.
        where: a function of the labels, or None.
        n_rows: how many rows of scores there are.
        size: how many examples have been given.

    Raises:
        InvalidInput: the lists do not fit the rows or the examples, or `where` is given too.
    """
    if lists_of(ids) is None:
        return None
    if where is not None:
        raise InvalidInput(
            "where= chooses for all queries, and ids= is a list for each; leave where= out, and these examples out of "
            "the lists."
        )
    positions = parse_candidates(ids, size, n_rows)
    return Candidates(positions, positions)


def mask_of(ids: Any, n: int) -> Bool[Tensor, " n"]:
    """Positions, a slice or a mask among n examples as a mask.

    Args:
        ids: which of them.
        n: how many there are, those that were removed included.

    Raises:
        InvalidInput: they are none of these, or outside.
    """
    mask = torch.zeros(n, dtype=torch.bool)
    if isinstance(ids, slice):
        mask[ids] = True
        return mask
    try:
        ids = sorted(ids) if isinstance(ids, Set) else ids
        positions = torch.as_tensor(ids if isinstance(ids, Tensor) else np.asarray(ids))
    except (TypeError, ValueError, RuntimeError) as cause:
        named = '; names of examples are a column: where={"name": [...]}' if _names_examples(ids) else ""
        raise InvalidInput(
            f"ids= must be positions such as [3, 17], a slice or a mask, got {ids!r:.80}{named}."
        ) from cause
    if not positions.numel():
        return mask
    if positions.dtype == torch.bool:
        if positions.shape != (n,):
            raise InvalidInput(f"The mask ids= has shape {tuple(positions.shape)}; the index holds {n:,} examples.")
        return positions.cpu()
    if positions.is_floating_point() or positions.ndim != 1:
        raise InvalidInput(f"ids= must be whole numbers in one row, got {positions.dtype} of {tuple(positions.shape)}.")
    outside = positions[(positions < 0) | (positions >= n)]
    if len(outside):
        raise InvalidInput(f"Example {name_ids(outside.tolist())} is outside the index, which holds 0 to {n - 1:,}.")
    mask[positions.long().cpu()] = True
    return mask


def _names_examples(ids: Any) -> bool:
    return isinstance(ids, str) or (isinstance(ids, Iterable) and any(isinstance(name, str) for name in ids))


def _matching(where: Any, labels: Tensor | None, n: int) -> Tensor:
    if not callable(where):
        raise InvalidInput(
            'where= must be values by the name of a column such as {"source": "web"}, or a function of the labels '
            f"such as lambda y: y == 3, got {where!r:.80}."
        )
    if labels is None:
        raise InvalidInput("The examples of this index have no labels, so where= cannot choose by them; use ids=.")
    try:
        chosen = torch.as_tensor(where(labels))
    except Exception as cause:
        raise InvalidInput(
            f"where= failed on the labels with {type(cause).__name__}: {first_line(cause)}; it is given a tensor with "
            "one label per example and returns as many True or False."
        ) from cause
    if chosen.dtype != torch.bool or chosen.shape != (n,):
        raise InvalidInput(
            f"where= gave {chosen.dtype} of shape {tuple(chosen.shape)} for {n:,} labels; it must give True or False "
            "for each."
        )
    return chosen.cpu()

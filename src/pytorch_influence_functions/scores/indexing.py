"""Selection by position: what a person writes in brackets becomes whole numbers in range."""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from ..core.errors import InvalidInput, name_ids
from ..core.validate import whole_number


def plain_value(label: Any) -> Any:
    """A label as plain Python: tensors and numpy scalars as numbers or lists."""
    return label.tolist() if hasattr(label, "tolist") else label


def plain_values(labels: Any) -> list[Any]:
    """A tensor, array or list of labels as a list of plain Python."""
    return [plain_value(label) for label in labels]


def member_at(values: Any, index: int) -> Any:
    """One member, or None where there are no members."""
    return None if values is None else values[index]


def take_members(values: Any, index: Int[Tensor, " n"]) -> Any:
    """Some members of a tensor, a list or nothing, of the same kind."""
    if values is None or isinstance(values, Tensor):
        return None if values is None else values[index]
    return [values[i] for i in index.tolist()]


def limit_count(k: int | None, available: int) -> int:
    """`k`, or how many are available where that is less or `k` is None.

    Raises:
        InvalidInput: `k` is not a whole number of at least 1.
    """
    if k is None:
        return available
    return min(whole_number("k", k, hint="None stands for all"), available)


def parse_positions(selection: Any, size: int, what: str, twice: bool = False) -> Int[Tensor, " n"]:
    """Positions 0 to size - 1 from an integer, slice, list, tensor or mask; -1 is the last one.

    `what` names the things in messages; `twice` allows one to be picked more than once.

    Raises:
        InvalidInput: nothing picked, a position out of range, or not a whole number.
    """
    if isinstance(selection, slice):
        positions = torch.tensor(range(size)[selection], dtype=torch.long)
    else:
        try:
            positions = torch.as_tensor(selection).cpu()
        except (TypeError, ValueError, RuntimeError):
            raise InvalidInput(
                f"A {what} is picked by whole numbers, a slice or a mask of {size}; got {selection!r}."
            ) from None
        if positions.dtype == torch.bool and positions.shape == (size,):
            positions = positions.nonzero()[:, 0]
        if positions.dtype == torch.bool or (positions.is_floating_point() and positions.numel()) or positions.ndim > 1:
            raise InvalidInput(
                f"A {what} is picked by whole numbers, a slice or a mask of {size}; "
                f"got {positions.dtype} of shape {tuple(positions.shape)}."
            )
        positions = positions.long().reshape(-1)
    outside = positions[(positions < -size) | (positions >= size)]
    if len(outside):
        named = name_ids(outside.tolist())
        raise InvalidInput(f"There is no {what} {named}: they are numbered 0 to {size - 1}.")
    if not len(positions):
        raise InvalidInput(f"No {what} was picked; pick at least one.")
    positions = positions % size
    if not twice and len(set(positions.tolist())) != len(positions):
        raise InvalidInput(f"A {what} was picked twice; pick each once.")
    return positions


def check_indices(indices: Tensor, shape: torch.Size, n_train: int) -> None:
    """Refuse indices of scores that do not fit the scores, lie outside the data or name an example twice.

    Raises:
        InvalidInput: they do.
    """
    if indices.shape != shape:
        raise InvalidInput(
            f"`indices` has shape {tuple(indices.shape)} and the scores have {tuple(shape)}; make them equal."
        )
    ordered = indices.sort(1).values
    if int(ordered[:, 0].min()) < 0 or int(ordered[:, -1].max()) >= n_train:
        raise InvalidInput(f"`indices` must lie in 0 to {n_train - 1}, the training dataset.")
    if bool((ordered[:, 1:] == ordered[:, :-1]).any()):
        raise InvalidInput("`indices` names a training example twice for one query; name each once.")

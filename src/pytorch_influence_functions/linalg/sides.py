"""What one side of a matrix is multiplied by."""

from __future__ import annotations

from typing import TypeAlias

from torch import Tensor

Side: TypeAlias = Tensor | slice | None
"""A matrix, the columns of the identity that a slice takes, or nothing."""


def times(x: Tensor, side: Side) -> Tensor:
    """The last axis of `x` times a side.

    Args:
        x: what is multiplied.
        side: what it is multiplied by.
    """
    if isinstance(side, slice):
        return x[..., side]
    return x if side is None else x @ side

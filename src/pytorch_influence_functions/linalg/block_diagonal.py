"""Block-diagonal C: one operator per group of blocks, each over its own part of the space."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import final

from ..core.errors import InvalidInput
from .eigenbasis import EigenPart
from .operator import AbstractSymmetric
from .rows import Rows
from .space import Space


@final
@dataclass(frozen=True, eq=False)
class BlockDiagonal(AbstractSymmetric):
    """C = diag(C_1, ..., C_G): `parts` are operators over disjoint groups of blocks that together are the space.

    Raises `InvalidInput` when a block is in no part or in several.
    """

    space: Space
    parts: Mapping[str, AbstractSymmetric]

    def __post_init__(self) -> None:
        names = [name for part in self.parts.values() for name in part.space.blocks]
        if sorted(names) != sorted(self.space.blocks):
            raise InvalidInput(f"Groups over the blocks {names} do not divide the blocks {list(self.space.blocks)}.")

    def apply(self, rows: Rows) -> Rows:
        return join_rows(self.space, (part.apply(restrict_rows(rows, part.space)) for part in self.parts.values()))

    def block_means(self) -> dict[str, float]:
        means = {k: mean for part in self.parts.values() for k, mean in part.block_means().items()}
        return {k: means[k] for k in self.space.blocks}

    def eigenparts(self, decay: Mapping[str, float]) -> tuple[EigenPart, ...] | None:
        parts: list[EigenPart] = []
        for operator in self.parts.values():
            own = operator.eigenparts({name: decay[name] for name in operator.space.blocks})
            if own is None:
                return None
            parts += own
        return tuple(parts)


def subspace(space: Space, names: Iterable[str]) -> Space:
    """Some blocks of a space, in its order."""
    names = set(names)
    blocks = {k: b for k, b in space.blocks.items() if k in names}
    parameters = {p for b in blocks.values() for p in b.parameters}
    return Space(blocks, {k: shape for k, shape in space.shapes.items() if k in parameters})


def restrict_rows(rows: Rows, space: Space) -> Rows:
    """The blocks of `rows` that `space` has."""
    return Rows({k: rows.blocks[k] for k in space.blocks})


def join_rows(space: Space, parts: Iterable[Rows]) -> Rows:
    """Rows over several parts of a space, put together in its order."""
    blocks = {k: block for part in parts for k, block in part.blocks.items()}
    return Rows({k: blocks[k] for k in space.blocks})

"""Coordinates in an eigenbasis: there a damped solve is a division, whatever the damping."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import final

import torch
from jaxtyping import Float
from torch import Tensor

from ..core.errors import InvalidInput
from .blocks import Dense, matrix_shape
from .chunks import chunks
from .kronecker_block import KroneckerBlock
from .rows import Rows
from .space import Space


@final
@dataclass(frozen=True, eq=False)
class EigenPart:
    """The eigenbasis over one or several blocks of a space.

    One block may be seen as the matrix [o, i] that it is; else all are written one after the other as a single row.
    """

    names: tuple[str, ...]
    basis: KroneckerBlock

    @property
    def size(self) -> int:
        """How many coordinates there are."""
        return self.basis.values.numel()

    def coordinates(self, rows: Rows) -> Float[Tensor, "n k"]:
        """The rows' blocks in this basis."""
        first = rows.blocks[self.names[0]]
        if len(self.names) == 1 and matrix_shape(first.shape) == tuple(self.basis.values.shape):
            return self.basis.into_basis(first).flatten(1)
        flat = torch.cat([rows.blocks[name].dense().flatten(1) for name in self.names], 1)
        return self.basis.into_basis(Dense(flat[:, None])).flatten(1)

    def blocks_of(self, coordinates: Float[Tensor, "n k"], space: Space) -> dict[str, Dense]:
        """The rows' blocks that have these coordinates: the inverse of `coordinates`."""
        flat = self.basis.out_of_basis(coordinates.reshape(-1, *self.basis.values.shape)).flatten(1)
        sizes = [space.numel(name) for name in self.names]
        parts = torch.split(flat, sizes, dim=1)
        return {n: Dense(p.reshape(len(p), *space.blocks[n].shape)) for n, p in zip(self.names, parts, strict=True)}


@final
@dataclass(frozen=True, eq=False)
class Eigenbasis:
    """C + weight decay = Q diag(values) Q^T over a whole space, in parts that do not mix.

    Args:
        space: whose rows have coordinates here.
        parts: together they hold every block once; coordinates follow one another in their order.
    """

    space: Space
    parts: tuple[EigenPart, ...]

    @property
    def size(self) -> int:
        """How many coordinates a row has."""
        return sum(part.size for part in self.parts)

    @property
    def dtype(self) -> torch.dtype | None:
        """Of the eigenvectors; None where there are none, and rows of any kind have coordinates."""
        sides = (side for part in self.parts for side in (part.basis.left, part.basis.right))
        return next((side.dtype for side in sides if side is not None), None)

    @property
    def values(self) -> Float[Tensor, " k"]:
        """The eigenvalues, in the order of the coordinates, float64 on the CPU."""
        return torch.cat([part.basis.values.flatten().double().cpu() for part in self.parts])

    def coordinates(self, rows: Rows) -> Float[Tensor, "n k"]:
        """Q^T of every row, in the rows' precision."""
        out = torch.empty(len(rows), self.size, dtype=rows.dtype, device=rows.device)
        for chunk in chunks(len(rows), self.size):
            some, start = rows.take(chunk), 0
            for part in self.parts:
                out[chunk, start : start + part.size] = part.coordinates(some)
                start += part.size
        return out

    def rows_of(self, coordinates: Float[Tensor, "n k"]) -> Rows:
        """Q times coordinates, written out."""
        blocks: dict[str, Dense] = {}
        for part, values in zip(self.parts, torch.split(coordinates, [p.size for p in self.parts], 1), strict=True):
            blocks |= part.blocks_of(values, self.space)
        return Rows({name: blocks[name] for name in self.space.blocks})

    def to(self, dtype: torch.dtype, device: torch.device) -> Eigenbasis:
        """The same basis with its vectors in another precision and place; eigenvalues stay in float64 on the CPU."""

        def moved(vectors: Tensor | None) -> Tensor | None:
            return None if vectors is None else vectors.to(device, dtype)

        parts = []
        for part in self.parts:
            b = part.basis
            values = b.values.double().cpu()
            parts.append(replace(part, basis=KroneckerBlock(moved(b.left), moved(b.right), values)))
        return replace(self, parts=tuple(parts))

    def spread(self, per_block: Mapping[str, float]) -> Float[Tensor, " k"]:
        """One number per block as one per coordinate, float64.

        Raises:
            InvalidInput: blocks that share eigenvectors have different numbers.
        """
        columns = []
        for part in self.parts:
            numbers = {per_block[name] for name in part.names}
            if len(numbers) > 1:
                raise InvalidInput(
                    f"Blocks {', '.join(map(repr, part.names[:3]))} share eigenvectors, so they need one damping, and "
                    "the one asked for (the method's default where none was) differs between them; give one number, or "
                    "Relative(share) without per_block."
                )
            columns.append(torch.full((part.size,), numbers.pop(), dtype=torch.float64))
        return torch.cat(columns)

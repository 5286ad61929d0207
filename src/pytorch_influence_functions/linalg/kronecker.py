"""Block-diagonal curvature, each block in an orthonormal basis that is a Kronecker product.

A block of parameters, seen as a matrix [o, i], has the basis `left` (o x o) times `right` (i x i) and one
eigenvalue per pair: `C_b vec(V) = left ((left^T V right) * values) right^T`. K-FAC, EK-FAC and Shampoo differ only in
where bases and eigenvalues come from (`curvature/kronecker.py`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import ClassVar, final

import torch
from jaxtyping import Float
from torch import Tensor

from .blocks import AbstractBlock
from .chunks import CHUNK_NUMBERS, chunks
from .density import Density
from .eigenbasis import EigenPart
from .kronecker_block import KroneckerBlock
from .operator import AbstractSpectral
from .rows import Rows
from .space import Space
from .turned import Turned

# Rows stay in an eigenbasis whose vectors take at most this part of their numbers.
_FEW = 4


@final
@dataclass(frozen=True, eq=False)
class Kronecker(AbstractSpectral):
    """C = block-diagonal over `blocks`, every eigenvalue known: any function of C costs what C itself does."""

    space: Space
    blocks: Mapping[str, KroneckerBlock]
    notes: tuple[str, ...] = ()
    """Sentences that belong to the result, such as a layer whose gradients are all zero."""
    output_directions: float = math.inf
    """Examples times the directions of their outputs: what a Gauss-Newton matrix of them can have eigenvalues for."""
    layerwise: ClassVar[bool] = True

    def apply(self, rows: Rows) -> Rows:
        return rows.map(lambda name, block: self.blocks[name].apply(block, self.space.blocks[name].shape))

    def applied(self, rows: Rows) -> Rows:
        return rows.map(self._applied)

    def _applied(self, name: str, block: AbstractBlock) -> AbstractBlock:
        kronecker, shape = self.blocks[name], self.space.blocks[name].shape
        # Only many rows are worth it, beside which the eigenvectors, which may have come from disk, take little memory.
        if not 0 < kronecker.turning * _FEW <= len(block) * kronecker.values.numel():
            return kronecker.apply(block, shape)
        return Turned(kronecker, shape, kronecker.coordinates(block))

    def quadratic(self, rows: Rows) -> Float[Tensor, " n"]:
        """b^T C b for every row, at half the cost of `apply`."""
        total = torch.zeros(len(rows), dtype=torch.float64, device=rows.device)
        for name, block in rows.blocks.items():
            kronecker = self.blocks[name]
            values = kronecker.values.to(block.reference)
            for chunk in chunks(len(block), values.numel()):
                coordinates = kronecker.into_basis(block.take(chunk)).flatten(1)
                total[chunk] += torch.einsum("np,np,p->n", coordinates, coordinates, values.flatten()).double()
        return total

    @property
    def directions(self) -> float:
        return self.output_directions

    def block_means(self) -> dict[str, float]:
        return {k: float(b.values.mean(dtype=torch.float64)) for k, b in self.blocks.items()}

    def function(self, f: Callable[[Tensor], Tensor]) -> Kronecker:
        return self.map_values(_Function(f))

    def shifted(self, decay: Mapping[str, float]) -> Kronecker:
        return self.map_values(_Shifted(decay))

    def eigenparts(self, decay: Mapping[str, float]) -> tuple[EigenPart, ...]:
        shifted = self.shifted(decay)
        return tuple(EigenPart((name,), shifted.blocks[name]) for name in self.space.blocks)

    def extremes(self) -> tuple[float, float]:
        ends = [torch.aminmax(b.values) for b in self.blocks.values()]
        return min(float(low) for low, _ in ends), max(float(high) for _, high in ends)

    def trace_of(self, f: Callable[[Tensor], Tensor]) -> float:
        parts = (v for b in self.blocks.values() for v in torch.split(b.values.flatten(), CHUNK_NUMBERS))
        return sum(float(f(part.double()).sum()) for part in parts)

    def known_eigenvalues(self) -> Density:
        return Density.of(torch.cat([b.values.flatten() for b in self.blocks.values()]))

    def diagonal_in_basis(self, diagonal: Rows) -> dict[str, Float[Tensor, "o i"]]:
        """The diagonal of Q^T D Q for a diagonal matrix D, given as one row: as many numbers as eigenvalues."""
        parts = {}
        for name, block in self.blocks.items():
            values = diagonal.blocks[name].dense()[0]
            parts[name] = block.diagonal_in_basis(values.reshape(block.values.shape).to(block.values.device))
        return parts

    @property
    def numbers(self) -> int:
        """How many numbers are stored."""
        return sum(b.numbers for b in self.blocks.values())

    def map_values(self, f: Callable[[str, Tensor], Tensor]) -> Kronecker:
        """The operator in the same basis whose eigenvalues are f(block's name, its eigenvalues)."""
        return replace(self, blocks=_MappedBlocks(self.blocks, f))


# Records and no closures: a fitted method can be pickled with them.


@final
@dataclass(frozen=True, eq=False)
class _Function:
    """f of a block's eigenvalues."""

    f: Callable[[Tensor], Tensor]

    def __call__(self, name: str, values: Tensor) -> Tensor:
        return self.f(values)


@final
@dataclass(frozen=True, eq=False)
class _Shifted:
    """A block's eigenvalues with its weight decay."""

    decay: Mapping[str, float]

    def __call__(self, name: str, values: Tensor) -> Tensor:
        return values + self.decay[name]


def _rows_of(values: Tensor) -> int:
    return max(1, CHUNK_NUMBERS // max(1, values.shape[1]))


@final
@dataclass(frozen=True, eq=False)
class _MappedBlocks(Mapping[str, KroneckerBlock]):
    """Blocks with other eigenvalues, computed when a block is asked for: blocks on disk are read one at a time."""

    blocks: Mapping[str, KroneckerBlock]
    f: Callable[[str, Tensor], Tensor]

    def __getitem__(self, name: str) -> KroneckerBlock:
        block = self.blocks[name]
        # What f is of, and gives, is float64; kept is what the block is kept in.
        values = [
            self.f(name, part.double()).to(part.dtype) for part in torch.split(block.values, _rows_of(block.values))
        ]
        return replace(block, values=torch.cat(values), sides=None)

    def __iter__(self) -> Iterator[str]:
        return iter(self.blocks)

    def __len__(self) -> int:
        return len(self.blocks)

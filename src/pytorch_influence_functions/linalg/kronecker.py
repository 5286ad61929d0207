"""Block-diagonal curvature, each block in an orthonormal basis that is a Kronecker product.

A block of parameters, seen as a matrix [o, i], has the basis `left` (o x o) times `right` (i x i) and one
eigenvalue per pair: `C_b vec(V) = left ((left^T V right) * values) right^T`. K-FAC, EK-FAC and Shampoo differ only in
where bases and eigenvalues come from (`curvature/kronecker.py`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import ClassVar, final

import torch
from jaxtyping import Float
from torch import Tensor

from .blocks import AbstractBlock, Conv, Dense, Indexed, Outer, Sum
from .chunks import CHUNK_NUMBERS, chunks
from .density import Density
from .operator import AbstractSpectral
from .rows import Rows
from .space import Space


@final
@dataclass(frozen=True, eq=False)
class KroneckerBlock:
    """One block's bases and eigenvalues; a basis that is None is the identity.

    `left` [o, o] and `right` [i, i] hold eigenvectors as columns, in the model's dtype; `values` [o, i] are in float64,
    or as they were added up: in the model's dtype. Where the eigenvalues are products, as in K-FAC, `sides` holds their
    factors [o] and [i].
    """

    left: Float[Tensor, "o o"] | None
    right: Float[Tensor, "i i"] | None
    values: Float[Tensor, "o i"]
    sides: tuple[Float[Tensor, " o"], Float[Tensor, " i"]] | None = None

    @property
    def numbers(self) -> int:
        """How many numbers are stored."""
        return sum(t.numel() for t in (self.left, self.right, self.values) if t is not None)

    def into_basis(self, block: AbstractBlock) -> Float[Tensor, "n o i"]:
        """left^T G right for every row, by the cheaper order of products."""
        o, i = self.values.shape
        if isinstance(block, Sum):
            first, *others = (self.into_basis(part) for part in block.parts)
            for other in others:
                first += other
            return first
        if isinstance(block, Indexed) and self.left is None:
            return Indexed(block.index, _multiply(block.values, self.right), block.size).dense()
        if isinstance(block, (Outer, Conv)) and self.factors_are_cheaper(block.terms):
            outer = block if isinstance(block, Outer) else block.outer()
            return Outer(_multiply(outer.left, self.left), _multiply(outer.right, self.right)).dense()
        dense = block.dense().reshape(len(block), o, i)
        if self.left is not None:
            dense = torch.matmul(self.left.T, dense)
        return _multiply(dense, self.right)

    def out_of_basis(self, values: Float[Tensor, "n o i"]) -> Float[Tensor, "n o i"]:
        """left V right^T: out of the eigenbasis."""
        if self.left is not None:
            values = torch.matmul(self.left, values)
        return values if self.right is None else values @ self.right.T

    def diagonal_in_basis(self, diagonal: Float[Tensor, "o i"]) -> Float[Tensor, "o i"]:
        """The diagonal of Q^T diag(d) Q: the mean of d over every eigenvector, weighted by its squared entries."""
        diagonal = diagonal.double()
        if self.left is not None:
            diagonal = self.left.double().square().T @ diagonal
        return diagonal if self.right is None else diagonal @ self.right.double().square()

    def factors_are_cheaper(self, terms: int) -> bool:
        """Whether it costs less to multiply `terms` pairs of factors by the bases than the matrix they stand for."""
        o, i = self.values.shape
        per_factor = (o if self.left is not None else 0) * o + (i if self.right is not None else 0) * i
        per_matrix = (o if self.left is not None else 0) + (i if self.right is not None else 0)
        return terms * per_factor < o * i * per_matrix

    def apply(self, block: AbstractBlock, shape: tuple[int, ...]) -> Dense:
        """The block's curvature times every row."""
        values = self.values.to(block.reference)
        out = block.reference.new_empty(len(block), *values.shape)
        for chunk in chunks(len(block), values.numel()):
            out[chunk] = self.out_of_basis(self.into_basis(block.take(chunk)) * values)
        return Dense(out.reshape(len(block), *shape))


def _multiply(x: Tensor, basis: Tensor | None) -> Tensor:
    return x if basis is None else x @ basis


@final
@dataclass(frozen=True, eq=False)
class Kronecker(AbstractSpectral):
    """C = block-diagonal over `blocks`, every eigenvalue known: any function of C costs what C itself does."""

    space: Space
    blocks: Mapping[str, KroneckerBlock]
    notes: tuple[str, ...] = ()
    """Sentences that belong to the result, such as a layer whose gradients are all zero."""
    layerwise: ClassVar[bool] = True

    def apply(self, rows: Rows) -> Rows:
        return rows.map(lambda name, block: self.blocks[name].apply(block, self.space.blocks[name].shape))

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

    def block_means(self) -> dict[str, float]:
        return {k: float(b.values.mean(dtype=torch.float64)) for k, b in self.blocks.items()}

    def function(self, f: Callable[[Tensor], Tensor]) -> Kronecker:
        return self.map_values(lambda _, values: f(values))

    def shifted(self, decay: Mapping[str, float]) -> Kronecker:
        return self.map_values(lambda name, values: values + decay[name])

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

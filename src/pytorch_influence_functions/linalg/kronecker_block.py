"""The eigenbasis and the eigenvalues of one block of curvature, the block seen as a matrix."""

from __future__ import annotations

from dataclasses import dataclass
from typing import final

import torch
from jaxtyping import Float
from torch import Tensor

from .blocks import AbstractBlock, Conv, Dense, Indexed, Outer, Sum
from .chunks import chunks

# Numbers of rows that are turned at once: each row is turned by itself, and a few stay in cache.
PIECE = 1 << 20


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

    @property
    def turning(self) -> int:
        """Numbers of the eigenvectors: multiply-adds that turning one outer product takes."""
        return sum(side.numel() for side in (self.left, self.right) if side is not None)

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
            dense = _multiply_left(self.left.T, dense)
        return _multiply(dense, self.right)

    def out_of_basis(self, values: Float[Tensor, "n o i"]) -> Float[Tensor, "n o i"]:
        """left V right^T: out of the eigenbasis."""
        if self.left is not None:
            values = _multiply_left(self.left, values)
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
        for chunk in chunks(len(block), values.numel(), PIECE):
            out[chunk] = self.out_of_basis(self.into_basis(block.take(chunk)) * values)
        return Dense(out.reshape(len(block), *shape))

    def coordinates(self, block: AbstractBlock) -> Float[Tensor, "n o i"]:
        """`apply` before it is turned out of the basis."""
        values = self.values.to(block.reference)
        out = block.reference.new_empty(len(block), *values.shape)
        for chunk in chunks(len(block), values.numel(), PIECE):
            torch.mul(self.into_basis(block.take(chunk)), values, out=out[chunk])
        return out


def _multiply(x: Tensor, basis: Tensor | None) -> Tensor:
    return x if basis is None else x @ basis


def _multiply_left(basis: Float[Tensor, "o p"], x: Float[Tensor, "n p i"]) -> Float[Tensor, "n o i"]:
    """basis @ x of every row. Of single columns, as one product: row by row the basis would be read for each."""
    return (x.squeeze(2) @ basis.T).unsqueeze(2) if x.shape[2] == 1 else torch.matmul(basis, x)

"""Rows in an eigenbasis, which are turned out of it only when that costs less than turning what they meet into it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import final

import torch
from jaxtyping import Float
from torch import Tensor

from .blocks import AbstractBlock, Conv, Dense, Outer
from .chunks import chunks
from .kronecker_block import PIECE, KroneckerBlock


@final
@dataclass(eq=False)
class Turned(AbstractBlock):
    """Rows left C right^T of one block, kept as their coordinates C.

    Inner products are the same in the basis as out of it. Turning a training gradient that is a sum of a few outer
    products takes t (o^2 + i^2) operations, and turning one of these rows o i (o + i). How many gradients will come is
    not known: they are turned until that has cost as much as writing these rows out would have, which is then done.

    Args:
        basis: the eigenvectors.
        row_shape: of the block of parameters.
        coordinates: C, [n, o, i]; None once the rows are written out.
    """

    basis: KroneckerBlock
    row_shape: tuple[int, ...]
    coordinates: Float[Tensor, "n o i"] | None
    _dense: Tensor | None = field(default=None, init=False)
    _spent: float = field(default=0.0, init=False)
    _expected: int = field(default=0, init=False)

    @property
    def shape(self) -> tuple[int, ...]:
        return self.row_shape

    @property
    def reference(self) -> Tensor:
        return self._held

    @property
    def numbers(self) -> int:
        return self._held.numel()

    def __len__(self) -> int:
        return len(self._held)

    def dense(self) -> Tensor:
        if self._dense is None:
            assert self.coordinates is not None
            out = torch.empty_like(self.coordinates)
            for piece in chunks(len(out), out[:1].numel(), PIECE):
                out[piece] = self.basis.out_of_basis(self.coordinates[piece])
            self._dense, self.coordinates = out.reshape(len(out), *self.row_shape), None
        return self._dense

    def expect(self, count: int) -> None:
        self._expected = count

    def meets(self, other: AbstractBlock) -> tuple[AbstractBlock, AbstractBlock]:
        """(the other rows, these) in a common basis: that of the eigenvectors, or that of the parameters."""
        if self.coordinates is not None and isinstance(other, (Outer, Conv)):
            o, i = self.basis.values.shape
            cost = len(other) * other.terms * float(self.basis.turning)
            writing = float(len(self)) * o * i * sum(side.shape[0] for side in self._sides)
            if max(self._spent + cost, cost / len(other) * self._expected) <= writing:
                self._spent += cost
                return other.project(self.basis.left, self.basis.right), Dense(self.coordinates)
        return other, Dense(self.dense())

    def take(self, index: Tensor | slice) -> AbstractBlock:
        if self.coordinates is None:
            return Dense(self.dense()[index])
        return Turned(self.basis, self.row_shape, self.coordinates[index])

    def scale(self, factor: Tensor | float) -> AbstractBlock:
        if self.coordinates is None:
            return Dense(self.dense()).scale(factor)
        return Turned(self.basis, self.row_shape, Dense(self.coordinates).scale(factor).dense())

    def to(self, dtype: torch.dtype) -> Dense:
        return Dense(self.dense().to(dtype))

    def squared_norms(self) -> Float[Tensor, " n"]:
        return Dense(self._held).squared_norms()

    def sums(self) -> Float[Tensor, " n"]:
        return Dense(self._held).sums()

    def combine(self, weights: Float[Tensor, "q n"]) -> Tensor:
        combined = Dense(self._held).combine(weights)
        if self.coordinates is not None:
            combined = self.basis.out_of_basis(combined)
        return combined.reshape(len(weights), *self.row_shape)

    @property
    def _held(self) -> Tensor:
        held = self._dense if self.coordinates is None else self.coordinates
        assert held is not None
        return held

    @property
    def _sides(self) -> list[Tensor]:
        return [side for side in (self.basis.left, self.basis.right) if side is not None]

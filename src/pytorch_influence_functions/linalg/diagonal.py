"""C with nothing off its diagonal: one eigenvalue per parameter."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import final

import torch
from jaxtyping import Float
from torch import Tensor

from ..core.errors import InvalidInput
from .blocks import Dense, matrix_shape
from .density import Density
from .eigenbasis import EigenPart
from .kronecker_block import KroneckerBlock
from .operator import AbstractSpectral, diagonal_vector, means_of_diagonal
from .rows import Rows
from .space import Space


@final
@dataclass(frozen=True, eq=False)
class DiagonalOperator(AbstractSpectral):
    """C = diag(values) over the flattened space, values [P] in float64. Products cost P; raises `InvalidInput` for a
    wrong length."""

    space: Space
    values: Float[Tensor, " p"]

    def __post_init__(self) -> None:
        if len(self.values) != self.size:
            raise InvalidInput(f"The diagonal has {len(self.values)} entries; the space has {self.size} parameters.")

    def apply(self, rows: Rows) -> Rows:
        columns = self.space.slices
        products = {}
        for name, block in rows.blocks.items():
            dense = block.dense()
            products[name] = Dense(dense * self.values[columns[name]].to(dense).view(1, *dense.shape[1:]))
        return Rows(products)

    def block_means(self) -> dict[str, float]:
        return means_of_diagonal(self.space, self.values)

    def function(self, f: Callable[[Tensor], Tensor]) -> DiagonalOperator:
        return replace(self, values=f(self.values))

    def shifted(self, decay: Mapping[str, float]) -> DiagonalOperator:
        return replace(self, values=self.values + diagonal_vector(self.space, decay).to(self.values))

    def eigenparts(self, decay: Mapping[str, float]) -> tuple[EigenPart, ...]:
        values = self.shifted(decay).values
        parts = []
        for name, columns in self.space.slices.items():
            shape = matrix_shape(self.space.blocks[name].shape)
            parts.append(EigenPart((name,), KroneckerBlock(None, None, values[columns].double().reshape(shape))))
        return tuple(parts)

    def extremes(self) -> tuple[float, float]:
        return float(torch.min(self.values)), float(torch.max(self.values))

    def known_eigenvalues(self) -> Density:
        return Density.of(self.values)

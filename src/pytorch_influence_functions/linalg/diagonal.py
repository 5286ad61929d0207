"""C with nothing off its diagonal: one eigenvalue per parameter."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import final

import torch
from jaxtyping import Float
from torch import Tensor

from ..core.errors import InvalidInput
from .blocks import Dense
from .operator import AbstractSpectral
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
        where = self.space.slices
        made = {}
        for name, block in rows.blocks.items():
            dense = block.dense()
            made[name] = Dense(dense * self.values[where[name]].to(dense).view(1, *dense.shape[1:]))
        return Rows(made)

    def block_means(self) -> dict[str, float]:
        return {k: float(self.values[part].mean()) for k, part in self.space.slices.items()}

    def function(self, f: Callable[[Tensor], Tensor]) -> DiagonalOperator:
        return replace(self, values=f(self.values))

    def shifted(self, decay: Mapping[str, float]) -> DiagonalOperator:
        added = self.values.clone()
        for name, part in self.space.slices.items():
            added[part] += decay[name]
        return replace(self, values=added)

    def extremes(self) -> tuple[float, float]:
        return float(torch.min(self.values)), float(torch.max(self.values))

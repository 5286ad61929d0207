"""C = scale * I, or one scale per block."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from .blocks import matrix_shape
from .density import Density
from .eigenbasis import EigenPart
from .kronecker_block import KroneckerBlock
from .operator import AbstractSpectral
from .rows import Rows
from .space import Space


@dataclass(frozen=True, eq=False)
class ScaledIdentity(AbstractSpectral):
    """C = scale * I, or one scale per block. With scale 1 the influence is the gradient dot product."""

    layerwise: ClassVar[bool] = True

    space: Space
    scale: float | Mapping[str, float] = 1.0

    def _per_block(self) -> dict[str, float]:
        if isinstance(self.scale, Mapping):
            return {k: float(self.scale[k]) for k in self.space.blocks}
        return dict.fromkeys(self.space.blocks, float(self.scale))

    def apply(self, rows: Rows) -> Rows:
        return rows if self.scale == 1.0 else rows.scaled(self._per_block())

    def quadratic(self, rows: Rows) -> Float[Tensor, " n"]:
        """b^T C b for every row: no gradient is written out for its norm."""
        scales = self._per_block()
        norms = [block.squared_norms().double() * scales[name] for name, block in rows.blocks.items()]
        return torch.stack(norms).sum(0)

    def block_means(self) -> dict[str, float]:
        return self._per_block()

    def function(self, f: Callable[[Tensor], Tensor]) -> ScaledIdentity:
        scales = self._per_block()
        values = f(torch.tensor(list(scales.values()), dtype=torch.float64)).tolist()
        return ScaledIdentity(self.space, dict(zip(scales, values, strict=True)))

    def shifted(self, decay: Mapping[str, float]) -> ScaledIdentity:
        return ScaledIdentity(self.space, {k: v + decay[k] for k, v in self._per_block().items()})

    def eigenparts(self, decay: Mapping[str, float]) -> tuple[EigenPart, ...]:
        parts = []
        for name, scale in self._per_block().items():
            shape = matrix_shape(self.space.blocks[name].shape)
            values = torch.full(shape, scale + decay[name], dtype=torch.float64)
            parts.append(EigenPart((name,), KroneckerBlock(None, None, values)))
        return tuple(parts)

    def extremes(self) -> tuple[float, float]:
        values = self._per_block().values()
        return min(values), max(values)

    def known_eigenvalues(self) -> Density:
        scales = self._per_block()
        counts = [float(self.space.numel(name)) for name in scales]
        return Density.of(torch.tensor(list(scales.values()), dtype=torch.float64), torch.tensor(counts))

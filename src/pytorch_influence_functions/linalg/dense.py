"""Dense symmetric matrices over the flattened space, and their eigendecompositions."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import cast

import torch
from jaxtyping import Float
from torch import Tensor

from ..core.errors import InvalidInput, NonFinite
from .density import Density
from .eigenbasis import EigenPart
from .kronecker_block import KroneckerBlock
from .operator import AbstractSpectral, Cache, cache_field, dense_bytes, diagonal_vector, means_of_diagonal
from .resolvent import Resolvent
from .rows import Rows
from .space import Space

# The key of the decomposition of C itself.
_NO_DECAY: tuple[()] = ()


@dataclass(frozen=True, eq=False)
class Eigen(AbstractSpectral):
    """C = Q diag(lam) Q^T over the flattened space, kept in that form: Q [P, P] and lam [P], both float64."""

    space: Space
    vectors: Float[Tensor, "p p"]
    values: Float[Tensor, " p"]

    @property
    def decomposition_bytes(self) -> int:
        return dense_bytes(self.size)

    def apply(self, rows: Rows) -> Rows:
        flat = rows.flat()
        out = (flat.to(self.vectors) @ self.vectors * self.values) @ self.vectors.T
        return self.space.rows(out.to(flat))

    def block_means(self) -> dict[str, float]:
        return means_of_diagonal(self.space, self.vectors.square() @ self.values)

    def function(self, f: Callable[[Tensor], Tensor]) -> Eigen:
        return Eigen(self.space, self.vectors, f(self.values))

    def shifted(self, decay: Mapping[str, float]) -> Eigen:
        dense = (self.vectors * self.values) @ self.vectors.T
        values, vectors = torch.linalg.eigh(dense + diagonal_vector(self.space, decay).to(dense).diag())
        return Eigen(self.space, vectors, values)

    def eigenparts(self, decay: Mapping[str, float]) -> tuple[EigenPart, ...]:
        decayed = self.shifted(decay) if any(decay.values()) else self
        return (EigenPart(tuple(self.space.blocks), KroneckerBlock(None, decayed.vectors, decayed.values[None])),)

    def extremes(self) -> tuple[float, float]:
        return float(self.values.min()), float(self.values.max())

    def known_eigenvalues(self) -> Density:
        return Density.of(self.values)

    def resolvent(self) -> Resolvent:
        decayed = self.shifted(self.space.decay) if any(self.space.decay.values()) else self
        return Resolvent(lambda rows: rows.flat().to(decayed.vectors) @ decayed.vectors, decayed.values)


@dataclass(frozen=True, eq=False)
class Matrix(AbstractSpectral):
    """A dense symmetric matrix over the flattened space; its eigenvalues are computed once, when first asked for.

    Raises `InvalidInput` for a wrong shape, `NonFinite` for NaN or infinity.
    """

    space: Space
    matrix: Float[Tensor, "p p"]
    most: float = math.inf
    """The most eigenvalues that can differ from zero, as so many rows were added up; inf: not known."""
    _known: Cache = cache_field()

    def __post_init__(self) -> None:
        if tuple(self.matrix.shape) != (self.size, self.size):
            raise InvalidInput(
                f"The matrix has shape {tuple(self.matrix.shape)}; the space has {self.size} parameters."
            )

    @property
    def directions(self) -> float:
        return self.most

    @property
    def decomposition_bytes(self) -> int:
        return dense_bytes(self.size)

    def apply(self, rows: Rows) -> Rows:
        flat = rows.flat()
        return self.space.rows((flat.to(self.matrix) @ self.matrix.T).to(flat))

    def block_means(self) -> dict[str, float]:
        return means_of_diagonal(self.space, self.matrix.diagonal())

    def _double(self) -> Tensor:
        if not bool(torch.isfinite(self.matrix).all()):
            raise NonFinite("The curvature matrix holds NaN or infinity; look for them in weights, data or loss.")
        exact = self.matrix.double()
        return (exact + exact.T).div_(2)

    def eigen(self, decay: Mapping[str, float] | None = None) -> Eigen:
        """The float64 eigendecomposition of C + diag(decay), cached per decay."""
        key = tuple(sorted(decay.items())) if decay else _NO_DECAY
        if key not in self._known:
            dense = self._double()
            if decay:
                dense.diagonal().add_(diagonal_vector(self.space, decay).to(dense))
            values, vectors = torch.linalg.eigh(dense)
            self._known[key] = Eigen(self.space, vectors, values)
        return cast(Eigen, self._known[key])

    def function(self, f: Callable[[Tensor], Tensor]) -> Eigen:
        return self.eigen().function(f)

    def shifted(self, decay: Mapping[str, float]) -> Eigen:
        return self.eigen(decay)

    def eigenparts(self, decay: Mapping[str, float]) -> tuple[EigenPart, ...]:
        return self.eigen(decay if any(decay.values()) else None).eigenparts(dict.fromkeys(decay, 0.0))

    def extremes(self) -> tuple[float, float]:
        return self.eigen().extremes()

    def known_eigenvalues(self) -> Density:
        return self.eigen().known_eigenvalues()

    def resolvent(self) -> Resolvent:
        decayed = self.eigen(self.space.decay if any(self.space.decay.values()) else None)
        return Resolvent(lambda rows: rows.flat().to(decayed.vectors) @ decayed.vectors, decayed.values)

    @property
    def eigenvalues_at_hand(self) -> bool:
        return _NO_DECAY in self._known

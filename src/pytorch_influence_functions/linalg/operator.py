"""Linear maps on rows: what is known of a curvature decides which solver may use it.

`AbstractOperator` can be applied; `AbstractSymmetric` also knows its mean eigenvalue; `AbstractSpectral` knows all its
eigenvalues, so any function of it is free. A solver that needs more than an operator's type promises refuses it.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import field
from typing import Any, ClassVar, Final

import torch
from jaxtyping import Float, Int
from torch import Tensor

from .density import Density
from .eigenbasis import EigenPart
from .resolvent import Resolvent
from .rows import Rows
from .space import Space

# A mean eigenvalue that is this share of the others' is rounding: gradients of 1e-6 times theirs.
_ROUNDING: Final = 1e-12

Cache = dict[Any, Any]


def cache_field() -> Any:
    """A field that starts as an empty `Cache`."""
    return field(default_factory=dict, init=False, repr=False)


class AbstractOperator(ABC):
    """A linear map from rows to rows over one `space`."""

    space: Space
    layerwise: ClassVar[bool] = False
    """Whether it is applied block by block, so that nothing of the size of all rows need be written out."""

    @abstractmethod
    def apply(self, rows: Rows) -> Rows:
        """C applied to every row; rows keep their order, dtype and device."""

    def applied(self, rows: Rows) -> Rows:
        """The same as `apply`, in a form that may be written out only when that pays."""
        return self.apply(rows)

    def quadratic(self, rows: Rows) -> Float[Tensor, " n"]:
        """b^T A b for every row."""
        return rows.rowwise(self.apply(rows))

    def answered_part(self, flat: Float[Tensor, "n p"]) -> Float[Tensor, "n p"]:
        """The part of every vector that functions of this operator answer for: all, unless it drops directions."""
        return flat

    @property
    def kept_rows(self) -> Rows | None:
        """The rows it is made of, where it keeps them."""
        return None

    @property
    def product_rounding(self) -> float:
        """The relative error of a product, where it is computed in less than the rows' precision; 0 elsewhere."""
        return 0.0

    @property
    def decomposition_bytes(self) -> int:
        """What a solver needs that decomposes it."""
        return 0

    @property
    def size(self) -> int:
        """P, the number of parameters."""
        return int(self.space.size)


class AbstractSymmetric(AbstractOperator):
    """A symmetric operator whose scale is known."""

    @abstractmethod
    def block_means(self) -> dict[str, float]:
        """trace(C_bb) / P_b for every block b: the mean eigenvalue of each diagonal block."""

    def mean_eigenvalue(self) -> float:
        """trace(C) / P."""
        return sum(mean * self.space.numel(name) for name, mean in self.block_means().items()) / self.size

    @property
    def directions(self) -> float:
        """The most eigenvalues that can differ from zero, by the number of examples and outputs; inf: not known."""
        return math.inf

    def mean_determined(self) -> float:
        """trace(C) over the number of eigenvalues that can differ from zero."""
        means = self.block_means()
        return mean_determined(means, {name: self.space.numel(name) for name in means}, self.directions)

    def known_eigenvalues(self) -> Density | None:
        """Every eigenvalue, where the operator has them or one decomposition gives them; None where it does not."""
        return None

    def trace_of(self, f: Callable[[Tensor], Tensor]) -> float:
        """trace f(C) from the eigenvalues that are known; NaN where they are not."""
        density = self.known_eigenvalues()
        return math.nan if density is None else density.sum(f)[0]

    def eigenparts(self, decay: Mapping[str, float]) -> tuple[EigenPart, ...] | None:
        """An eigenbasis of C + diag(decay), one number per block, in parts that do not mix; None if unknown."""
        return None

    def resolvent(self) -> Resolvent | None:
        """(C + decay + lambda)^-1 for every lambda, with the space's weight decay; None without a decomposition."""
        return None

    @property
    def eigenvalues_at_hand(self) -> bool:
        """Whether `known_eigenvalues` costs nothing more, because no decomposition is needed or it is done."""
        return False


def mean_determined(means: Mapping[str, float], sizes: Mapping[str, int], directions: float) -> float:
    """trace(C) over the number of eigenvalues that can differ from zero.

    Args:
        means: the mean eigenvalue of every block; a block of 0, but for rounding, has no part.
        sizes: how many parameters each has.
        directions: the most eigenvalues that can differ from zero in all blocks together; where that is 0, the mean
            over all parameters is given.
    """
    trace = sum(mean * sizes[name] for name, mean in means.items())
    overall = trace / max(1, sum(sizes[name] for name in means))
    moved = sum(sizes[name] for name, mean in means.items() if has_scale(mean, overall))
    return trace / min(moved, directions) if moved and directions > 0 else overall


def has_scale(mean: float, overall: float) -> bool:
    """Whether a block's mean eigenvalue is more than rounding beside that of all blocks.

    It is not where all gradients of a block are zero (a padding row, a dead layer, a bias that a softmax over places
    cancels), nor where they are so but for rounding.
    """
    return mean > _ROUNDING * overall


class AbstractSampled(AbstractSymmetric):
    """A mean over training examples, which can also be taken over a few of them."""

    @property
    @abstractmethod
    def examples(self) -> int:
        """How many examples can be sampled; 0 when this operator cannot be split."""

    @abstractmethod
    def apply(self, rows: Rows, ids: Int[Tensor, " b"] | None = None) -> Rows:
        """C applied to every row; with `ids`, the mean over those examples only instead of all."""


class AbstractSpectral(AbstractSymmetric):
    """C = Q diag(lam) Q^T with both known: inverse, root or exponential are a choice of f."""

    @abstractmethod
    def function(self, f: Callable[[Tensor], Tensor]) -> AbstractSpectral:
        """f(C). `f` maps a float64 tensor of eigenvalues to one of the same shape."""

    @abstractmethod
    def shifted(self, decay: Mapping[str, float]) -> AbstractSpectral:
        """C + diag(decay), one number per block."""

    @abstractmethod
    def extremes(self) -> tuple[float, float]:
        """The smallest and the largest eigenvalue."""

    @abstractmethod
    def known_eigenvalues(self) -> Density: ...

    @property
    def eigenvalues_at_hand(self) -> bool:
        return True


def apply_flat(operator: AbstractOperator, x: Float[Tensor, "n p"]) -> Float[Tensor, "n p"]:
    """An operator on rows written out as one matrix."""
    return operator.apply(operator.space.rows(x)).flat()


def diagonal_vector(space: Space, per_block: Mapping[str, float]) -> Float[Tensor, " p"]:
    """One number per block, spread over the space's flat order, in float64."""
    return torch.cat([torch.full((space.numel(k),), per_block[k], dtype=torch.float64) for k in space.blocks])


def means_of_diagonal(space: Space, values: Float[Tensor, " p"]) -> dict[str, float]:
    """The mean of every block's entries of a diagonal."""
    return {k: float(values[columns].double().mean()) for k, columns in space.slices.items()}


def dense_bytes(size: int) -> int:
    """What a float64 [P, P] matrix, a symmetric copy, its eigenvectors and LAPACK's workspace take: 5 P^2 numbers."""
    return 5 * 8 * size * size

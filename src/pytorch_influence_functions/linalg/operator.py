"""Linear maps on rows: what is known of a curvature decides which solver may use it.

`AbstractOperator` can be applied; `AbstractSymmetric` also knows its mean eigenvalue; `AbstractSpectral`
knows all its eigenvalues, so any function of it is free. Asking for more than the type promises is an error
at the door.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from ..core.errors import TooLarge
from .rows import Rows
from .space import Space

Cache = dict[Any, Any]


def cache_field() -> Any:
    return field(default_factory=dict, init=False, repr=False)


class AbstractOperator(ABC):
    """A linear map from rows to rows over one `space`."""

    space: Space

    @abstractmethod
    def apply(self, rows: Rows) -> Rows:
        """The map applied to every row; rows keep their order, dtype and device."""

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


def diagonal(space: Space, per_block: Mapping[str, float]) -> Float[Tensor, " p"]:
    """One number per block, spread over the space's flat order, in float64."""
    return torch.cat([torch.full((space.numel(k),), per_block[k], dtype=torch.float64) for k in space.blocks])


def means_of_diagonal(space: Space, values: Float[Tensor, " p"]) -> dict[str, float]:
    return {k: float(values[part].double().mean()) for k, part in space.slices.items()}


def dense_bytes(size: int) -> int:
    """What a float64 [P, P] matrix, its eigenvectors and LAPACK's workspace take: 4 P^2 numbers."""
    return 4 * 8 * size * size


def check_dense(size: int, max_bytes: int, what: str) -> None:
    """Raise `TooLarge`, with both numbers and the way out, when a dense [P, P] curvature would not fit."""
    if dense_bytes(size) > max_bytes:
        raise TooLarge(
            f"{what} of {size} parameters needs {dense_bytes(size) / 2**30:.2f} GiB, above the bound of "
            f"{max_bytes / 2**30:.2f} GiB; use CG() or Woodbury(), select fewer parameters, "
            "or raise max_bytes."
        )


@dataclass(frozen=True, eq=False)
class Identity(AbstractSpectral):
    """C = scale * I, or one scale per block. With scale 1 the influence is the gradient dot product."""

    space: Space
    scale: float | Mapping[str, float] = 1.0

    def _per_block(self) -> dict[str, float]:
        if isinstance(self.scale, Mapping):
            return {k: float(self.scale[k]) for k in self.space.blocks}
        return dict.fromkeys(self.space.blocks, float(self.scale))

    def apply(self, rows: Rows) -> Rows:
        return rows if self.scale == 1.0 else rows.scaled(self._per_block())

    def block_means(self) -> dict[str, float]:
        return self._per_block()

    def function(self, f: Callable[[Tensor], Tensor]) -> Identity:
        scales = self._per_block()
        new = f(torch.tensor(list(scales.values()), dtype=torch.float64)).tolist()
        return Identity(self.space, dict(zip(scales, new, strict=True)))

    def shifted(self, decay: Mapping[str, float]) -> Identity:
        return Identity(self.space, {k: v + decay[k] for k, v in self._per_block().items()})

    def extremes(self) -> tuple[float, float]:
        values = self._per_block().values()
        return min(values), max(values)


@dataclass(frozen=True, eq=False)
class Implicit(AbstractSampled):
    """A curvature known only by its products.

    `product(rows, ids)` applies C to every row, over all data when `ids` is None, else the mean over those
    examples; `mean()` gives trace(C_bb) / P_b per block, or one number for all of them, and is called at most once;
    `count` is N.
    """

    space: Space
    product: Callable[[Rows, Tensor | None], Rows]
    mean: Callable[[], float | Mapping[str, float]]
    count: int
    _known: Cache = cache_field()

    @property
    def examples(self) -> int:
        return self.count

    def apply(self, rows: Rows, ids: Int[Tensor, " b"] | None = None) -> Rows:
        return self.product(rows, ids)

    def block_means(self) -> dict[str, float]:
        if "means" not in self._known:
            found = self.mean()
            one = dict.fromkeys(self.space.blocks, found) if isinstance(found, (int, float)) else dict(found)
            self._known["means"] = {k: float(v) for k, v in one.items()}
        return dict(self._known["means"])

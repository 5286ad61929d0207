"""Linear maps on rows: what is known of a curvature decides which solver may use it.

`AbstractOperator` can be applied; `AbstractSymmetric` also knows its mean eigenvalue; `AbstractSpectral`
knows all its eigenvalues, so any function of it is free. Asking for more than the type promises is an error
at the door.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from jaxtyping import Float, Int
from torch import Tensor

from ..errors import InvalidInput, NonFinite, TooLarge
from ..rows import Rows
from ..space import Space

Cache = dict[Any, Any]


def _cache() -> Any:
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


def _means_of_diagonal(space: Space, values: Float[Tensor, " p"]) -> dict[str, float]:
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
class Eigen(AbstractSpectral):
    """C = Q diag(lam) Q^T over the flattened space, kept in that form: Q [P, P] and lam [P], both float64."""

    space: Space
    vectors: Float[Tensor, "p p"]
    values: Float[Tensor, " p"]

    def apply(self, rows: Rows) -> Rows:
        flat = rows.flat()
        out = (flat.to(self.vectors) @ self.vectors * self.values) @ self.vectors.T
        return self.space.rows(out.to(flat))

    def block_means(self) -> dict[str, float]:
        return _means_of_diagonal(self.space, self.vectors.square() @ self.values)

    def function(self, f: Callable[[Tensor], Tensor]) -> Eigen:
        return Eigen(self.space, self.vectors, f(self.values))

    def shifted(self, decay: Mapping[str, float]) -> Eigen:
        dense = (self.vectors * self.values) @ self.vectors.T
        values, vectors = torch.linalg.eigh(dense + diagonal(self.space, decay).to(dense).diag())
        return Eigen(self.space, vectors, values)

    def extremes(self) -> tuple[float, float]:
        return float(self.values.min()), float(self.values.max())


@dataclass(frozen=True, eq=False)
class Matrix(AbstractSpectral):
    """A dense symmetric matrix over the flattened space; its eigenvalues are computed once, when first asked
    for.

    Raises `InvalidInput` for a wrong shape, `NonFinite` for NaN or infinity.
    """

    space: Space
    matrix: Float[Tensor, "p p"]
    _known: Cache = _cache()

    def __post_init__(self) -> None:
        if tuple(self.matrix.shape) != (self.size, self.size):
            raise InvalidInput(
                f"The matrix has shape {tuple(self.matrix.shape)}; the space has {self.size} parameters."
            )

    def apply(self, rows: Rows) -> Rows:
        flat = rows.flat()
        return self.space.rows((flat.to(self.matrix) @ self.matrix.T).to(flat))

    def block_means(self) -> dict[str, float]:
        return _means_of_diagonal(self.space, self.matrix.diagonal())

    def _double(self) -> Tensor:
        if not bool(torch.isfinite(self.matrix).all()):
            raise NonFinite("The curvature matrix holds NaN or infinity; look for them in weights, data or loss.")
        exact = self.matrix.double()
        return (exact + exact.T) / 2

    def eigen(self, decay: Mapping[str, float] | None = None) -> Eigen:
        """The float64 eigendecomposition of C + diag(decay), cached per decay."""
        key = tuple(sorted((decay or {}).items()))
        if key not in self._known:
            dense = self._double()
            if decay:
                dense = dense + diagonal(self.space, decay).to(dense).diag()
            values, vectors = torch.linalg.eigh(dense)
            self._known[key] = Eigen(self.space, vectors, values)
        return cast(Eigen, self._known[key])

    def function(self, f: Callable[[Tensor], Tensor]) -> Eigen:
        return self.eigen().function(f)

    def shifted(self, decay: Mapping[str, float]) -> Eigen:
        return self.eigen(decay)

    def extremes(self) -> tuple[float, float]:
        return self.eigen().extremes()


@dataclass(frozen=True, eq=False)
class Gram(AbstractSampled):
    """C = G^T G / count for stored rows G [m]: empirical Fisher (G = gradients) or GGN (G = H^1/2 J, m = N *
    k).

    Nothing of size P x P or m x P is made; the dual solves with `gram()`, which is m x m and cached.
    """

    space: Space
    rows: Rows
    count: int
    _known: Cache = _cache()

    def __post_init__(self) -> None:
        if self.count < 1:
            raise InvalidInput(f"Gram(count={self.count}) needs the number of training examples, at least 1.")

    @property
    def examples(self) -> int:
        # Only when row i is example i does "the mean over some examples" have a meaning here.
        return self.count if len(self.rows) == self.count else 0

    def apply(self, rows: Rows, ids: Int[Tensor, " b"] | None = None) -> Rows:
        basis, count = self.rows, self.count
        if ids is not None:
            if not self.examples:
                raise InvalidInput(
                    f"These {len(self.rows)} rows are not one per example (count={self.count}), "
                    "so a few examples cannot be picked; leave batch_size unset."
                )
            basis, count = self.rows.take(ids), len(ids)
        return basis.combine(rows.inner(basis) / count)

    def block_means(self) -> dict[str, float]:
        if "means" not in self._known:
            traces = {k: float(b.squared_norms().double().sum()) / self.count for k, b in self.rows.blocks.items()}
            self._known["means"] = {k: trace / self.space.numel(k) for k, trace in traces.items()}
        return dict(self._known["means"])

    def gram(self) -> Float[Tensor, "m m"]:
        """K = G G^T in float64 (accumulated in the rows' own dtype), computed once."""
        return self.gram_by(dict.fromkeys(self.rows.blocks, 0))[0]

    def gram_by(self, groups: Mapping[str, Any]) -> dict[Any, Float[Tensor, "m m"]]:
        """K per group of blocks; `groups` maps every block to its group, and the groups sum to `gram()`."""
        names: dict[frozenset[str], Any] = {
            frozenset(k for k in self.rows.blocks if groups[k] == key): key for key in set(groups.values())
        }
        out = {}
        for members, key in names.items():
            if members not in self._known:
                part = Rows({k: b for k, b in self.rows.blocks.items() if k in members})
                k = part.inner(part).double()
                self._known[members] = (k + k.T).div_(2)
            out[key] = self._known[members]
        return out

    def eigen(self) -> tuple[Float[Tensor, " m"], Float[Tensor, "m m"]]:
        """Eigenvalues (clamped at 0: rounding can leave tiny negative ones) and eigenvectors of `gram()`,
        once."""
        if "eigen" not in self._known:
            values, vectors = torch.linalg.eigh(self.gram())
            self._known["eigen"] = values.clamp_min(0.0), vectors
        return cast("tuple[Tensor, Tensor]", self._known["eigen"])

    @property
    def has_eigen(self) -> bool:
        """Whether the eigendecomposition has been paid for already."""
        return "eigen" in self._known


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
    _known: Cache = _cache()

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

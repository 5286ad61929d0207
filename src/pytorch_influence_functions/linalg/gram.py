"""C = G^T G / N, stored as the rows G it is made of."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar, cast

import torch
from jaxtyping import Float, Int
from torch import Tensor

from ..core.distributed import current
from ..core.errors import InvalidInput
from ..core.validate import whole_number
from .density import Density
from .operator import AbstractSampled, Cache, cache_field
from .panels import Panels, panel_width
from .resolvent import Resolvent
from .rows import Rows
from .rows_together import products_of
from .space import Space

Product = TypeVar("Product")


@dataclass(frozen=True, eq=False)
class Gram(AbstractSampled):
    """C = G^T G / count for stored rows G [m]: empirical Fisher (G = gradients) or GGN (G = H^1/2 J, m = N * k).

    Nothing of size P x P or m x P is made; the dual solves with `gram()`, which is m x m and cached, or with the panels
    of it that each process of a `distributed()` block has.

    Args:
        space: of the rows.
        rows: the same on every process.
        count: what G^T G is divided by.
        sharers: how many processes have the rows.
    """

    space: Space
    rows: Rows
    count: int
    sharers: int = 1
    _known: Cache = cache_field()

    def __post_init__(self) -> None:
        whole_number("count", self.count, owner=self, hint="give the number of training examples")

    @property
    def examples(self) -> int:
        # Only when row i is example i does "the mean over some examples" have a meaning here.
        return self.count if len(self.rows) == self.count else 0

    @property
    def directions(self) -> float:
        return float((self.rows.squared_norms() > 0).sum())

    @property
    def kept_rows(self) -> Rows:
        return self.rows

    @property
    def decomposition_bytes(self) -> int:
        return gram_bytes(len(self.rows), self.sharers if self.is_shared else 1)

    @property
    def is_shared(self) -> bool:
        """Whether the processes that have the rows are computing together now, so that each needs a part of K only."""
        return 1 < self.sharers == current().size

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
        """K = G G^T in float64 (its products taken in `precision`), computed once."""
        return self.gram_by(dict.fromkeys(self.rows.blocks, 0))[0]

    def panels_by(self, groups: Mapping[str, Any]) -> dict[Any, Panels]:
        """K per group of blocks as the panels of every process, where it `is_shared`; see `gram_by`."""
        return self._by(groups, Panels.of_products, "panels")

    def times(self, w: Float[Tensor, "n m"]) -> Float[Tensor, "n m"]:
        """w K."""
        return self._panels().times(w) if self.is_shared else w @ self.gram()

    def gram_diagonal(self) -> Float[Tensor, " m"]:
        """The diagonal of K."""
        return self._panels().diagonal() if self.is_shared else self.gram().diagonal()

    def _panels(self) -> Panels:
        return self.panels_by(dict.fromkeys(self.rows.blocks, 0))[0]

    def gram_by(self, groups: Mapping[str, Any]) -> dict[Any, Float[Tensor, "m m"]]:
        """K per group of blocks; `groups` maps every block to its group, and the groups sum to `gram()`."""
        return self._by(groups, products_of, "whole")

    def _by(
        self, groups: Mapping[str, Any], make: Callable[[Rows, torch.dtype | None], Product], form: str
    ) -> dict[Any, Product]:
        """Inner products of the rows per group of blocks, made once in every form."""
        names: dict[frozenset[str], Any] = {
            frozenset(k for k in self.rows.blocks if groups[k] == key): key for key in set(groups.values())
        }
        out = {}
        for members, key in names.items():
            if (form, members) not in self._known:
                part = Rows({k: b for k, b in self.rows.blocks.items() if k in members})
                self._known[form, members] = make(part, self.wider)
            out[key] = self._known[form, members]
        return out

    @property
    def precision(self) -> torch.dtype:
        """Of the inner products: float32 at least, and float64 after `refine`."""
        return self.wider or torch.promote_types(self.rows.dtype, torch.float32)

    @property
    def wider(self) -> torch.dtype | None:
        """The precision of inner products, where it is not the rows' own."""
        narrow = torch.finfo(self.rows.dtype).bits < 32
        wider: torch.dtype | None = self._known.get("precision", torch.float32 if narrow else None)
        return wider

    def refine(self) -> None:
        """Take inner products in float64 from here on, for a damping that float32 does not resolve."""
        first = self._known.get("first damping")
        self._known.clear()
        self._known["precision"] = torch.float64
        if first is not None:
            self._known["first damping"] = first

    @property
    def notes(self) -> tuple[str, ...]:
        """What should be read with scores."""
        if "precision" not in self._known:
            return ()
        return ("inner products of gradients were taken in float64: the damping is below the rounding of float32",)

    def eigen(self) -> tuple[Float[Tensor, " m"], Float[Tensor, "m m"]]:
        """Eigenvalues (clamped at 0: rounding can leave tiny negative ones) and eigenvectors of `gram()`, once."""
        if "eigen" not in self._known:
            values, vectors = torch.linalg.eigh(self.gram())
            self._known["eigen"] = values.clamp_min(0.0), vectors
        return cast("tuple[Tensor, Tensor]", self._known["eigen"])

    def known_eigenvalues(self) -> Density:
        values = self.eigen()[0] / self.count
        if len(values) > self.size:
            # A Gram matrix larger than the space has zeros that are no eigenvalues of C.
            values = values.sort().values[-self.size :]
        return Density.of(values, zeros=self.size - len(values))

    def resolvent(self) -> Resolvent:
        decays = set(self.space.decay.values())
        if len(decays) > 1:
            raise InvalidInput(
                "One decomposition of the dual needs one weight decay for all blocks, and they differ; use Spectral() "
                "instead of Woodbury(), or give the damping as a number."
            )
        values, vectors = self.eigen()
        rows = self.rows
        return Resolvent(lambda x: x.inner(rows).double() @ vectors, values, next(iter(decays), 0.0), self.count)

    @property
    def eigenvalues_at_hand(self) -> bool:
        return "eigen" in self._known


def gram_bytes(m: int, sharers: int) -> int:
    """What each of `sharers` processes holds of the Gram matrix of m rows and of its factor.

    One that goes on alone makes the whole beside its part, which is as much as `sharers=1` says.
    """
    if sharers == 1:
        # The matrix itself, the matrix with the damping added, and its factor.
        return 3 * 8 * m**2
    # Its part of two lower triangles; and the widest panel as it is made, sent, and taken off others.
    return 8 * m**2 // sharers + 3 * 8 * m * panel_width(m)

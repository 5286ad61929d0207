"""A curvature that exists only as products with rows."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from jaxtyping import Int
from torch import Tensor

from .operator import AbstractSampled, Cache, cache_field
from .rows import Rows
from .space import Space


@dataclass(frozen=True, eq=False)
class Implicit(AbstractSampled):
    """A curvature known only by its products.

    `product(rows, ids)` applies C to every row, over all data when `ids` is None, else the mean over those
    examples; `mean()` gives trace(C_bb) / P_b per block, or one number for all of them, and is called at most once;
    `count` is N; `rounding` is the relative error of a product that is computed in less than the rows' precision.
    """

    space: Space
    product: Callable[[Rows, Tensor | None], Rows]
    mean: Callable[[], float | Mapping[str, float]]
    count: int
    rounding: float = 0.0
    _known: Cache = cache_field()

    @property
    def product_rounding(self) -> float:
        return self.rounding

    @property
    def examples(self) -> int:
        return self.count

    def apply(self, rows: Rows, ids: Int[Tensor, " b"] | None = None) -> Rows:
        return self.product(rows, ids)

    def block_means(self) -> dict[str, float]:
        if "means" not in self._known:
            mean = self.mean()
            means = dict.fromkeys(self.space.blocks, mean) if isinstance(mean, (int, float)) else dict(mean)
            self._known["means"] = {k: float(v) for k, v in means.items()}
        return dict(self._known["means"])

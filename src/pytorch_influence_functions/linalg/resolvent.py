"""a^T (C + decay + lambda)^-1 b for every lambda, read off one decomposition of C."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import final

from jaxtyping import Float
from torch import Tensor

from .rows import Rows


@final
@dataclass(frozen=True, eq=False)
class Resolvent:
    """a^T (C + decay + lambda)^-1 b = plain <a, b> + sum_k weight_k u_k(a) u_k(b), with u = `project`.

    Args:
        project: the coordinates of n rows, [n, m].
        values: the eigenvalues of C with the decay, or those of the Gram matrix where `count` is given, [m] in float64.
        decay: what is added to lambda: the weight decay where `values` do not hold it.
        count: N where the decomposition is that of the Gram matrix N C^T; None for that of C itself.
    """

    project: Callable[[Rows], Float[Tensor, "n m"]]
    values: Float[Tensor, " m"]
    decay: float = 0.0
    count: int | None = None

    @property
    def dual(self) -> bool:
        """Whether a Gram matrix was decomposed, so that directions outside its rows are answered by lambda alone."""
        return self.count is not None

    def plain(self, damping: float) -> float:
        """What <a, b> is multiplied with at this `damping`."""
        return 1.0 / (damping + self.decay) if self.dual else 0.0

    def weights(self, damping: float) -> Float[Tensor, " m"]:
        """What the products of the coordinates are multiplied with at this `damping`."""
        total = damping + self.decay
        if self.count is None:
            return 1.0 / (self.values + total)
        return -1.0 / (total * (self.values + self.count * total))

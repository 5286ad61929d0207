"""A symmetric matrix that processes share: none of them holds more than its panels of the lower triangle."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import final

import torch
from jaxtyping import Float
from torch import Tensor

from ..core.distributed import World, current
from .rows import Rows

# A panel is as wide as products are still quick, and every process has a few of them.
_WIDEST, _EACH = 512, 4


@final
@dataclass(frozen=True, eq=False)
class Panels:
    """A symmetric or lower triangular float64 matrix [m, m], whose columns are dealt out in turn, a panel at a time.

    A panel holds some columns from the diagonal down, so all of them together take 4 m^2 bytes, of which each process
    has its part. Every process of the world calls the same methods in the same order.

    Args:
        size: m.
        width: columns of a panel; the last may have fewer.
        own: the panels of this process by their first column, [m - first, width].
        device: where they are.
    """

    size: int
    width: int
    own: dict[int, Float[Tensor, "_ _"]]
    device: torch.device

    @staticmethod
    def of_products(rows: Rows, dtype: torch.dtype | None) -> Panels:
        """The inner products of rows that every process has, each process those of its panels.

        Args:
            rows: the same on every process.
            dtype: as for `Rows.inner`.
        """
        world, m = current(), len(rows)
        width, own = panel_width(m), {}
        for first in range(0, m, width):
            if _owner(first, width, world) == world.rank:
                columns = rows.take(slice(first, min(first + width, m)))
                panel = rows.take(slice(first, m)).inner(columns, dtype=dtype).double()
                head = panel[: len(columns)]
                head.copy_((head + head.T) / 2)
                own[first] = panel
        return Panels(m, width, own, rows.device)

    @staticmethod
    def combined(parts: Iterable[tuple[Panels, float]]) -> Panels:
        """The sum of matrices of one size, each times its number."""
        (first, factor), *others = parts
        total = {k: panel * factor for k, panel in first.own.items()}
        for other, number in others:
            for k, panel in other.own.items():
                total[k].add_(panel, alpha=number)
        return replace(first, own=total)

    def diagonal(self) -> Float[Tensor, " m"]:
        """The whole diagonal, on every process."""
        total = self._zeros(self.size)
        for columns, panel in self._own_columns():
            total[columns] = panel.diagonal()
        return current().sum_into(total)

    def times(self, w: Float[Tensor, "n m"]) -> Float[Tensor, "n m"]:
        """w K for symmetric K, on every process; w is the same on all of them."""
        total = torch.zeros_like(w)
        for columns, panel in self._own_columns():
            width = panel.shape[1]
            total[:, columns] += w[:, columns.start :] @ panel
            total[:, columns.stop :] += w[:, columns] @ panel[width:].T
        return current().sum_into(total)

    def factorised(self, scale: float, added: float) -> Panels | None:
        """The Cholesky factor L with L L^T = scale K + added; None where that is not positive definite.

        Panel by panel: whose it is decomposes and sends it, and all take it off what they have to the right of it.
        """
        world = current()
        factor = {first: panel * scale for first, panel in self.own.items()}
        for panel in factor.values():
            panel.diagonal().add_(added)
        for columns in self._columns():
            if columns.start in factor:
                panel = factor[columns.start]
                _factorise(panel)
            else:
                panel = self._zeros(self.size - columns.start, columns.stop - columns.start)
            world.broadcast(panel, _owner(columns.start, self.width, world))
            if bool(panel[0, 0].isnan()):
                return None
            for first, later in factor.items():
                if first > columns.start:
                    below = panel[first - columns.start :]
                    later -= below @ below[: later.shape[1]].T
        return replace(self, own=factor)

    def solved(self, b: Float[Tensor, "n m"]) -> Float[Tensor, "n m"]:
        """b (L L^T)^-1 for this factor L, on every process; b is the same on all of them."""
        world, y = current(), self._forward(b)
        x = torch.zeros_like(b)
        for columns in reversed(list(self._columns())):
            panel = self.own.get(columns.start)
            part = b.new_zeros(len(b), columns.stop - columns.start)
            if panel is not None:
                width = panel.shape[1]
                left = y[:, columns] - x[:, columns.stop :] @ panel[width:]
                part.copy_(torch.linalg.solve_triangular(panel[:width].T, left.T, upper=True).T)
            x[:, columns] = world.broadcast(part, _owner(columns.start, self.width, world))
        return x

    def inverse_diagonal(self) -> Float[Tensor, " m"]:
        """The diagonal of (L L^T)^-1 for this factor L, on every process: |L^-1 e_i|^2."""
        total = self._zeros(self.size)
        for columns in self._columns():
            unit = self._zeros(columns.stop - columns.start, self.size)
            unit[:, columns] = torch.eye(len(unit), dtype=unit.dtype, device=unit.device)
            total[columns] = self._forward(unit, columns.start).square().sum(1)
        return current().sum_into(total)

    def _forward(self, b: Float[Tensor, "n m"], begin: int = 0) -> Float[Tensor, "n m"]:
        """y with y L^T = b: of each process its own columns, and zeros in those of others.

        Args:
            b: zero in the columns before `begin`.
            begin: where a panel begins.
        """
        world, y, taken = current(), torch.zeros_like(b), torch.zeros_like(b)
        for columns in self._columns(begin):
            of_all = world.sum_into(taken[:, columns].contiguous())
            panel = self.own.get(columns.start)
            if panel is None:
                continue
            width = panel.shape[1]
            left = b[:, columns] - of_all
            y[:, columns] = torch.linalg.solve_triangular(panel[:width], left.T, upper=False).T
            taken[:, columns.stop :] += y[:, columns] @ panel[width:].T
        return y

    def _columns(self, begin: int = 0) -> Iterator[slice]:
        """The columns of every panel, in order."""
        for first in range(begin, self.size, self.width):
            yield slice(first, min(first + self.width, self.size))

    def _own_columns(self) -> Iterator[tuple[slice, Tensor]]:
        for first, panel in self.own.items():
            yield slice(first, first + panel.shape[1]), panel

    def _zeros(self, *shape: int) -> Tensor:
        return torch.zeros(shape, dtype=torch.float64, device=self.device)


def panel_width(size: int) -> int:
    """Columns of a panel of a [size, size] matrix that the present processes share."""
    return max(1, min(_WIDEST, -(-size // (_EACH * current().size))))


def _owner(first: int, width: int, world: World) -> int:
    """Which process has the panel that begins at this column."""
    return first // width % world.size


def _factorise(panel: Float[Tensor, "m w"]) -> None:
    """Columns of the Cholesky factor in the place of those that are left of the matrix; NaN where it has none."""
    width = panel.shape[1]
    head, info = torch.linalg.cholesky_ex(panel[:width])
    panel[:width] = head
    panel[width:] = torch.linalg.solve_triangular(head, panel[width:].T, upper=False).T
    if int(info):
        panel.fill_(torch.nan)

"""A solution of the dual, kept as a combination of rows that are in memory anyway."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from .blocks import Dense
from .rows import Route, Rows
from .shift import Shift


@dataclass(frozen=True, eq=False)
class DualSolution:
    """x_n = D^-1 (b_n - sum_m w[n, m] g_m), never written out unless asked.

    `base` b [n], `basis` G [m], `coefficients` w [n, m] and `overlaps` b D^-1 G^T [n, m] in float64; `count` is N;
    `precision` that of inner products, None for the rows' own. Behaves as `Rows` where scoring needs it: `len`,
    `inner`, `flat`, `take`, `scaled`, `squared_norms`, dtype, device.
    """

    written_out: ClassVar[bool] = False
    read_when_used: ClassVar[bool] = False

    base: Rows
    basis: Rows
    coefficients: Float[Tensor, "n m"]
    overlaps: Float[Tensor, "n m"]
    shift: Shift
    count: int
    precision: torch.dtype | None = None

    def __len__(self) -> int:
        return len(self.base)

    @property
    def dtype(self) -> torch.dtype:
        return self.base.dtype

    @property
    def device(self) -> torch.device:
        return self.base.device

    @property
    def met(self) -> int:
        """Vectors that each other row meets for its products with these: the right-hand sides and the basis."""
        return len(self) + len(self.basis)

    def inner(self, rows: Rows, route: Route | None = None) -> Float[Tensor, "n r"]:
        """<x_n, r> for all pairs; free when `rows` is the basis itself.

        <x, g_m> = N w[m] exactly, because w solves (N + G D^-1 G^T) w = G D^-1 b: no cancellation, no product.
        """
        result = torch.promote_types(self.dtype, self.precision or self.dtype)
        known = self.known(rows)
        if known is not None:
            return known.to(result)
        uniform = self.shift.uniform
        scaled = rows if uniform is not None else self.shift.inverse(rows)
        direct = self.base.inner(scaled, route, self.precision).double()
        # The big side first: its factored form is the one whose route matters.
        removed = self.coefficients @ self.basis.inner(scaled, route, self.precision).double()
        return (direct.sub_(removed) / (uniform if uniform is not None else 1.0)).to(result)

    def known(self, rows: Rows) -> Float[Tensor, "n m"] | None:
        """The products with `rows` where these are the basis itself, in float64; None for all others."""
        return self.count * self.coefficients if rows is self.basis else None

    def against(
        self, training: Rows, route: Route | None = None, dtype: torch.dtype | None = None
    ) -> Float[Tensor, "n m"]:
        """The same as `inner`, in this solution's own precision: what two large products leave must not be rounding."""
        return self.inner(training, route)

    def quadratic(self) -> Float[Tensor, " n"]:
        """<x_n, b_n> = b^T (C + D)^-1 b per row, without an n x n product: N times the leverage of b."""
        products = self._base_norms().double() - (self.coefficients * self.overlaps).sum(1)
        return products.clamp_min(0.0)

    def _base_norms(self) -> Tensor:
        blocks = self.base.blocks.values()
        wide = blocks if self.precision is None else [b.to(self.precision) for b in blocks]
        parts = [b.squared_norms() / d for b, d in zip(wide, self._diagonal(), strict=True)]
        return torch.stack(parts).sum(0)

    def _diagonal(self) -> list[float]:
        return list(self.shift.over(self.base.blocks).values())

    def rows(self, dtype: torch.dtype | None = None) -> Rows:
        """The solution written out as `Dense` blocks: n * P numbers.

        Args:
            dtype: in which it is put together and given; None: that of its rows.
        """
        scale = dict(zip(self.base.blocks, self._diagonal(), strict=True))

        def solve_block(name: str) -> Dense:
            base, basis = self.base.blocks[name], self.basis.blocks[name]
            if dtype is not None:
                base, basis = base.to(dtype), basis.to(dtype)
            removed = Dense(basis.combine(self.coefficients.to(basis.reference))).dense()
            return Dense((base.dense().reshape(removed.shape) - removed) / scale[name])

        return Rows({name: solve_block(name) for name in self.base.blocks})

    def dense(self) -> Rows:
        """The same as `rows()`: every block written out."""
        return self.rows()

    def flat(self) -> Float[Tensor, "n p"]:
        return self.rows().flat()

    def squared_norms(self) -> Float[Tensor, " n"]:
        return self.rows().squared_norms()

    def rowwise(self, other: Rows) -> Float[Tensor, " n"]:
        """<x_n, other_n> for matching rows; cheap where they are the right-hand sides themselves."""
        if other is self.base:
            return self.quadratic()
        return other.rowwise(self.rows())

    def in_double(self) -> DualSolution:
        """The same with inner products in float64, for parts of it, which may be large and cancel."""
        return replace(self, precision=torch.float64)

    def only(self, names: Sequence[str]) -> DualSolution:
        """Some blocks of the solutions: what they have in common with rows of these blocks alone."""
        return replace(self, base=self.base.only(names), basis=self.basis.only(names), shift=self.shift.only(names))

    def take(self, index: Tensor | slice) -> DualSolution:
        """The solutions `index`, in that order."""
        base = self.base.take(index)
        return replace(self, base=base, coefficients=self.coefficients[index], overlaps=self.overlaps[index])

    def scaled(self, factor: Tensor | float) -> DualSolution:
        """Times a number, or one number per row."""
        column = factor.double()[:, None] if isinstance(factor, Tensor) and factor.dim() == 1 else factor
        coefficients, overlaps = self.coefficients * column, self.overlaps * column
        return replace(self, base=self.base.scaled(factor), coefficients=coefficients, overlaps=overlaps)

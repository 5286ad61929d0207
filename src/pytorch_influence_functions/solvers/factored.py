"""K-FAC's factored damping: the solution of a row that is an outer product is one too."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, final

from jaxtyping import Float
from torch import Tensor

from ..core.errors import InvalidInput, SolveFailed
from ..curvature.base import AbstractCurvature, Form
from ..curvature.cost import Cost, ProblemSize
from ..linalg.blocks import AbstractBlock, Conv, Dense, Outer
from ..linalg.kronecker import Kronecker
from ..linalg.kronecker_block import KroneckerBlock
from ..linalg.operator import AbstractOperator
from ..linalg.rows import Rows
from ..linalg.shift import Shift
from .base import (
    AbstractSolver,
    Result,
    Solution,
    System,
    combined_residual,
    no_preconditioner,
    nonfinite_rows,
    refuse_input,
)


@dataclass(frozen=True, eq=False)
class FactoredState:
    """Per block, the inverse's eigenvalues on either side."""

    system: System
    sides: dict[str, tuple[Float[Tensor, " o"], Float[Tensor, " i"]]]


@final
@dataclass(frozen=True, repr=False)
class Factored(AbstractSolver[FactoredState]):
    r"""x = (S + sqrt(lambda) / pi)^-1 V (A + pi sqrt(lambda))^-1 for `KFAC()`, with pi^2 = mean eigenvalue of A over S.

    Damping each factor instead of their product keeps a query gradient sum_t g_t a_t^T a sum of as many outer
    products, so scoring stays factored and exact: nothing of the size of the weights is made per query, and solving
    costs o^2 + i^2 per term instead of o i (o + i). It is *not* (C + lambda)^-1: the cross terms damp more. The
    residual reported is that of (C + D) x = b, and is therefore not small; nothing is judged by it.

    Reference: Martens & Grosse (2015), section 6.3. Raises `InvalidInput` for any curvature but `KFAC`, `SolveFailed`
    where a damping is zero.
    """

    vectors_held: ClassVar[int] = 0
    takes_preconditioner: ClassVar[bool] = False

    def form(self, curvature: AbstractCurvature) -> Form:
        return Form.SPECTRAL

    def cost(self, size: ProblemSize, curvature: AbstractCurvature, guided: bool = False) -> Cost:
        return curvature.cost(size, Form.SPECTRAL) + curvature.product_cost(size, 2 * size.n_queries)

    def init(
        self, operator: AbstractOperator, shift: Shift, preconditioner: AbstractOperator | None = None
    ) -> FactoredState:
        no_preconditioner(self, preconditioner)
        if not isinstance(operator, Kronecker) or any(b.sides is None for b in operator.blocks.values()):
            raise InvalidInput(
                f"Factored() needs eigenvalues that are products, and {type(operator).__name__} has none; "
                "use KFAC(), or Spectral() for EKFAC() and Shampoo()."
            )
        sides = {}
        for name, d in shift.over(operator.space.blocks).items():
            if d <= 0:
                raise SolveFailed(f"The damping of {name!r} is {d:.3g}; Factored() needs a positive damping.")
            sides[name] = _inverses(operator.blocks[name], d)
        return FactoredState(System.of(operator, shift), sides)

    def solve(self, state: FactoredState, rows: Rows) -> Solution:
        if bad := nonfinite_rows(rows.sums()[:, None]):
            return refuse_input(rows, bad, state.system.shift)
        operator, shift = state.system.operator, state.system.shift
        assert isinstance(operator, Kronecker)
        value = rows.map(lambda name, block: _solve_block(operator.blocks[name], state.sides[name], block))
        residual = combined_residual(operator, shift, rows, value)
        low, high = operator.extremes()
        notes = {"damping": shift.damping, "smallest_curvature": low, "largest_curvature": high}
        approximation = "factored damping (S + sqrt(lambda) / pi) x (A + pi sqrt(lambda)), not (C + lambda)"
        return Solution(value, residual, Result.successful, 1, notes | {"approximation": approximation})


def _inverses(block: KroneckerBlock, damping: float) -> tuple[Tensor, Tensor]:
    assert block.sides is not None
    left, right = block.sides
    a, s = float(right.mean()), float(left.mean())
    # A side of length one, or one without any curvature, has no scale of its own to balance by.
    pi = math.sqrt(a / s) if a > 0 and s > 0 else 1.0
    root = math.sqrt(damping)
    return 1.0 / (left + root / pi), 1.0 / (right + root * pi)


def _solve_block(basis: KroneckerBlock, sides: tuple[Tensor, Tensor], block: AbstractBlock) -> AbstractBlock:
    left, right = (s.to(block.reference) for s in sides)
    if isinstance(block, Conv):
        block = block.outer()
    if isinstance(block, Outer):
        return Outer(_side(block.left, basis.left, left), _side(block.right, basis.right, right))
    dense = block.dense().reshape(len(block), len(left), len(right))
    solved = _side(_side(dense, basis.right, right).mT, basis.left, left).mT
    return Dense(solved.reshape(len(block), *block.shape))


def _side(x: Tensor, basis: Tensor | None, values: Tensor) -> Tensor:
    """Q diag(values) Q^T along the last axis."""
    return x * values if basis is None else (x @ basis * values) @ basis.T

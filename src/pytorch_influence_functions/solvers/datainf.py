"""DataInf: the mean of inverses instead of the inverse of the mean."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, final

import torch
from torch import Tensor

from ..core.errors import InvalidInput
from ..core.validate import flag
from ..curvature.base import AbstractCurvature, Form
from ..curvature.cost import Cost, ProblemSize
from ..linalg.blocks import Dense
from ..linalg.gram import Gram
from ..linalg.operator import AbstractOperator
from ..linalg.rows import Rows, inner
from ..linalg.shift import Shift
from .base import AbstractSolver, Result, Solution, System, no_preconditioner, nonfinite_rows, refuse_input


@dataclass(frozen=True, eq=False)
class DataInfState:
    """The rows and, block by block, 1 / (lambda + |g_j|^2) over lambda."""

    system: System
    operator: Gram
    diagonal: dict[str, float]
    denominators: dict[str, Tensor]


@final
@dataclass(frozen=True, repr=False)
class DataInf(AbstractSolver[DataInfState]):
    r"""x = (1/N) sum_j (g_j g_j^T + lambda)^-1 b, block by block: a formula, not a solution of (C + D) x = b.

    Exchanging mean and inverse makes every inverse a rank-one update (Sherman-Morrison):
    `x = (b - (1/N) sum_j g_j (g_j . b) / (lambda + |g_j|^2)) / lambda`, in every block of parameters (a layer's weight
    with its bias) with its own lambda, or with `per_block=False` over all parameters at once. The exchange is an
    approximation without a tolerance; where |g_j|^2 is small beside lambda, x is nearly b / lambda and scores are
    nearly gradient dot products.

    The residual reported is the true one of (C + D) x = b and may be large; because nothing was promised about it no
    solve fails on it, and the notes say `"approximation": "DataInf"`. N = 1 is exact.

    Needs the empirical or sampled Fisher as rows; cost: one pass to make them, then 2 n N P operations for n
    right-hand sides, and n P numbers. `init` raises `InvalidInput` for an operator without one row per example, or a D
    that is not positive.

    Reference: Kwon et al. (2023), "DataInf: Efficiently Estimating Data Influence in LoRA-tuned LLMs and Diffusion
    Models", whose lambda is `Relative(0.1, per_block=True)`.

    >>> DataInf()
    DataInf()
    """

    per_block: bool = True
    vectors_held: ClassVar[int] = 1
    takes_preconditioner: ClassVar[bool] = False

    def __post_init__(self) -> None:
        flag("per_block", self.per_block, owner=self)

    def form(self, curvature: AbstractCurvature) -> Form:
        return Form.GRAM

    def cost(self, size: ProblemSize, curvature: AbstractCurvature, guided: bool = False) -> Cost:
        rows = curvature.rows(size) or size.examples
        # Products with all rows and their combination, once for the answer and once for its residual.
        each = size.n_queries * rows * (size.pair_flops + 2.0 * size.parameters)
        return curvature.cost(size, Form.GRAM) + Cost(flops=2 * each)

    def init(
        self, operator: AbstractOperator, shift: Shift, preconditioner: AbstractOperator | None = None
    ) -> DataInfState:
        no_preconditioner(self, preconditioner)
        if not isinstance(operator, Gram) or operator.examples == 0:
            rows = (
                f"{len(operator.rows)} rows for a count of {operator.count}" if isinstance(operator, Gram) else "none"
            )
            raise InvalidInput(
                f"DataInf() needs one gradient row per example and got {rows}; use EmpiricalFisher(), as in the paper, "
                "or Fisher(samples=1)."
            )
        names = operator.space.blocks
        diagonal = shift.over(names)
        if min(diagonal.values()) <= 0:
            raise InvalidInput(
                f"DataInf() divides by the damping plus weight decay, which is {min(diagonal.values())} for some "
                "block; use a positive damping such as Relative(0.1)."
            )
        if not self.per_block and len(set(diagonal.values())) > 1:
            raise InvalidInput(
                "DataInf(per_block=False) inverts over all parameters at once and needs one damping plus weight decay "
                "for all; use per_block=True, or one number."
            )
        sizes = {k: b.squared_norms().double() for k, b in operator.rows.blocks.items()}
        if not self.per_block:
            whole = torch.stack(list(sizes.values())).sum(0)
            sizes = dict.fromkeys(sizes, whole)
        denominators = {k: operator.count * (diagonal[k] + s) for k, s in sizes.items()}
        return DataInfState(System.of(operator, shift), operator, diagonal, denominators)

    def solve(self, state: DataInfState, rows: Rows) -> Solution:
        shift, basis = state.system.shift, state.operator.rows
        if bad := nonfinite_rows(rows.sums()[:, None]):
            return refuse_input(rows, bad, shift)
        together = None if self.per_block else rows.inner(basis).double()
        solved = {}
        for name, block in rows.blocks.items():
            overlaps = inner(block, basis.blocks[name]).double() if together is None else together
            weights = overlaps / state.denominators[name]
            dense = block.dense()
            removed = basis.blocks[name].combine(weights.to(basis.blocks[name].reference))
            solved[name] = Dense((dense - removed.view_as(dense)) / state.diagonal[name])
        value = Rows(solved)
        residual = state.system.residual(value.flat(), rows.flat())
        notes = {"damping": shift.damping, "approximation": "DataInf"}
        if bad := nonfinite_rows(value.sums()[:, None]):
            return Solution(value, residual, Result.nonfinite_output, 1, notes, bad)
        return Solution(value, residual, Result.successful, 1, notes)

"""Solving (C + D) x = b for all rows at once, and saying truthfully how well it went."""

from __future__ import annotations

import enum
import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

import torch
from jaxtyping import Float
from torch import Tensor

from ..core.errors import InvalidInput, NonFinite, SolveFailed
from ..linalg.dual_solution import DualSolution
from ..linalg.kronecker import Kronecker
from ..linalg.operator import AbstractOperator, apply_flat, diagonal_vector
from ..linalg.rows import Rows
from ..linalg.shift import Shift


class Result(enum.Enum):
    """How a solve ended. The values are the messages: cause and cure."""

    successful = ""
    max_steps_reached = "max_steps came before rtol. Raise max_steps, raise the damping, or give a preconditioner."
    stagnated = (
        "Rounding stopped all progress before rtol was reached. Use a float64 model, a larger rtol, or more damping."
    )
    diverged = (
        "The series grew instead of shrinking: the step is larger than 2 / (largest eigenvalue + damping), "
        "or the batches are too small for it. Lower `step`, or leave it None to have it measured."
    )
    unsettled = (
        "The series was cut before it got closer than zero is. Raise `steps`, or leave step and steps "
        "None to have them measured."
    )
    negative_curvature = (
        "A direction with negative curvature was met, so the weights are not at a minimum of the damped "
        "loss. Use GGN() instead of Hessian(), or raise the damping."
    )
    bad_preconditioner = (
        "The preconditioner is not positive definite. Use a damped GGN, Fisher or EKFAC for it, or none."
    )
    inaccurate = "The system is too ill-conditioned for the precision in use. Raise the damping."
    nonfinite_input = (
        "The right-hand side holds NaN or infinity before any solving. Look at the measure's gradient on these rows."
    )
    nonfinite_output = (
        "The right-hand side is finite, but the curvature's product is not. Look for overflow or NaN in the "
        "training data or weights."
    )


# Random combinations of rows on which the residual of a block-wise solve is measured.
_COMBINED = 2


def _empty() -> dict[str, Any]:
    return {}


@dataclass(frozen=True, eq=False)
class Solution:
    """What a solve gives back.

    `residual[n]` is the true relative residual |(C + D) x_n - b_n| / |b_n| of the value handed out (0 for
    b_n = 0). `steps` counts products with the curvature; `failed` lists the rows that did not reach the
    tolerance. `notes` holds diagnostics: always "damping", and where known "smallest_curvature"
    and "largest_curvature" (of C). "approximation" says that `value` is a formula which does not solve (C + D) x = b
    and was not judged by `residual`.
    """

    value: Rows | DualSolution
    residual: Float[Tensor, " n"]
    result: Result
    steps: int
    notes: Mapping[str, Any] = field(default_factory=_empty)
    failed: tuple[int, ...] = ()
    detail: str = ""

    def unwrap(self) -> Rows | DualSolution:
        """The value; raises `SolveFailed` (`NonFinite` for bad input) in words naming the worst rows."""
        if self.result is Result.successful:
            return self.value
        words = " ".join(w for w in (self.result.value, self.detail) if w)
        if self.result is Result.nonfinite_input:
            raise NonFinite(f"{words} Rows: {_names(self.failed)}.")
        raise SolveFailed(
            f"{words} Relative residual {self._worst()} after {self.steps} steps "
            f"(damping {self.notes.get('damping', math.nan):.3g})."
        )

    def _worst(self) -> str:
        rows = list(self.failed) or list(range(len(self.residual)))
        # A row that is NaN is worse than any number.
        badness = {i: (r if math.isfinite(r) else math.inf) for i, r in enumerate(self.residual.tolist())}
        worst = sorted(rows, key=lambda i: -badness[i])[:3]
        return ", ".join(f"{float(self.residual[i]):.1e} in row {i}" for i in worst)


def _names(rows: tuple[int, ...], limit: int = 8) -> str:
    more = f" and {len(rows) - limit} more" if len(rows) > limit else ""
    return ", ".join(map(str, rows[:limit])) + more


S = TypeVar("S")


class AbstractSolver(ABC, Generic[S]):
    """An algorithm for (C + D) x = b. Making one costs nothing; `init` pays once; `solve` is for many
    rows."""

    @abstractmethod
    def init(self, operator: AbstractOperator, shift: Shift, preconditioner: AbstractOperator | None = None) -> S:
        """Prepare for one operator and one D. `preconditioner.apply` approximates (C + D)^-1."""

    @abstractmethod
    def solve(self, state: S, rows: Rows) -> Solution:
        """Solve for every row. Failure is a value: see `Solution.unwrap`."""

    def quadratic(self, state: S, rows: Rows) -> Float[Tensor, " n"]:
        """b^T (C + D)^-1 b for every row: N times its self-influence. Raises as `Solution.unwrap`."""
        inverse = getattr(state, "inverse", None)
        if isinstance(inverse, Kronecker):
            return inverse.quadratic(rows)
        solved = self.solve(state, rows).unwrap()
        if isinstance(solved, DualSolution):
            return solved.quadratic()
        return rows.rowwise(solved)


@dataclass(frozen=True, eq=False)
class System:
    """C + D on flat rows [n, P], in the dtype of the rows."""

    operator: AbstractOperator
    shift: Shift

    @classmethod
    def of(cls, operator: AbstractOperator, shift: Shift) -> System:
        shift.over(operator.space.blocks)
        return cls(operator, shift)

    def diagonal(self, like: Tensor) -> Tensor | float:
        """D as a number, or as a vector [P] where blocks differ."""
        if self.shift.uniform is not None:
            return self.shift.uniform
        return diagonal_vector(self.operator.space, self.shift.over(self.operator.space.blocks)).to(like)

    def curvature(self, x: Float[Tensor, "n p"]) -> Float[Tensor, "n p"]:
        """C x."""
        return apply_flat(self.operator, x)

    def product(self, x: Float[Tensor, "n p"]) -> Float[Tensor, "n p"]:
        """(C + D) x."""
        return self.curvature(x) + x * self.diagonal(x)

    def residual(self, x: Float[Tensor, "n p"], b: Float[Tensor, "n p"]) -> Float[Tensor, " n"]:
        """|(C + D) x - b| / |b| per row, recomputed; 0 where both are zero."""
        return relative((self.product(x) - b).norm(dim=1), b.norm(dim=1))


def relative(error: Float[Tensor, " n"], size: Float[Tensor, " n"]) -> Float[Tensor, " n"]:
    """error / size per row, 0 where both vanish, in float64."""
    error, size = error.double(), size.double()
    return torch.where((size == 0) & (error == 0), torch.zeros_like(error), error / size)


def combined_residual(operator: AbstractOperator, shift: Shift, rows: Rows, value: Rows) -> Float[Tensor, " n"]:
    """|(C + D) x - b| / |b| for answers of a block-wise solver, without writing all rows out.

    Of more than `_COMBINED` rows that many random combinations are looked at instead (the map is linear): they tell the
    root of the sum of all squared relative residuals, which stands, from above, for each row's own.
    """
    n = len(rows)
    norms = rows.squared_norms().double().sqrt()
    some, solved = rows, value
    if n > _COMBINED:
        weights = torch.randn(_COMBINED, n, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        weights = weights.to(norms.device) * torch.where(norms > 0, 1 / norms, torch.zeros_like(norms))
        some, solved = rows.combine(weights), value.combine(weights)
    there = operator.apply(solved)
    errors = torch.zeros(len(some), dtype=torch.float64, device=norms.device)
    for name, d in shift.over(rows.blocks).items():
        left = there.blocks[name].dense() + d * solved.blocks[name].dense().reshape_as(there.blocks[name].dense())
        errors += (left - some.blocks[name].dense().reshape_as(left)).flatten(1).double().square().sum(1)
    return relative(errors.sqrt(), norms) if n <= _COMBINED else errors.mean().sqrt().expand(n).clone()


def nonfinite_rows(rows: Float[Tensor, "n *p"]) -> tuple[int, ...]:
    """Which rows hold NaN or infinity."""
    bad = ~torch.isfinite(rows.reshape(rows.shape[0], -1)).all(1)
    return tuple(int(i) for i in bad.nonzero().flatten())


def refuse_input(rows: Rows, failed: tuple[int, ...], shift: Shift) -> Solution:
    """The answer to a right-hand side that holds NaN or infinity: nothing was solved."""
    residual = torch.full((len(rows),), math.nan, dtype=torch.float64)
    return Solution(rows, residual, Result.nonfinite_input, 0, {"damping": shift.damping}, failed)


def no_preconditioner(solver: str, preconditioner: AbstractOperator | None) -> None:
    """A direct solver that were handed a preconditioner would ignore it silently; it says so instead."""
    if preconditioner is not None:
        raise InvalidInput(f"{solver} solves directly and has no use for a preconditioner; drop it, or use CG().")


def damping_that_works(smallest: float, scale: float) -> float:
    """A lambda above -smallest, by a tenth and by what rounding can take."""
    return -1.1 * smallest + 1e-6 * abs(scale)


def indefinite_words(smallest: float, largest: float, shift: Shift) -> str:
    """In words: the smallest eigenvalue, the damping, and the lambda that works."""
    if smallest >= -1e-12 * abs(largest):
        # Zero within rounding: no wrong choice of curvature, only directions that no example fixes.
        return (
            f"The smallest eigenvalue of C plus weight decay is 0 within rounding ({smallest:.3g}) and the damping is "
            f"{shift.damping:.3g}, so C + D is singular, not positive definite; use a positive damping such as "
            f"Relative(0.1), or at least Absolute({damping_that_works(min(smallest, 0.0), largest):.3g})."
        )
    return (
        f"The smallest eigenvalue of C plus weight decay is {smallest:.3g} and the damping is "
        f"{shift.damping:.3g}, so C + D is not positive definite; use GGN() instead of Hessian(), or a "
        f"damping of at least Absolute({damping_that_works(min(smallest, 0.0), largest):.3g})."
    )

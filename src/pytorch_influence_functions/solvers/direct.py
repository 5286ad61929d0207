"""Solving by factorising the whole curvature: for few parameters, or for a known eigenbasis."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar, final

import torch
from jaxtyping import Float
from torch import Tensor

from ..core.errors import InvalidInput, NonFinite, SolveFailed
from ..curvature.base import AbstractCurvature, Budget, Form
from ..curvature.cost import DOUBLE, EIGENDECOMPOSITION, FACTORISATION, Cost, ProblemSize
from ..linalg.dense import Matrix
from ..linalg.operator import AbstractOperator, AbstractSpectral, AbstractSymmetric, diagonal_vector
from ..linalg.rows import Rows
from ..linalg.shift import Shift
from .base import (
    AbstractSolver,
    Result,
    Solution,
    System,
    combined_residual,
    describe_indefinite,
    no_preconditioner,
    nonfinite_rows,
    refuse_input,
    relative,
)

# A Cholesky factor and the inverse of the matrix, which tells the effective dimension, take so many times the factor.
_INVERTED = 2.5
# Above so many parameters the trace of the inverse is taken from so many random vectors, which takes next to nothing.
_INVERTED_UP_TO, _PROBES = 3000, 64


@dataclass(frozen=True, eq=False)
class SpectralState:
    """(C + D)^-1 in C's eigenbasis, with what the answer will be judged by."""

    system: System
    inverse: AbstractSpectral
    smallest: float
    largest: float

    @property
    def condition(self) -> float:
        shift = self.system.shift.damping
        return (self.largest + shift) / (self.smallest + shift)


@dataclass(frozen=True, repr=False)
class Spectral(AbstractSolver[SpectralState]):
    """x = Q (lam + D)^-1 Q^T b, in float64 for a `Matrix`; another damping costs nothing but the products.

    Args:
        rtol: the largest relative residual that is accepted, where precision and condition do not allow for more.

    Weight decay that differs between blocks is added to C before the decomposition. `init` raises
    `InvalidInput` for an operator without known eigenvalues, `SolveFailed` when C + D is not positive definite: at a
    saddle the formula gives a number without meaning.

    >>> state = Spectral().init(operator, Shift(0.1))  # doctest: +SKIP
    >>> Spectral().solve(state, rows).unwrap()  # doctest: +SKIP
    """

    rtol: float = 1e-6
    vectors_held: ClassVar[int] = 0
    default_share: ClassVar[float] = 0.1
    takes_preconditioner: ClassVar[bool] = False
    uses_spectrum: ClassVar[bool] = True
    accepts_dropped: ClassVar[bool] = True

    def form(self, curvature: AbstractCurvature) -> Form:
        return curvature.closest_form(Form.MATRIX)

    def check_memory(self, operator: AbstractSymmetric, budget: Budget) -> None:
        check_decomposition(operator, budget, "The eigendecomposition")

    def cost(self, size: ProblemSize, curvature: AbstractCurvature, guided: bool = False) -> Cost:
        form, p, q = self.form(curvature), size.parameters, size.n_queries
        if form is Form.SPECTRAL:
            return curvature.cost(size, form) + curvature.answer_cost(size, q)
        return curvature.cost(size, form) + Cost(flops=EIGENDECOMPOSITION * p**3 + 6 * DOUBLE * q * p**2)

    def init(
        self, operator: AbstractOperator, shift: Shift, preconditioner: AbstractOperator | None = None
    ) -> SpectralState:
        no_preconditioner(self, preconditioner)
        if not isinstance(operator, AbstractSpectral):
            raise InvalidInput(
                f"Spectral() needs an operator with known eigenvalues and got {type(operator).__name__}; "
                "use CG(), Woodbury() or Neumann(), or a curvature such as EKFAC()."
            )
        system = System.of(operator, shift)
        spectral, add = operator, shift.uniform
        if add is None:
            # What all blocks share stays outside, so that another damping needs no new decomposition.
            add = shift.damping if not shift.blocks else 0.0
            spectral = operator.shifted({k: d - add for k, d in shift.over(operator.space.blocks).items()})
        low, high = spectral.extremes()
        decay = add - shift.damping if not shift.blocks else 0.0
        if not low + add > 1e-14 * abs(high):
            raise SolveFailed(describe_indefinite(low + decay, high, shift))
        return SpectralState(system, spectral.function(_Inverse(add)), low + decay, high + decay)

    def solve(self, state: SpectralState, rows: Rows) -> Solution:
        notes = {
            "damping": state.system.shift.damping,
            "smallest_curvature": state.smallest,
            "largest_curvature": state.largest,
        }
        if state.inverse.layerwise:
            return _solve_layerwise(state, rows, notes, self.rtol)
        b = rows.flat()
        if bad := nonfinite_rows(b):
            return refuse_input(rows, bad, state.system.shift)
        return _judge(state.system, state.inverse.apply(rows).flat(), b, notes, state.condition, self.rtol)

    def quadratic(self, state: SpectralState, rows: Rows) -> Float[Tensor, " n"]:
        if state.inverse.layerwise:
            return state.inverse.quadratic(rows)
        return AbstractSolver.quadratic(self, state, rows)


def check_decomposition(operator: AbstractSymmetric, budget: Budget, what: str) -> None:
    """Refuse an operator that is too large to decompose within the budget.

    Raises:
        TooLarge: it is.
    """
    way_out = "use CG() or Woodbury(), select fewer parameters"
    budget.check(operator.decomposition_bytes, f"{what} of {operator.size:,} parameters", way_out)


def _solve_layerwise(state: SpectralState, rows: Rows, notes: dict[str, float], rtol: float) -> Solution:
    """Block after block: nothing of the size of all rows is made but the answer."""
    shift = state.system.shift
    if bad := nonfinite_rows(rows.sums()[:, None]):
        return refuse_input(rows, bad, shift)
    value = state.inverse.applied(rows)
    residual = combined_residual(state.system.operator, shift, rows, value)
    return _verdict(value, residual, notes, state.condition, rtol, value.sums())


@final
@dataclass(frozen=True)
class _Inverse:
    """1 / (lambda + add): a record and no closure, so that a fitted method can be pickled."""

    add: float

    def __call__(self, lam: Tensor) -> Tensor:
        return 1.0 / (lam + self.add)


def _judge(system: System, x: Tensor, b: Tensor, notes: dict[str, Any], condition: float, rtol: float) -> Solution:
    """True residual of `x`; more is not asked of it than its precision and the conditioning allow.

    What an operator drops is not answered for: reported in the residual, but not held against the solution.
    """
    error, operator = system.product(x) - b, system.operator
    residual = relative(error.norm(dim=1), b.norm(dim=1))
    value = operator.space.rows(x)
    answered_error = operator.answered_part(error)
    if answered_error is not error:
        answered = relative(answered_error.norm(dim=1), b.norm(dim=1))
        return _verdict(value, residual, notes | {"approximation": "dropped complement"}, condition, rtol, x, answered)
    return _verdict(value, residual, notes, condition, rtol, x)


def _verdict(
    value: Rows,
    residual: Tensor,
    notes: dict[str, Any],
    condition: float,
    rtol: float,
    finite: Tensor,
    answered: Tensor | None = None,
) -> Solution:
    allowed = max(rtol, 100 * torch.finfo(value.dtype).eps * condition)
    if bad := nonfinite_rows(finite.reshape(len(value), -1)):
        return Solution(value, residual, Result.nonfinite_output, 1, notes, bad)
    judged = residual if answered is None else answered
    failed = tuple(int(i) for i in (~(judged <= allowed)).nonzero().flatten())
    return Solution(value, residual, Result.inaccurate if failed else Result.successful, 1, notes, failed)


@dataclass(frozen=True, eq=False)
class CholeskyState:
    """The factor of C + D in float64."""

    system: System
    factor: Float[Tensor, "p p"]


@dataclass(frozen=True, repr=False)
class Cholesky(AbstractSolver[CholeskyState]):
    """x = (L L^T)^-1 b for a `Matrix` and one D, in float64: a small part of the work of `Spectral` when D is fixed.

    Args:
        rtol: the largest relative residual that is accepted, where precision and condition do not allow for more.

    `init` raises `InvalidInput` for any other operator, and `SolveFailed` with the smallest eigenvalue and a damping
    that works when C + D is not positive definite.
    """

    rtol: float = 1e-6
    vectors_held: ClassVar[int] = 0
    default_share: ClassVar[float] = 0.1
    takes_preconditioner: ClassVar[bool] = False

    def form(self, curvature: AbstractCurvature) -> Form:
        return Form.MATRIX

    def check_memory(self, operator: AbstractSymmetric, budget: Budget) -> None:
        check_decomposition(operator, budget, "The Cholesky factor")

    def cost(self, size: ProblemSize, curvature: AbstractCurvature, guided: bool = False) -> Cost:
        p, q = size.parameters, size.n_queries
        factor = _INVERTED if p <= _INVERTED_UP_TO else 1.0
        return curvature.cost(size, Form.MATRIX) + Cost(flops=factor * FACTORISATION * p**3 + 6 * DOUBLE * q * p**2)

    def init(
        self, operator: AbstractOperator, shift: Shift, preconditioner: AbstractOperator | None = None
    ) -> CholeskyState:
        no_preconditioner(self, preconditioner)
        if not isinstance(operator, Matrix):
            raise InvalidInput(
                f"Cholesky() needs a dense Matrix and got {type(operator).__name__}; use Spectral() or CG()."
            )
        system = System.of(operator, shift)
        if not bool(torch.isfinite(operator.matrix).all()):
            raise NonFinite("The curvature matrix holds NaN or infinity; look for them in weights, data or loss.")
        dense = operator.matrix.double()
        dense = (dense + dense.T).div_(2)
        d = diagonal_vector(operator.space, shift.over(operator.space.blocks)).to(dense)
        dense.diagonal().add_(d)
        factor, info = torch.linalg.cholesky_ex(dense)
        # A zero eigenvalue can slip through as a pivot of rounding size.
        pivots = factor.diagonal()
        if int(info) or float(pivots.min()) ** 2 <= 1e-14 * float(pivots.max()) ** 2:
            dense.diagonal().sub_(shift.damping)
            values = torch.linalg.eigvalsh(dense)
            raise SolveFailed(describe_indefinite(float(values[0]), float(values[-1]), shift))
        return CholeskyState(system, factor)

    def solve(self, state: CholeskyState, rows: Rows) -> Solution:
        b = rows.flat()
        if bad := nonfinite_rows(b):
            return refuse_input(rows, bad, state.system.shift)
        x = torch.cholesky_solve(b.to(state.factor).T, state.factor).T.to(b)
        pivots = state.factor.diagonal()
        # A lower estimate of the condition number, times P, bounds it in practice.
        condition = float((pivots.max() / pivots.min()) ** 2) * len(pivots)
        notes = {"damping": state.system.shift.damping}
        return _judge(state.system, x, b, notes, condition, self.rtol)

    def effective_dimension(self, state: CholeskyState) -> float:
        d = state.system.shift.uniform
        if d is None:
            return math.nan
        p = len(state.factor)
        if p <= _INVERTED_UP_TO:
            return p - d * float(torch.cholesky_inverse(state.factor).diagonal().sum())
        # Hutchinson's estimate, of standard error below sqrt(2 dimension / probes).
        signs = torch.randint(0, 2, (p, _PROBES), generator=torch.Generator().manual_seed(0)).to(state.factor) * 2 - 1
        return p - d * float((signs * torch.cholesky_solve(signs, state.factor)).sum()) / _PROBES

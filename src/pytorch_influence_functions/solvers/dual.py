"""The dual: C = G^T G / N is inverted through the Gram matrix of its rows, exactly, over all parameters."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar, final

import torch
from jaxtyping import Float
from torch import Tensor

from ..core.distributed import current
from ..core.errors import InvalidInput, NonFinite
from ..curvature.base import AbstractCurvature, Budget, Form
from ..curvature.cost import DOUBLE, FACTORISATION, Cost, ProblemSize
from ..linalg.dual_solution import DualSolution
from ..linalg.gram import Gram, gram_bytes
from ..linalg.lanczos import power_iteration
from ..linalg.operator import AbstractOperator, AbstractSymmetric, Cache, cache_field
from ..linalg.panels import Panels
from ..linalg.rows import Rows
from ..linalg.shift import Shift
from .base import AbstractSolver, Result, Solution, no_preconditioner, nonfinite_rows, refuse_input, relative

# Symmetrising, scaling and judging the Gram matrix moves each of its numbers through memory some twenty times, and
# adding a block up four times: as long as so many operations.
_MOVED, _MOVED_PER_BLOCK = 3000.0, 800.0
# Matrices with a number for every query and row that a solve holds: overlaps, coefficients, and those of the residual.
_HELD = 5
# Above this share of D, the Gram matrix's rounding is no longer small beside it: float64 takes the place of float32.
_ROUNDING = 0.01


class AbstractDualState(ABC):
    """(N + K_D)^-1 for K_D = G D^-1 G^T, ready to be multiplied with."""

    operator: Gram
    shift: Shift

    @abstractmethod
    def dual_gram(self, w: Float[Tensor, "n m"]) -> Float[Tensor, "n m"]:
        """w K_D."""

    @abstractmethod
    def solve(self, b: Float[Tensor, "n m"]) -> Float[Tensor, "n m"]:
        """b (N + K_D)^-1."""

    @abstractmethod
    def overlaps(self) -> Float[Tensor, "m m"]:
        """K_D itself, which is G D^-1 b where the right-hand sides b are the rows G."""

    @abstractmethod
    def leverages(self) -> Float[Tensor, " m"]:
        """The diagonal of K_D (N + K_D)^-1."""

    @abstractmethod
    def present(self, solver: Woodbury) -> AbstractDualState:
        """The state with which the processes that are computing now can go on."""


@final
@dataclass(frozen=True, eq=False)
class DualState(AbstractDualState):
    """As a Cholesky factor or in the eigenbasis of K_D."""

    operator: Gram
    shift: Shift
    scaled: Float[Tensor, "m m"] | None
    factor: Float[Tensor, "m m"] | None
    values: Float[Tensor, " m"] | None
    vectors: Float[Tensor, "m m"] | None

    def dual_gram(self, w: Float[Tensor, "n m"]) -> Float[Tensor, "n m"]:
        if self.scaled is not None:
            return w @ self.scaled
        assert self.shift.uniform is not None
        return (w @ self.operator.gram()) / self.shift.uniform

    def solve(self, b: Float[Tensor, "n m"]) -> Float[Tensor, "n m"]:
        if self.factor is not None:
            return torch.cholesky_solve(b.T, self.factor).T
        assert self.values is not None and self.vectors is not None
        return (b @ self.vectors / (self.operator.count + self.values)) @ self.vectors.T

    def overlaps(self) -> Float[Tensor, "m m"]:
        return self.scaled if self.scaled is not None else self.operator.gram() / self.shift.smallest

    def leverages(self) -> Float[Tensor, " m"]:
        count = self.operator.count
        if self.values is not None and self.vectors is not None:
            return self.vectors.square() @ (self.values / (self.values + count))
        assert self.factor is not None
        return (1.0 - count * torch.cholesky_inverse(self.factor).diagonal()).clamp_min(0.0)

    def present(self, solver: Woodbury) -> DualState:
        return self


@final
@dataclass(frozen=True, eq=False)
class SharedDualState(AbstractDualState):
    """As a Cholesky factor of which every process has some panels."""

    operator: Gram
    shift: Shift
    scaled: Panels | None
    factor: Panels
    _alone: Cache = cache_field()

    def dual_gram(self, w: Float[Tensor, "n m"]) -> Float[Tensor, "n m"]:
        if self.scaled is not None:
            return self.scaled.times(w)
        assert self.shift.uniform is not None
        return self.operator.times(w) / self.shift.uniform

    def solve(self, b: Float[Tensor, "n m"]) -> Float[Tensor, "n m"]:
        return self.factor.solved(b)

    def overlaps(self) -> Float[Tensor, "m m"]:
        return self.dual_gram(torch.eye(self.factor.size, dtype=torch.float64, device=self.operator.rows.device))

    def leverages(self) -> Float[Tensor, " m"]:
        return (1.0 - self.operator.count * self.factor.inverse_diagonal()).clamp_min(0.0)

    def present(self, solver: Woodbury) -> AbstractDualState:
        if self.operator.is_shared:
            return self
        # A process that solves by itself has all rows, and makes the whole of it once.
        if solver not in self._alone:
            self._alone[solver] = solver.init(self.operator, self.shift)
        state: AbstractDualState = self._alone[solver]
        return state


def _scaled_gram(operator: Gram, shift: Shift) -> Tensor:
    """K_D where blocks have different D: one Gram per distinct number, each cached by the operator."""
    groups = shift.over(operator.rows.blocks)
    total = torch.zeros(len(operator.rows), len(operator.rows), dtype=torch.float64, device=operator.rows.device)
    for d, k in operator.gram_by(groups).items():
        total.add_(k, alpha=1.0 / d)
    return total


def _shared(operator: Gram, shift: Shift) -> SharedDualState | None:
    """The state that processes share; None where rounding has left K too negative for a Cholesky factor."""
    groups = shift.over(operator.rows.blocks)
    scaled, divisor = None, shift.uniform
    if divisor is None:
        # Every process adds up in the same order.
        panels = operator.panels_by(groups)
        scaled = Panels.combined((panels[d], 1.0 / d) for d in sorted(panels))
    _refuse_nonfinite(operator.gram_diagonal() if scaled is None else scaled.diagonal())
    matrix = operator.panels_by(dict.fromkeys(groups, 0))[0] if scaled is None else scaled
    factor = matrix.factorised(1.0 if divisor is None else 1.0 / divisor, operator.count)
    return None if factor is None else SharedDualState(operator, shift, scaled, factor)


def _refuse_nonfinite(diagonal: Tensor) -> None:
    if bad := nonfinite_rows(diagonal):
        raise NonFinite(f"Rows {', '.join(map(str, bad[:8]))} of the curvature hold NaN or infinity.")


@dataclass(frozen=True, repr=False)
class Woodbury(AbstractSolver[AbstractDualState]):
    """x = D^-1 (b - G^T w), w = (N + G D^-1 G^T)^-1 G D^-1 b: solve in m dimensions instead of P.

    Args:
        rtol: the largest relative residual that is accepted.

    The value is a `DualSolution`: scoring against it builds no vector of length P. The first damping costs one
    Cholesky factor of the Gram matrix; the second one eigendecomposition, after which every damping is m^2 work. Each
    process of a `distributed()` block holds its part of matrix and factor, and every damping costs a factor. Where each
    solves for examples of its own (`RelatIF`, self-influence of rows that are not the examples'), and where one asks
    alone after the block, it makes the whole once more: 24 m^2 bytes that the forecast for the block leaves out. D has
    to be positive. Inner products are taken in float64 where D is below the rounding of float32. The residual is exact
    Gram algebra plus an estimate of what rounding in the products adds.
    `init` raises `InvalidInput` for an operator without rows or D <= 0, `NonFinite` naming rows that hold NaN.

    >>> state = Woodbury().init(gram, Shift(1e-3))  # doctest: +SKIP
    >>> Woodbury().leverages(state)  # doctest: +SKIP
    """

    rtol: float = 1e-2
    vectors_held: ClassVar[int] = 0
    takes_preconditioner: ClassVar[bool] = False
    solves_in_dual: ClassVar[bool] = True
    uses_spectrum: ClassVar[bool] = True

    def form(self, curvature: AbstractCurvature) -> Form:
        return Form.GRAM

    def check_memory(self, operator: AbstractSymmetric, budget: Budget) -> None:
        if isinstance(operator, Gram):
            what = f"The Gram matrix of {len(operator.rows):,} rows"
            budget.check(operator.decomposition_bytes, what, "use CG() or EKFAC()")

    def cost(self, size: ProblemSize, curvature: AbstractCurvature, guided: bool = False) -> Cost:
        rows, q = curvature.rows(size) or size.examples, size.n_queries
        # The Gram matrix, its factor, and for every query its products with all rows and two solves.
        algebra = rows**2 * (size.pair_flops + _MOVED + _MOVED_PER_BLOCK * len(size.blocks)) + FACTORISATION * rows**3
        held = gram_bytes(rows, min(current().size, size.examples)) + 8 * _HELD * q * rows
        queries = q * rows * size.pair_flops + 6 * DOUBLE * q * rows**2
        pairs = [block.meeting(rows, rows, size.number_bytes, factored=True) for block in size.blocks.values()]
        written = size.number_bytes * max((pair.held for pair in pairs), default=0.0)
        return curvature.cost(size, Form.GRAM) + Cost(flops=algebra + queries, bytes=held, passing=written)

    def init(
        self, operator: AbstractOperator, shift: Shift, preconditioner: AbstractOperator | None = None
    ) -> AbstractDualState:
        no_preconditioner(self, preconditioner)
        self._check(operator, shift)
        assert isinstance(operator, Gram)
        if operator.precision != torch.float64 and current().decides(_rounding(operator, shift) > _ROUNDING):
            operator.refine()
        if operator.is_shared and not operator.eigenvalues_at_hand:
            shared = _shared(operator, shift)
            if shared is not None:
                return shared
        k = operator.gram() if shift.uniform is not None else None
        scaled = None if k is not None else _scaled_gram(operator, shift)
        _refuse_nonfinite((k if scaled is None else scaled).diagonal())  # type: ignore[union-attr]
        if scaled is None:
            assert k is not None and shift.uniform is not None
            known = operator._known
            again = known.setdefault("first damping", shift.uniform) != shift.uniform
            if not (again or operator.eigenvalues_at_hand):
                factor = _factor(k / shift.uniform, operator.count)
                if factor is not None:
                    return DualState(operator, shift, None, factor, None, None)
            values, vectors = operator.eigen()
            return DualState(operator, shift, None, None, values / shift.uniform, vectors)
        factor = _factor(scaled.clone(), operator.count)
        if factor is not None:
            return DualState(operator, shift, scaled, factor, None, None)
        values, vectors = torch.linalg.eigh(scaled)
        return DualState(operator, shift, scaled, None, values.clamp_min(0.0), vectors)

    def _check(self, operator: AbstractOperator, shift: Shift) -> None:
        if not isinstance(operator, Gram):
            raise InvalidInput(
                f"Woodbury() needs the rows of C = G^T G / N and got {type(operator).__name__}; "
                "use GGN() or EmpiricalFisher() kept as rows, or another solver such as CG()."
            )
        shift.over(operator.space.blocks)
        if shift.smallest <= 0:
            raise InvalidInput(
                f"Woodbury() divides by the damping plus weight decay, which is {shift.smallest} "
                "for some block; use a positive damping such as Relative(0.1)."
            )

    def solve(self, state: AbstractDualState, rows: Rows) -> Solution:
        state = state.present(self)
        basis, shift, count = state.operator.rows, state.shift, state.operator.count
        size = rows.squared_norms().double()
        if bad := nonfinite_rows(size):
            return refuse_input(rows, bad, shift)
        overlaps = self._overlaps(state, rows)
        w = state.solve(overlaps)
        value = DualSolution(rows, basis, w, overlaps, shift, count, state.operator.wider)
        residual = relative(_residual(state, w, overlaps), size.sqrt())
        rounding = _rounding(state.operator, shift)
        notes = {"damping": shift.damping, "rows": len(basis), "smallest_curvature": 0.0, "rounding": rounding}
        if len(basis) >= state.operator.size:
            del notes["smallest_curvature"]  # with fewer rows than parameters C is singular; otherwise unknown
        if bad := nonfinite_rows(w):
            return Solution(value, residual, Result.nonfinite_output, 1, notes, bad)
        wrong = current().decided(~(residual <= self.rtol) | (rounding > _ROUNDING))
        failed = tuple(int(i) for i in wrong.nonzero().flatten())
        residual = torch.where(size > 0, (residual.square() + rounding**2).sqrt(), residual)
        return Solution(value, residual, Result.inaccurate if failed else Result.successful, 1, notes, failed)

    def _overlaps(self, state: AbstractDualState, rows: Rows) -> Tensor:
        operator, shift = state.operator, state.shift
        if rows is operator.rows:
            return state.overlaps()
        if shift.uniform is not None:
            return rows.inner(operator.rows, dtype=operator.wider).double() / shift.uniform
        return shift.inverse(rows).inner(operator.rows, dtype=operator.wider).double()

    def leverages(self, state: AbstractDualState) -> Float[Tensor, " m"]:
        """h_i = (1/N) g_i^T (C + D)^-1 g_i for every row of the curvature, in [0, 1): exact, from the `state` alone.

        Where the rows are the examples' loss gradients this is each example's self-influence.
        """
        return state.present(self).leverages()


def _factor(k: Tensor, count: int) -> Tensor | None:
    """Cholesky factor of N + K, or None where rounding has left K too negative. Takes the place of k."""
    k.diagonal().add_(count)
    # Transposed, a symmetric matrix lies as the factor is wanted, so that none other is made.
    factor, info = k.mT, torch.empty((), dtype=torch.int32, device=k.device)
    torch.linalg.cholesky_ex(factor, out=(factor, info))
    return None if int(info) else factor


def _residual(state: AbstractDualState, w: Tensor, overlaps: Tensor) -> Tensor:
    """|(C + D) x - b| per row, by Gram algebra: it is G^T e with e = G x / N - w, so its square is e K e^T.

    K carries the rounding of the rows' own dtype, which this algebra cannot see: `_rounding` looks at that.
    """
    operator = state.operator
    e = (overlaps - state.dual_gram(w)) / operator.count - w
    return (operator.times(e) * e).sum(1).clamp_min(0.0).sqrt()


def _rounding(operator: Gram, shift: Shift) -> float:
    """Error of the Gram matrix in the precision of its products over what is added to its diagonal, eps |K_D| / N.

    Far below 1 the weakest directions are still decided by D and not by rounding.
    """
    largest = power_iteration(lambda v: operator.times(v[None])[0], operator.gram_diagonal().sqrt(), steps=6)
    return largest * torch.finfo(operator.precision).eps / (operator.count * shift.smallest)

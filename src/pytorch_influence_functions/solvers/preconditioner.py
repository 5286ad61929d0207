"""A damped curvature's inverse as an operator: what speeds up `CG` and `Neumann` on another curvature."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ..core.errors import InvalidInput
from ..curvature.base import AbstractCurvature, Budget, Form
from ..curvature.cost import Amount, Cost, ProblemSize
from ..gradients.per_example import Derivatives
from ..linalg.operator import AbstractOperator, AbstractSymmetric
from ..linalg.rows import Rows
from ..linalg.shift import Shift
from ..linalg.space import Space
from .base import AbstractSolver
from .direct import Spectral
from .dual import Woodbury

# Above this many parameters a preconditioner is kept as rows, not as a dense matrix.
_DENSE_PARAMETERS = 3000


@dataclass(frozen=True, eq=False)
class Inverse(AbstractOperator):
    """(C + D)^-1 by a direct solver. It only speeds up another solver, which checks its own residual."""

    space: Space
    solver: AbstractSolver[Any]
    state: Any

    def apply(self, rows: Rows) -> Rows:
        return self.solver.solve(self.state, rows).value.rows()


@dataclass(frozen=True, eq=False)
class Preconditioner:
    """A curvature made ready to precondition with; `inverse` is cheap to ask for under another D."""

    solver: AbstractSolver[Any]
    operator: AbstractSymmetric
    curvature: AbstractCurvature

    @staticmethod
    def of(curvature: AbstractCurvature, derivatives: Derivatives, budget: Budget) -> Preconditioner:
        """Compute the curvature once, in the form that the direct solver fitting its size needs.

        Raises:
            InvalidInput: the curvature has no cheap inverse at this size.
        """
        solver = direct_solver(curvature, derivatives.space.size)
        operator = solver.operator(curvature, derivatives, budget)
        solver.check_memory(operator, budget)
        return Preconditioner(solver, operator, curvature)

    @staticmethod
    def cost(curvature: AbstractCurvature, size: ProblemSize, steps: Amount) -> Cost:
        """Making it, and applying it to every query in every step."""
        return direct_solver(curvature, size.parameters).cost(size.for_queries(size.n_queries * steps), curvature)

    def inverse(self, shift: Shift) -> Inverse:
        """(C + D)^-1 as an operator."""
        return Inverse(self.operator.space, self.solver, self.solver.init(self.operator, shift))


def direct_solver(curvature: AbstractCurvature, parameters: int) -> AbstractSolver[Any]:
    """The direct solver that suits a curvature over so many parameters.

    Raises:
        InvalidInput: there is none.
    """
    if curvature.drops_directions:
        raise InvalidInput(
            f"{curvature!r} has no inverse across its directions and cannot precondition; use complement='zero'."
        )
    small = parameters <= _DENSE_PARAMETERS
    if Form.SPECTRAL in curvature.forms or (Form.MATRIX in curvature.forms and small):
        return Spectral()
    if Form.GRAM in curvature.forms:
        return Woodbury()
    raise InvalidInput(
        f"{type(curvature).__name__}() has no cheap inverse over {parameters:,} parameters to "
        "precondition with; use EKFAC(), EmpiricalFisher(), Fisher(samples=1) or GGN()."
    )

"""A damped curvature's inverse as an operator: what speeds up `CG` and `Neumann` on another curvature."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ..core.errors import InvalidInput
from ..curvature.base import AbstractCurvature, Budget, Form
from ..curvature.exact import Identity
from ..curvature.low_rank import Arnoldi, Nystrom
from ..gradients.per_example import Derivatives
from ..linalg.dual_solution import DualSolution
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
    """(C + D)^-1 by a direct solver. Only ever a guide: the solver it guides checks its own residual."""

    space: Space
    solver: AbstractSolver[Any]
    state: Any

    def apply(self, rows: Rows) -> Rows:
        value = self.solver.solve(self.state, rows).value
        return value.rows() if isinstance(value, DualSolution) else value


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
        small = derivatives.space.size <= _DENSE_PARAMETERS
        if isinstance(curvature, (Arnoldi, Nystrom)) and curvature.complement == "dropped":
            raise InvalidInput(
                f"{curvature!r} has no inverse across its directions and cannot precondition; use complement='zero'."
            )
        if curvature.forms == (Form.SPECTRAL,) or isinstance(curvature, Identity):
            return Preconditioner(Spectral(), curvature.of(derivatives, Form.SPECTRAL, budget), curvature)
        if Form.MATRIX in curvature.forms and small:
            return Preconditioner(Spectral(), curvature.of(derivatives, Form.MATRIX, budget), curvature)
        if Form.GRAM in curvature.forms:
            return Preconditioner(Woodbury(), curvature.of(derivatives, Form.GRAM, budget), curvature)
        raise InvalidInput(
            f"{type(curvature).__name__}() has no cheap inverse over {derivatives.space.size:,} parameters to "
            "precondition with; use EKFAC(), EmpiricalFisher(), Fisher(samples=1) or GGN()."
        )

    def inverse(self, shift: Shift) -> Inverse:
        """(C + D)^-1 as an operator."""
        return Inverse(self.operator.space, self.solver, self.solver.init(self.operator, shift))

"""A damped curvature's inverse as an operator: what speeds up `CG` and `Neumann` on another curvature."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ..curvature import AbstractCurvature, Budget, Form, Identity
from ..damping import Shift
from ..errors import InvalidInput
from ..gradients import Derivatives
from ..operators import AbstractOperator, Expansion
from ..rows import Rows
from ..space import Space
from .base import AbstractSolver
from .direct import Spectral
from .dual import Woodbury

# Above this many parameters a preconditioner is kept as rows, not as a dense matrix.
_DENSE_PARAMETERS = 3000


@dataclass(frozen=True, eq=False)
class Inverse(AbstractOperator):
    """(C + D)^-1 by a direct solver."""

    space: Space
    solver: AbstractSolver[Any]
    state: Any

    def apply(self, rows: Rows) -> Rows:
        value = self.solver.solve(self.state, rows).unwrap()
        return value.rows() if isinstance(value, Expansion) else value


def inverse_of(curvature: AbstractCurvature, derivatives: Derivatives, shift: Shift, budget: Budget) -> Inverse:
    """The inverse of `curvature` plus `shift`, by whichever direct solver fits its size."""
    small = derivatives.space.size <= _DENSE_PARAMETERS
    solver: AbstractSolver[Any]
    if isinstance(curvature, Identity):
        form, solver = Form.SPECTRAL, Spectral()
    elif Form.MATRIX in curvature.forms and small:
        form, solver = Form.MATRIX, Spectral()
    elif Form.GRAM in curvature.forms:
        form, solver = Form.GRAM, Woodbury(sweep=False)
    else:
        raise InvalidInput(
            f"{type(curvature).__name__}() has no cheap inverse over {derivatives.space.size:,} parameters to "
            "precondition with; use EmpiricalFisher() or GGN()."
        )
    operator = curvature.of(derivatives, form, budget)
    return Inverse(derivatives.space, solver, solver.init(operator, shift))

"""The method that an action asks: one that solves a linear system over the parameters."""

from __future__ import annotations

from typing import Any

from ..core.errors import InvalidInput
from ..influence.agreement import Units
from ..influence.attribution import Attribution, Influence
from ..methods.names import as_method
from ..problem.problem import Problem


def fit_system(problem: Problem | Attribution, method: Any, asking: str) -> Attribution:
    """The fitted method that solves with the curvature; what is fitted already is used again.

    Args:
        problem: model, loss and training data, or what `fit` gave for them.
        method: an `Influence` by name or made; `None`: chosen by size.
        asking: the function that needs it, for messages.

    Raises:
        InvalidInput: the problem is none, the method solves no linear system, or does not say where in the parameters.
    """
    if not isinstance(problem, (Problem, Attribution)):
        raise InvalidInput(
            f"{asking}() takes a Problem, or what fit() gave for one, got {type(problem).__name__}; write "
            f"{asking}(Problem(model, loss, train), ...)."
        )
    if isinstance(problem, Attribution):
        if method is not None:
            raise InvalidInput(
                f"{asking}() got a fitted method and method= as well; give the problem, or leave method= out."
            )
        fitted = problem
        fitted.fitted_at.check()
    else:
        spec = as_method(method)
        if not isinstance(spec, Influence):
            raise InvalidInput(
                f"{asking}() solves a linear system, which {type(spec).__name__} does not have; give an Influence such "
                "as method='exact', 'dual' or 'ekfac'."
            )
        fitted = spec.fit(problem)
    if fitted.spec.projection is not None:
        raise InvalidInput(
            f"projection={fitted.spec.projection!r} keeps no direction in the parameters, so nothing can be said of "
            "them; leave the projection out."
        )
    if fitted.spec.units is not Units.RAW:
        raise InvalidInput(
            f"{asking}() moves the parameters, whose changes at several checkpoints have no common spread; give the "
            "method at the final weights, or with units='raw'."
        )
    return fitted

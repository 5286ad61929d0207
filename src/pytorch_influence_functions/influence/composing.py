"""Which curvature and solver a method is fitted with: what was asked for, or what `Auto` chooses."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from ..core.errors import InvalidInput, NotLikelihood
from ..curvature.base import Budget
from ..curvature.cost import ProblemSize
from ..gradients.per_example import Derivatives
from ..solvers.auto import Auto, choose_composition
from ..solvers.forecast import Composition
from .checks import check_options_used


def chooses_curvature(spec: Any) -> bool:
    """Whether a method leaves the curvature to `Auto`, which may take another one where the first does not exist.

    Args:
        spec: an `Influence`.
    """
    return spec.curvature is None and isinstance(spec.solver, Auto)


def compose(
    spec: Any,
    derivatives: Derivatives,
    n_queries: int,
    size: ProblemSize | None = None,
    obstacle: NotLikelihood | None = None,
) -> Composition:
    """Curvature, solver and preconditioner.

    Args:
        spec: an `Influence`.
        derivatives: how gradients are taken.
        n_queries: how many queries are expected.
        size: of the problem, where it is known.
        obstacle: why the loss has no Gauss-Newton matrix, where fitting found that out.

    Raises:
        InvalidInput: neither a curvature nor `Auto` is given.
    """
    if isinstance(spec.solver, Auto):
        size = size or ProblemSize.of(derivatives, n_queries, timed=False)
        size = size if obstacle is None else replace(size, obstacle=obstacle, outputs=None)
        chosen = choose_composition(spec.curvature, size, Budget.of(spec.memory))
        check_options_used(spec, chosen.solver)
        return chosen if spec.preconditioner is None else replace(chosen, preconditioner=spec.preconditioner)
    if spec.curvature is None:
        raise InvalidInput(
            f"Influence(solver={spec.solver!r}) does not say which curvature it solves with; "
            "add curvature=GGN(), Hessian() or EmpiricalFisher(), or leave the solver to Auto()."
        )
    return Composition(spec.curvature, spec.solver, "asked for", spec.preconditioner)

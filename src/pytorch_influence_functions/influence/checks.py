"""What is refused at the door, in the words of the one who called."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from ..core.errors import InvalidInput, NonFinite
from ..core.validate import whole_number
from ..curvature.base import AbstractCurvature
from ..gradients.projections import AbstractReduction
from ..linalg.rows import Route
from ..problem.problem import Problem
from ..problem.working_precision import check_precision
from ..scaling.base import AbstractScaling
from ..solvers.auto import Auto
from ..solvers.base import AbstractSolver, no_preconditioner
from ..solvers.forecast import Composition
from ..solvers.truncation import Truncation
from .method import AbstractMethod


def check_parts(spec: Any) -> None:
    """Refuse classes and names where an instance is needed: they would fail later, far from here."""
    expected: dict[str, tuple[type | tuple[type, ...], str]] = {
        "curvature": (AbstractCurvature, "a curvature such as GGN()"),
        "solver": ((AbstractSolver, Auto), "a solver such as CG() or Auto()"),
        "preconditioner": (AbstractCurvature, "a curvature such as GGN()"),
        "scaling": (AbstractScaling, "Raw() or Leverage()"),
        "projection": (AbstractReduction, "a projection such as Sketch(1024)"),
        "truncation": (Truncation, "Truncation(tolerance=0.01) or Truncation(rank=32)"),
    }
    for name, (kinds, examples) in expected.items():
        given = getattr(spec, name)
        if isinstance(given, kinds) or (given is None and name not in ("solver", "scaling")):
            continue
        if isinstance(given, type):
            raise InvalidInput(f"{name}= is the class {given.__name__}; write {given.__name__}(), an instance.")
        if isinstance(given, AbstractMethod):
            raise InvalidInput(
                f"{name}= got {given!r}, which is a whole method; pass it as method=, or call its fit(problem)."
            )
        raise InvalidInput(f"{name}= must be {examples}, got {given!r} of type {type(given).__name__}.")
    check_precision(spec.precision)
    if spec.precision is not None and spec.curvature is not None and not spec.curvature.semidefinite:
        raise InvalidInput(
            f"precision={spec.precision!r} leaves two digits, and {spec.curvature!r} takes second derivatives of the "
            "model, which need more; leave it out, or use GGN() or EKFAC()."
        )
    if isinstance(spec.solver, AbstractSolver):
        check_options_used(spec, spec.solver)
    if spec.truncation is not None and Route.of(spec.route) is Route.FORWARD:
        raise InvalidInput(
            f"truncation={spec.truncation!r} would do nothing: route='forward' makes no inner products that low rank "
            "could shorten; leave one of the two out."
        )


def check_options_used(spec: Any, solver: AbstractSolver[Any]) -> None:
    """Refuse options that would do nothing with a solver.

    Raises:
        InvalidInput: there is one.
    """
    name = type(solver).__name__
    if spec.damping is not None and solver.damps_itself:
        raise InvalidInput(
            f"damping={spec.damping!r} would do nothing: every group of {name}(groups=...) has its own damping; "
            "leave one of the two out."
        )
    if spec.truncation is not None and solver.solves_in_dual:
        raise InvalidInput(
            f"truncation={spec.truncation!r} would gain nothing: solutions of {name}() are combinations of rows, "
            "which are never written out; leave it out, or use another solver."
        )
    no_preconditioner(solver, spec.preconditioner)


def as_weights(given: Any) -> tuple[float, ...] | None:
    """One number per checkpoint.

    Raises:
        InvalidInput: something else was given.
    """
    if given is None:
        return None
    try:
        weights = tuple(float(w) for w in given)
    except (TypeError, ValueError) as cause:
        raise InvalidInput(
            f"weights={given!r} must be one number per checkpoint, such as (0.1, 0.1, 0.01), or None for their mean."
        ) from cause
    if not weights or not all(math.isfinite(w) for w in weights) or not any(weights):
        raise InvalidInput(f"weights={given!r} must be finite numbers, one per checkpoint, and not all zero.")
    return weights


def check_weights_fit(weights: tuple[float, ...] | None, checkpoints: int) -> None:
    """Refuse weights that are not one per checkpoint (one for the model alone).

    Raises:
        InvalidInput: their number differs.
    """
    members = max(1, checkpoints)
    if weights is not None and len(weights) != members:
        there = f"{checkpoints} checkpoints" if checkpoints else "no checkpoints, only the model itself"
        raise InvalidInput(
            f"There are {len(weights)} weights and the problem has {there}; give {members} "
            f"weight{'' if members == 1 else 's'}, or pass the checkpoints with checkpoints=."
        )


def check_units(spec: Any) -> None:
    """Refuse settings that units other than the raw ones would undo.

    Raises:
        InvalidInput: there is one.
    """
    if spec.units.value == "raw":
        return
    if spec.weights is not None:
        raise InvalidInput(
            f"weights={spec.weights!r} would be undone by units={spec.units.value!r}, in which every checkpoint counts "
            "alike; leave one of the two out."
        )
    if spec.truncation is not None:
        raise InvalidInput(
            f"truncation={spec.truncation!r} certifies scores as they are, not their average in "
            f"units={spec.units.value!r}; leave one of the two out."
        )


def check_projectable(spec: Any, problem: Problem, composition: Composition) -> None:
    """Refuse what needs the parameters themselves where only projections of rows are at hand."""
    if spec.projection is None:
        return
    curvature, solver = composition.curvature, composition.solver
    if not curvature.projectable(solver.form(curvature)) or composition.preconditioner is not None:
        raise InvalidInput(
            f"{curvature!r} with {solver!r} works on the parameters and cannot take a projection; use "
            "EmpiricalFisher(), GGN() or Fisher() with Spectral(), Cholesky() or Woodbury(), or leave it out."
        )
    if spec.route is Route.FORWARD:
        raise InvalidInput("route='forward' makes no rows that could be projected; leave the route to 'auto'.")
    if problem.weight_decay.per_example:
        raise InvalidInput(
            "Weight decay that every example carries cannot be projected; use WeightDecay(strength, per_example=False)."
        )


def check_problem(problem: Any) -> None:
    """Refuse what is no problem, or has too few examples for a removal to mean anything."""
    if not isinstance(problem, Problem):
        raise InvalidInput(
            f"fit() and forecast() take a Problem, got {type(problem).__name__}; write "
            "Problem(model, loss, train), or call ptif.attribute(model, train, queries)."
        )
    if len(problem) < 2:
        raise InvalidInput(
            f"The training data hold {len(problem)} example, expected at least 2: removing the only one leaves nothing "
            "to train on; give the whole training set."
        )


def check_top(top: Any) -> None:
    """Refuse a `top` that is no whole number of at least 1.

    Raises:
        InvalidInput: it is not.
    """
    if top is not None:
        whole_number("top", top, hint="it is how many examples are kept at each end; None keeps all scores")


_SMALL = ("The", "A", "Label", "Target", "Item", "Array", "Arrays", "Reading", "Index", "Nothing")


@contextmanager
def in_queries(place: str = "queries") -> Iterator[None]:
    """Say that an index or shape speaks of the queries: the same sentence would be read as the training data's."""
    where = "In the queries" if place == "queries" else f"In {place}="
    try:
        yield
    except (InvalidInput, NonFinite) as error:
        message = str(error)
        if not message.startswith((where, "Query ") if place == "queries" else where):
            if "has no target" in message and "language model" not in message:
                message += (
                    " To ask about unlabelled examples, give the model's own answers as labels: queries=(x, "
                    "model(x).argmax(1))."
                )
            plain = message.split(" ", 1)[0] in _SMALL
            error.args = (f"{where}, {message[0].lower() + message[1:] if plain else message}",)
        raise


@contextmanager
def of_measure() -> Iterator[None]:
    """What is wrong with a measure is not said of the loss."""
    try:
        yield
    except (InvalidInput, NonFinite) as error:
        error.args = (str(error).replace("The loss", "The measure", 1),)
        raise

"""`Auto`: which curvature, damping and solver, by counted cost; it always says why."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, final

from ..core.records import Record
from ..curvature.base import AbstractCurvature, Budget, Form
from ..curvature.cost import Amount, Cost, ProblemSize
from ..curvature.exact import GGN, EmpiricalFisher, Fisher
from ..curvature.kronecker.records import EKFAC
from ..damping.rules import PerDirection, Relative
from .base import AbstractSolver
from .cg import CG
from .direct import Cholesky, Spectral
from .dual import Woodbury
from .forecast import Composition
from .neumann.series import Neumann

# An exact solution that was asked for, or of a model that is affine in its parameters, may take so many operations,
# some seconds on one core, or so many passes over the data.
_AFFORDABLE, _AFFORDABLE_PASSES = 5e11, 20
# That of a network, which is nearer to retraining than EK-FAC on some and no nearer on others (docs/trust.md), may take
# about half a second of one core, or twice what EK-FAC takes.
_AFFORDABLE_NETWORK, _TIMES_FACTORED = 5e10, 2
# However small the network, so many passes are slow: one for every pixel of an image, at 32 x 32 pixels half a minute.
_MOST_PASSES = 500
# Conjugate gradients may take more where an exact solution was asked for, or is worth it: for how many queries that is
# judged must not depend on how many are asked.
_CG_OPERATIONS, _JUDGED_QUERIES = 3e12, 100
# What they may take by default, of a single layer: some half a minute, counted generously.
_CONVEX_OPERATIONS = 2e12
# What takes less than this counts as free: then the dense form is taken, whose every damping is free as well.
_INSTANT = 2e10
# Up to this many parameters of an affine model a light damping is the default: the exact solution is what retraining
# gives.
_FEW_PARAMETERS = 2000
# In mean eigenvalues, for the Gauss-Newton matrix of a network, which is that of a linearisation: chosen on the
# league's regression, where it has a linear datamodelling score of .62 and a tenth of it .51; see docs/trust.md.
_OF_NETWORKS = 30.0
# Of a large network's dual, as of Kronecker factors, in units of the mean over its directions.
_OF_FEW_ROWS = 0.2
# Rows that a preconditioner may be made of, and their bytes.
_GUIDE_ROWS, _GUIDE_BYTES = 5000, 1 << 30
# Kronecker factors above this are fitted when asked for by name, with a folder to keep them.
_FACTOR_BYTES = 1 << 30


@final
@dataclass(frozen=True, repr=False)
class Auto(Record):
    """Choose the solver (and, in `ptif.attribute`, curvature and damping) by counting what each would cost.

    | situation | choice |
    |---|---|
    | outputs affine in the parameters; the GGN, densely or in its dual form, within seconds or twenty passes | exact |
    | one layer with a convex loss, where 100 queries are counted at half a minute | exact, by conjugate gradients too |
    | a network; the same within half a second of one core, or twice what EK-FAC takes | exact |
    | more | EK-FAC: about one pass over the data for any number of queries |
    | its factors are too large, and the dual of the empirical Fisher fits | nearly free, a little less faithful |
    | else | LiSSA with self-tuned step, batch and depth: cost does not grow with N |

    Damping is light (`Relative(0.1)` up to 2,000 parameters, `Relative(3.0)` above) where outputs are affine in the
    parameters; the Gauss-Newton matrix of a network gets `Relative(30.0)`, and the dual that stands for one that is too
    large `PerDirection(0.2)`.

    An exact solution is what retraining gives where the outputs are affine, and is worth seconds there. For a network
    it is nearer to retraining on some and no nearer on others, and is worth half a second; the reason says how much
    less EK-FAC would take, and `method="ekfac"` asks for it. A dense matrix is eigendecomposed where that takes no
    time, so that every damping is free, and gets a Cholesky factor elsewhere.

    A loss that is not convex in the model's outputs, or piecewise linear in them, has no Gauss-Newton matrix: the
    empirical Fisher takes its place, and the reason is given.

    What is estimated (curvature and damping) depends on the problem alone, so that a query's scores do not depend on
    how many others are asked. The number of queries only decides how a curvature that was asked for is solved with:
    by conjugate gradients where its products are affordable for all of them, else by LiSSA.
    """


def choose_composition(curvature: AbstractCurvature | None, size: ProblemSize, budget: Budget) -> Composition:
    """By counts alone, so that the same problem always gets the same method."""
    if curvature is not None and Form.SPECTRAL in curvature.forms:
        return Composition(curvature, Spectral(), f"{type(curvature).__name__} comes with its eigenvalues")
    chosen = curvature or (GGN() if size.obstacle is None else EmpiricalFisher())
    size = replace(size, damping_share=_damping(size, chosen).share)
    if curvature is None and not size.affine:
        exact = _network_composition(chosen, size, budget)
        return _explain(exact or _large_composition(chosen, size, budget), size)
    exact = _exact_composition(chosen, size, budget, _AFFORDABLE, Cost(_AFFORDABLE_PASSES))
    exact = exact or _convex_composition(chosen, size, budget)
    if exact is not None:
        return exact if curvature is not None else _explain(_compared(exact, size), size)
    if curvature is not None:
        return _iterative_composition(curvature, size, budget)
    return _explain(_large_composition(chosen, size, budget), size)


def _network_composition(chosen: AbstractCurvature, size: ProblemSize, budget: Budget) -> Composition | None:
    """An exact solution for a network, where it is worth what it takes beside EK-FAC; the reason says how much."""
    beside = _factored_cost(size.for_queries(1)).repeated(_TIMES_FACTORED)
    exact = _exact_composition(chosen, size, budget, _AFFORDABLE_NETWORK, beside)
    return None if exact is None else _compared(exact, size)


def _factored_cost(size: ProblemSize) -> Cost:
    """What fitting EK-FAC and scoring with it take."""
    return _factored(size).cost(size, Form.SPECTRAL) + Cost(1)


def _compared(exact: Composition, size: ProblemSize) -> Composition:
    """An exact solution; the reason says how much less EK-FAC would take, for as many queries, where it is much."""
    taken = exact.cost(size) + Cost(1)
    times = size.flops(taken) / size.flops(_factored_cost(size))
    if size.flops(taken) <= _INSTANT or times <= _TIMES_FACTORED:
        return exact
    return replace(exact, why=f'{exact.why}; method="ekfac" would take about 1/{times:.0f} of the time')


def _explain(choice: Composition, size: ProblemSize) -> Composition:
    """The choice, with why its curvature is not the Gauss-Newton matrix."""
    if size.obstacle is None:
        return choice
    return replace(choice, why=f"{choice.why}; no Gauss-Newton matrix: {str(size.obstacle).split('; ')[0]}")


def _large_composition(chosen: AbstractCurvature, size: ProblemSize, budget: Budget) -> Composition:
    """What stands for a curvature that is too large for an exact solution."""
    large = f"the {chosen.title} over {size.parameters:,} parameters and {size.examples:,} examples"
    large += f" x {size.columns:,} independent outputs" if size.columns > 1 else ""
    large += f" is too large for an exact solution{'' if size.affine else ' within a second'}"
    factored = _factored(size)
    if factored.cost(size, Form.SPECTRAL).bytes <= _FACTOR_BYTES:
        why = f"{large}: EK-FAC takes one pass over the data for any number of queries"
        return Composition(factored, Spectral(), why)
    why = f"{large}, and {size.examples:,} examples are few enough for the dual of the empirical Fisher"
    # A share of the mean over all weights is nothing beside the few directions that the rows of a large network have:
    # the tokens of a text would share out its score by numbers a million times as large.
    damping = _damping(size, EmpiricalFisher()) if size.affine else PerDirection(_OF_FEW_ROWS)
    empirical = Composition(EmpiricalFisher(), Woodbury(), why, damping=damping)
    if _fits(empirical, size.for_queries(1), budget, most=6 * _AFFORDABLE):
        return empirical
    return _by_batches(chosen, size)


def _factored(size: ProblemSize) -> EKFAC:
    """EK-FAC, of the given labels where the loss knows no others."""
    return EKFAC() if size.obstacle is None else EKFAC(EmpiricalFisher())


def _exact_composition(
    curvature: AbstractCurvature, size: ProblemSize, budget: Budget, most: Amount, beside: Cost
) -> Composition | None:
    """The cheapest exact solver, dense or dual, if it takes at most so many operations or what is given `beside`."""
    one = size.for_queries(1)
    affordable = [c for c in _direct_compositions(curvature, size) if _fits(c, one, budget, most, beside)]
    return min(affordable, key=lambda c: max(_INSTANT, one.flops(c.cost(one))), default=None)


def _convex_composition(curvature: AbstractCurvature, size: ProblemSize, budget: Budget) -> Composition | None:
    """The cheapest exact solver for a single layer, whose loss is convex, if conjugate gradients are affordable.

    There the exact solution is what retraining gives: for logistic regression over MNIST a linear datamodelling score
    of .97, where EK-FAC has .87.
    """
    if len(size.blocks) > 1 or not size.used_once or not curvature.gauss_newton or not size.affine:
        return None
    guided = _guided_composition(curvature, size)
    some = size.for_queries(_JUDGED_QUERIES)
    if some.flops(guided.cost(some)) > _CONVEX_OPERATIONS:
        return None
    candidates = [c for c in (guided, *_direct_compositions(curvature, size)) if c.cost(size).bytes <= budget.bytes]
    return min(candidates, key=lambda c: size.flops(c.cost(size)), default=None)


def _direct_compositions(curvature: AbstractCurvature, size: ProblemSize) -> list[Composition]:
    """The curvature densely and in its dual form, as far as it has them."""
    solvers: list[AbstractSolver[Any]] = [Spectral(), Cholesky(), Woodbury()]
    ways = [(solver, Form.GRAM if solver.solves_in_dual else Form.MATRIX) for solver in solvers]
    return [
        Composition(curvature, solver, _why_exact(curvature, form, size), damping=_damping(size, curvature))
        for solver, form in ways
        if form in curvature.forms
    ]


def _damping(size: ProblemSize, curvature: AbstractCurvature) -> Relative:
    """It is part of what is estimated, and so goes with the model and its size and not with a solver."""
    if curvature.gauss_newton and not size.affine:
        return Relative(_OF_NETWORKS)
    return Relative(0.1) if size.parameters <= _FEW_PARAMETERS else Relative(3.0)


def _fits(
    choice: Composition, size: ProblemSize, budget: Budget, most: Amount, beside: Cost = Cost(_AFFORDABLE_PASSES)
) -> bool:
    """Whether a choice is affordable, in operations (`most`, or those of a cost `beside`) and in memory."""
    cost = choice.cost(size)
    affordable = max(most, size.flops(beside))
    return size.flops(cost) <= affordable and cost.passes <= _MOST_PASSES and cost.bytes <= budget.bytes


def _why_exact(curvature: AbstractCurvature, form: Form, size: ProblemSize) -> str:
    if form is Form.MATRIX:
        return f"{size.parameters:,} parameters are few enough for the dense {curvature.title}, exactly"
    rows, n = curvature.rows(size) or size.examples, size.examples
    counted = f"{n:,} examples x {rows // n:,} independent outputs" if rows % n == 0 else f"{rows:,} rows"
    return (
        f"{counted} are few enough for the dual of the {curvature.title}: exact over all {size.parameters:,} parameters"
    )


def _iterative_composition(curvature: AbstractCurvature, size: ProblemSize, budget: Budget) -> Composition:
    """How to solve with a curvature that was asked for and is too large for an exact solution."""
    guided = _guided_composition(curvature, size)
    if size.flops(guided.cost(size)) <= _CG_OPERATIONS:
        return guided
    why = _why_exact(curvature, Form.GRAM, size)
    dual = Composition(curvature, Woodbury(), why, damping=_damping(size, curvature))
    if Form.GRAM in curvature.forms and _fits(dual, size.for_queries(1), budget, most=6 * _AFFORDABLE):
        return dual
    return _by_batches(curvature, size)


def _guided_composition(curvature: AbstractCurvature, size: ProblemSize) -> Composition:
    queries = f"{size.n_queries} quer{'y' if size.n_queries == 1 else 'ies'}"
    why = f"{queries} x {size.examples:,} examples make conjugate gradients on the exact {curvature.title} affordable"
    return Composition(curvature, CG(rtol=1e-3, max_steps=500), why, _guide(curvature, size), _damping(size, curvature))


def _by_batches(curvature: AbstractCurvature, size: ProblemSize) -> Composition:
    why = f"{size.examples:,} examples are too many for full products: LiSSA on mini-batches, its cost independent of N"
    return Composition(curvature, Neumann(), why, damping=_damping(size, curvature))


def _guide(curvature: AbstractCurvature, size: ProblemSize) -> AbstractCurvature | None:
    """What to precondition with: one sampled gradient per example, inverted in its dual form, where N allows; else
    EK-FAC. Whichever it is has to pay in a trial.

    On a Fashion-MNIST perceptron (N = 2,000, 10 queries, damping of one mean eigenvalue, residual 1e-2) 44 steps
    instead of 137; three samples take 38 and the empirical Fisher 40, no more worth their cost.
    """
    if not curvature.gauss_newton:
        return None
    fits = size.examples <= _GUIDE_ROWS and size.examples * size.row_bytes <= _GUIDE_BYTES
    return Fisher(samples=1) if fits else EKFAC()

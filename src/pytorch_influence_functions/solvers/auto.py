"""`Auto`: which curvature and which solver, by size; it always says why, and forecasts what it will cost."""

from __future__ import annotations

import time
from dataclasses import dataclass, replace
from typing import Any, final

import torch

from ..curvature.base import AbstractCurvature, Form
from ..curvature.diagonal import Diagonal
from ..curvature.exact import GGN, EmpiricalFisher, Fisher, Hessian, Identity
from ..curvature.kronecker.records import EKFAC, AbstractKronecker
from ..curvature.low_rank import Arnoldi, Nystrom
from ..curvature.subsample import Subsample
from ..damping.rules import AbstractDamping, Relative
from ..gradients.per_example import Derivatives
from ..linalg.blocks import matrix_shape
from ..linalg.lanczos import default_steps
from ..objectives.base import AbstractLikelihood
from ..problem.problem import first_batch
from .base import AbstractSolver
from .cg import CG
from .datainf import DataInf
from .direct import Cholesky, Spectral
from .dual import Woodbury
from .neumann import Neumann

# Above these a method's cost stops being a matter of seconds on two cores.
_DENSE_PARAMETERS = 2000
_DUAL_ROWS = 5000
_DUAL_EXAMPLES = 20_000
_CG_OPERATIONS = 3e12
_CG_STEPS = 60
_GUIDE_BYTES = 1 << 30
# Kronecker factors above this are fitted when asked for by name, with a folder to keep them.
_FACTOR_BYTES = 1 << 30
_SIDE = EKFAC().largest


@final
@dataclass(frozen=True)
class Auto:
    """Choose the solver (and, in `ptif.attribute`, the curvature) by the size of the problem.

    | situation | choice |
    |---|---|
    | at most 2,000 parameters | dense GGN or Hessian, eigendecomposed in float64: every damping is free |
    | N x outputs at most 5,000 | GGN in its dual form: exact over all parameters |
    | curvature products affordable | conjugate gradients on the exact GGN, all queries at once |
    | more, a likelihood | EK-FAC: one pass over the data for any number of queries |
    | more, N at most 20,000 | empirical Fisher in its dual form: nearly free, a little less faithful |
    | else | LiSSA with self-tuned step, batch and depth: cost does not grow with N |
    """


@dataclass(frozen=True)
class ProblemSize:
    """The sizes a choice depends on."""

    parameters: int
    examples: int
    outputs: int | None
    """Columns of H^(1/2) per example; None when the objective is no likelihood."""
    n_queries: int
    row_numbers: float
    """Numbers kept per example when its gradient row is stored in its cheapest exact form."""
    operations: float
    """Floating-point operations of one example's forward pass."""
    seconds: float
    """Measured seconds for one example's gradient row."""
    number_bytes: int = 4
    factor_numbers: float = 0.0
    """Numbers in the Kronecker factors of all layers."""

    @staticmethod
    def of(derivatives: Derivatives, n_queries: int) -> ProblemSize:
        """Count on one small batch."""
        problem, objective = derivatives.problem, derivatives.objective
        some = torch.arange(min(len(problem), problem.batch_size))
        with first_batch(problem, ids=some) as (ids, batch):
            with torch.no_grad():
                outputs = objective.outputs(problem.model, batch)
            derivatives.loss_rows(ids, batch)
            start = time.perf_counter()
            rows = derivatives.loss_rows(ids, batch).rows
            seconds = time.perf_counter() - start
        return ProblemSize(
            parameters=derivatives.space.size,
            examples=len(problem),
            outputs=objective.root_size(outputs) if isinstance(objective, AbstractLikelihood) else None,
            n_queries=n_queries,
            row_numbers=rows.compact().numbers / len(ids),
            operations=sum(2.0 * getattr(b, "terms", 1) * torch.Size(b.shape).numel() for b in rows.blocks.values()),
            seconds=seconds / len(ids),
            number_bytes=rows.blocks[next(iter(rows.blocks))].reference.element_size(),
            factor_numbers=float(sum(d * d for b in rows.blocks.values() for d in matrix_shape(b.shape) if d <= _SIDE)),
        )

    @property
    def cg_operations(self) -> float:
        """Conjugate gradients on the GGN: each product pushes and pulls every query through the model."""
        return _CG_STEPS * self.n_queries * self.examples * 4.0 * self.operations


@dataclass(frozen=True)
class Composition:
    """A curvature, a solver, the reason in words, and what the solver is preconditioned with."""

    curvature: AbstractCurvature
    solver: AbstractSolver[Any]
    why: str
    preconditioner: AbstractCurvature | None = None


@dataclass(frozen=True)
class Forecast:
    """What a run will cost, before it is paid for: method, passes over the data, memory, seconds."""

    method: str
    why: str
    passes: float
    memory_bytes: float
    seconds: float

    def __str__(self) -> str:
        return (
            f"method   {self.method}\nwhy      {self.why}\n"
            f"passes   {self.passes:,.0f} forward+backward passes over the training data\n"
            f"memory   {self.memory_bytes / 2**20:,.0f} MiB beside the model\n"
            f"time     about {self.seconds:,.1f} s on this machine (measured on one batch)"
        )


def form_for(solver: object, curvature: AbstractCurvature) -> Form:
    """The form of the curvature that a solver needs."""
    declared = getattr(solver, "form", None)
    if isinstance(declared, Form):
        return declared
    if curvature.forms == (Form.SPECTRAL,) or isinstance(curvature, Identity):
        return Form.SPECTRAL
    if isinstance(solver, (Spectral, Cholesky)):
        return Form.MATRIX
    return Form.GRAM if isinstance(solver, Woodbury) else Form.IMPLICIT


def choose(curvature: AbstractCurvature | None, facts: ProblemSize) -> Composition:
    """By size alone, so that the same problem always gets the same method."""
    if isinstance(curvature, Identity):
        return Composition(curvature, Spectral(), "no curvature was asked for")
    if curvature is not None and curvature.forms == (Form.SPECTRAL,):
        return Composition(curvature, Spectral(), f"{type(curvature).__name__} comes with its eigenvalues")
    likelihood = facts.outputs is not None
    second = curvature or (GGN() if likelihood else Hessian())
    if facts.parameters <= _DENSE_PARAMETERS:
        why = f"{facts.parameters:,} parameters are few enough for the dense {_name(second)}, exactly"
        return Composition(second, Spectral(), why)
    duals = {EmpiricalFisher: 1, GGN: facts.outputs or 1}
    per = duals.get(type(second))
    if per is not None and facts.examples * per <= _DUAL_ROWS:
        why = (
            f"{facts.examples:,} examples x {per} outputs are few enough for the dual of the {_name(second)}: exact "
            f"over all {facts.parameters:,} parameters"
        )
        return Composition(second, Woodbury(), why)
    if not isinstance(second, EmpiricalFisher) and facts.cg_operations <= _CG_OPERATIONS and (likelihood or curvature):
        why = (
            f"{facts.n_queries} quer{'y' if facts.n_queries == 1 else 'ies'} x {facts.examples:,} examples make "
            f"conjugate gradients on the exact {_name(second)} affordable"
        )
        return Composition(second, CG(rtol=1e-3, max_steps=500), why, _guide(second, facts))
    if curvature is None and likelihood and facts.factor_numbers * facts.number_bytes <= _FACTOR_BYTES:
        why = (
            f"{facts.n_queries} queries x {facts.parameters:,} parameters are many for iterative solves: EK-FAC takes "
            "one pass over the data for all of them"
        )
        return Composition(EKFAC(), Spectral(), why)
    if curvature in (None, EmpiricalFisher()) and facts.examples <= _DUAL_EXAMPLES:
        why = (
            f"{facts.n_queries} queries x {facts.parameters:,} parameters are many for iterative solves, and "
            f"{facts.examples:,} examples few enough for the dual of the empirical Fisher"
        )
        return Composition(EmpiricalFisher(), Woodbury(), why)
    why = (
        f"{facts.examples:,} examples are too many for full products: LiSSA on mini-batches, its cost independent of N"
    )
    return Composition(second, Neumann(), why)


def default_damping(solver: object, curvature: object = None) -> AbstractDamping:
    """A share of the mean eigenvalue: 0.1 for small models solved densely, 1 per layer for Kronecker factors, else 3.

    Measured on a Fashion-MNIST perceptron of 50,890 parameters (2,000 images, linear datamodelling score over 60 half
    subsets x 3 seeds). EK-FAC, per block: .40 at a share of 0.1, .43 at 0.3, .45 at 1, .44 at 3, .40 at 10. Dual of the
    empirical Fisher: .35 at 0.1, .38 at 1, .39 at 4, .37 at 13. Conjugate gradients on the GGN: .28 at 0.3, .35 at 1,
    .40 at 3, .42 at 10. One task: where the learning rate and the number of steps are known, `FromTraining(lr, steps)`
    is the better grounded choice.
    """
    if isinstance(curvature, AbstractKronecker):
        return Relative(1.0, per_block=True)
    return Relative(0.1) if isinstance(solver, (Spectral, Cholesky)) else Relative(3.0)


def _guide(curvature: AbstractCurvature, facts: ProblemSize) -> AbstractCurvature | None:
    """What to precondition with: one sampled gradient per example, inverted in its dual form, where N allows; else
    EK-FAC. Whichever it is has to pay in a trial.

    On a Fashion-MNIST perceptron (N = 2,000, 10 queries, damping of one mean eigenvalue, residual 1e-2) 44 steps
    instead of 137; three samples take 38 and the empirical Fisher 40, no more worth their cost.
    """
    fits = facts.examples <= _DUAL_ROWS and facts.examples * facts.row_numbers * facts.number_bytes <= _GUIDE_BYTES
    if not isinstance(curvature, GGN):
        return None
    return Fisher(samples=1) if fits else EKFAC()


def forecast(choice: Composition, facts: ProblemSize, method: str) -> Forecast:
    """Passes, memory and seconds of a choice, from counts and one measured batch."""
    if isinstance(choice.curvature, Subsample):
        # The curvature's own passes are over its part; one more is over everybody.
        part = replace(facts, examples=min(facts.examples, choice.curvature.examples))
        fewer = forecast(replace(choice, curvature=choice.curvature.curvature), part, method)
        passes = 1 + max(0.0, fewer.passes - 1) * part.examples / facts.examples
        return replace(fewer, passes=passes, seconds=passes * facts.examples * facts.seconds)
    n, p, q = facts.examples, facts.parameters, facts.n_queries
    size, k = facts.number_bytes, facts.outputs or 1
    passes, memory = 1.0, 4.0 * q * p * size
    solver = choice.solver
    known = _known_cost(choice.curvature, facts)
    if known is not None:
        passes, memory = passes + known[0], memory + known[1]
    elif isinstance(solver, DataInf):
        memory += n * facts.row_numbers * size
    elif isinstance(solver, (Spectral, Cholesky)) and not isinstance(choice.curvature, Identity):
        passes += k if not isinstance(choice.curvature, Hessian) else 2 * p
        memory += 32.0 * p * p
    elif isinstance(solver, Woodbury):
        per = k if isinstance(choice.curvature, GGN) else 1
        passes = float(per) + (0 if isinstance(choice.curvature, EmpiricalFisher) else 1)
        memory = n * per * facts.row_numbers * size + 3 * 8.0 * (n * per) ** 2
    elif isinstance(solver, CG):
        passes += _CG_STEPS * 2 * q
        guide = None if choice.preconditioner is None else _known_cost(choice.preconditioner, facts)
        if guide is not None:
            passes, memory = passes + guide[0], memory + guide[1]
        elif choice.preconditioner is not None:
            memory += n * facts.row_numbers * size + 3 * 8.0 * n**2
    elif isinstance(solver, Neumann):
        passes += 2 * q * (solver.steps or 1000) * (solver.batch_size or 16) / n
    return Forecast(method, choice.why, passes, memory, passes * n * facts.seconds)


def _known_cost(curvature: AbstractCurvature, facts: ProblemSize) -> tuple[float, float] | None:
    """Passes and bytes of a curvature that is measured by products or squares; a product with one vector is two."""
    p, size = facts.parameters, facts.number_bytes
    if isinstance(curvature, AbstractKronecker):
        return min(1.0, 1024 / facts.examples) * 3, size * facts.factor_numbers + 8.0 * p
    if isinstance(curvature, Arnoldi):
        steps = curvature.steps or default_steps(p, curvature.rank)
        return 2.0 * steps, 1.0 * size * p * (steps + curvature.rank)
    if isinstance(curvature, Nystrom):
        return 2.0 * curvature.rank, 24.0 * p * curvature.rank
    if isinstance(curvature, Diagonal):
        rows = facts.outputs or 1 if isinstance(curvature.curvature, GGN) else 1
        return float(rows), 8.0 * p
    return None


def _name(curvature: AbstractCurvature) -> str:
    names = {"GGN": "Gauss-Newton matrix", "EmpiricalFisher": "empirical Fisher"}
    return names.get(type(curvature).__name__, type(curvature).__name__)

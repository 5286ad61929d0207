"""What a run will cost, before it is paid for."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import torch

from ..core.distributed import World, current
from ..core.notebook import Printable
from ..curvature.base import AbstractCurvature, Budget, Form
from ..curvature.cost import Amount, Cost, ProblemSize, timed_examples
from ..damping.rules import AbstractDamping
from ..gradients.per_example import Derivatives
from ..gradients.products import DIRECTIONS
from ..linalg.operator import AbstractSymmetric
from ..linalg.shift import Shift
from .base import AbstractSolver, Result
from .memory import batch_bytes, peak_bytes, piece_examples
from .preconditioner import Preconditioner

# Share of the memory budget that solved queries, with what the solver holds beside each, may take.
QUERY_SHARE = 1 / 4
# And what of the memory that the curvature leaves, if that is more: the rest is for the batches.
_LEFT_SHARE = 0.9
# The most numbers that the vectors of a timed product take.
_TIMED_NUMBERS = 1 << 24
# The first product pays for what is paid once.
_REPEATS = 2
# The most operations of forward passes that a solve on the timed batch may take: about a second of one core.
_TRIAL_OPERATIONS = 2e9
# What is done once (looks at the loss, at the weights and at reading, a check of every layer's rule) takes as long as
# so many batches of two examples; measured on small perceptrons.
_ONCE = 6
# Checking a score, adding it up and handing it over takes as long as so many operations of a matrix product, and so
# does writing a number of a gradient out and reading it back for its products with several queries.
_PER_SCORE, _PER_NUMBER = 1500.0, 100.0
# Products of gradients with queries come in pieces, which reach two thirds of the speed of one large product.
_PIECES = 1.5


@dataclass(frozen=True)
class Composition:
    """A curvature, a solver, the reason in words, what the solver is preconditioned with, and a damping."""

    curvature: AbstractCurvature
    solver: AbstractSolver[Any]
    why: str
    preconditioner: AbstractCurvature | None = None
    damping: AbstractDamping | None = None
    """The damping that belongs to the choice; None: the solver's default."""

    @property
    def default_damping(self) -> AbstractDamping:
        """The damping where none was asked for."""
        return self.solver.default_damping(self.curvature) if self.damping is None else self.damping

    def cost(self, size: ProblemSize) -> Cost:
        """Fitting, and solving for `size.n_queries` right-hand sides."""
        if self.preconditioner is None:
            return self.solver.cost(size, self.curvature)
        steps = self.solver.expected_steps(size, guided=True)
        return self.solver.cost(size, self.curvature, True) + Preconditioner.cost(self.preconditioner, size, steps)


@dataclass(frozen=True, repr=False)
class Forecast(Printable):
    """What a run will cost, before it is paid for.

    Args:
        method: the composition, as it would be written.
        why: why it was chosen.
        passes: forward and backward passes over the training data.
        memory_bytes: what is held beside the model: rows, factors, solved queries, scores.
        seconds: from one measured batch, and counted operations.
        batch_bytes: what the forward and backward pass of one wide batch holds besides, roughly: layer inputs and
            gradients, more than all else where the model's outputs are images.
    """

    method: str
    why: str
    passes: Amount
    memory_bytes: Amount
    seconds: float
    batch_bytes: Amount = 0.0

    def __str__(self) -> str:
        return (
            f"method   {self.method}\nwhy      {self.why}\n"
            f"passes   {self.passes:,.0f} forward+backward passes over the training data\n"
            f"memory   {self.memory_bytes / 2**20:,.0f} MiB beside the model, "
            f"and {self.batch_bytes / 2**20:,.0f} MiB for the passes of a batch\n"
            f"time     about {self.seconds:,.1f} s on this machine (measured on one batch)"
        )


def queries_at_once(
    solver: AbstractSolver[Any], numbers: float, number_bytes: int, budget: Budget, held: float = 0.0
) -> int:
    """How many queries are solved together, with what the solver holds beside each answer.

    Args:
        solver: solves them.
        numbers: of one answer.
        number_bytes: of each.
        budget: of the whole method.
        held: bytes that the fitted curvature takes of it; what is left is for the queries.
    """
    each = numbers * number_bytes * (1 + solver.vectors_held)
    # What an iterative solver holds is an estimate, which leaves room for error.
    left = _LEFT_SHARE * (budget.bytes - held) if solver.vectors_held == 0 else 0.0
    return max(1, int(max(budget.bytes * QUERY_SHARE, left) / each))


def estimate_cost(
    choice: Composition,
    size: ProblemSize,
    method: str,
    budget: Budget,
    damping: AbstractDamping | None = None,
    solves_per_example: Amount = 0,
    looked_at: int = 0,
    checkpoints: int = 1,
) -> Forecast:
    """Passes, memory and seconds of a choice: counted, with one batch and one product measured for the seconds.

    Args:
        choice: what will be run.
        size: the sizes of the problem, with how many queries are expected.
        method: the composition as it would be written.
        budget: what curvature and solved queries may take.
        damping: the damping in use; None: the choice's own.
        solves_per_example: right-hand sides that scaling asks for, for every training example.
        looked_at: examples whose gradients tell how the trained weights stand, whatever the method.
        checkpoints: how many are fitted and scored. As many stay fitted as the budget has room for; the others are
            fitted a second time for the scores, and one of them is held beside.
    """
    n, p, q = size.examples, size.parameters, size.n_queries
    share = (damping or choice.default_damping).expected_share
    size = replace(size, damping_share=share or size.damping_share)
    fitting = choice.cost(size.for_queries(q + solves_per_example * n))
    factored = choice.solver.solves_in_dual or choice.curvature.keeps_factors
    numbers = size.row_numbers if factored else p
    at_once = queries_at_once(choice.solver, numbers, size.number_bytes, budget, fitting.bytes)
    # More queries than that lie on disk, and share the pass.
    groups = 1 if q else 0
    # Training gradients that the curvature keeps are not taken again.
    kept = choice.curvature.holds_gradients and choice.solver.form(choice.curvature) is Form.GRAM
    again = 0 if kept and choice.solver.solves_in_dual and not solves_per_example else groups
    scoring = Cost((looked_at + q) / n + again, q * n * _PER_SCORE + again * _meeting_flops(size, factored))
    kept_fits = min(checkpoints, max(1, int(budget.bytes / max(1.0, float(fitting.bytes)))))
    again_fits = checkpoints - kept_fits
    held = (kept_fits + (1 if again_fits else 0)) * fitting.bytes
    basis = (choice.curvature.rows(size) or 0) if choice.solver.solves_in_dual and again else 0
    memory = peak_bytes(choice.solver, size, fitting, held, at_once, factored, basis)
    total = fitting.repeated(checkpoints + again_fits) + scoring.repeated(checkpoints)
    each = size.seconds if size.product_seconds is None else size.product_seconds
    reading = (total.passes - total.products) * n * size.seconds + total.products * n * each
    seconds = reading + total.flops / operations_per_second() + _ONCE * size.once_seconds
    return Forecast(method, choice.why, total.passes, memory, seconds, batch_bytes(size))


def _meeting_flops(size: ProblemSize, factored: bool) -> Amount:
    """Operations of the inner products of all training gradients with all queries."""
    q, n = size.n_queries, size.examples
    if factored:
        return q * n * size.pair_flops
    piece = piece_examples(size)
    meetings = [block.meeting(piece, q, size.number_bytes) for block in size.blocks.values()]
    return n / piece * sum(_PIECES * m.operations + _PER_NUMBER * m.written for m in meetings)


def time_product(
    choice: Composition, derivatives: Derivatives, size: ProblemSize, budget: Budget, damping: AbstractDamping
) -> ProblemSize:
    """The size with a measured product, where the choice takes products: on one batch of its own, in few directions.

    Where a solver stops by itself, its steps are counted too, by a solve on that batch.
    """
    curvature = choice.curvature.multiplied
    if curvature is None or not choice.cost(size).products:
        return size
    like = derivatives.space.like(derivatives.problem.model)
    count = timed_examples(derivatives.batched(derivatives.problem.data, times=DIRECTIONS))
    vectors = max(1, min(size.n_queries, DIRECTIONS, _TIMED_NUMBERS // size.parameters))
    source = derivatives.problem.data.subset(range(count))
    few = replace(derivatives, problem=derivatives.problem.with_(data=source))
    operator = curvature.of(few, Form.IMPLICIT, budget)
    generator = torch.Generator().manual_seed(0)
    flat = torch.randn(vectors, size.parameters, generator=generator).to(like)
    spent = math.inf
    for _ in range(_REPEATS):
        start = time.perf_counter()
        operator.apply(derivatives.space.rows(flat))
        spent = min(spent, current().largest(time.perf_counter() - start))
    part = replace(size, examples=count)
    size = replace(size, product_seconds=spent / count / curvature.product_cost(part, vectors).passes)
    if choice.preconditioner is not None:
        return size
    limit = int(_TRIAL_OPERATIONS / (vectors * count * size.operations))
    trial = choice.solver.limited_to(limit)
    return size if trial is None else replace(size, steps=_count_steps(trial, operator, few, damping, vectors))


def _count_steps(
    trial: AbstractSolver[Any],
    operator: AbstractSymmetric,
    derivatives: Derivatives,
    damping: AbstractDamping,
    vectors: int,
) -> float | None:
    """Products that a solve for `vectors` gradients takes; None where that cannot be told from so few examples."""
    if (share := damping.expected_share) is None:
        return None
    rows = next(derivatives.stream(ids=torch.arange(min(vectors, len(derivatives.problem))), world=World())).rows
    solution = trial.solve(trial.init(operator, Shift(share * operator.mean_eigenvalue())), rows)
    # Checking what claims to be done, and the residual that is handed back, take one each.
    return solution.steps + 2.0 if solution.result is Result.successful else None


def operations_per_second() -> float:
    """Floating-point operations per second of a float32 matrix product on this machine, measured once.

    Of processes that share the work it is the slowest's, so that all of them forecast alike.
    """
    return 1.0 / current().largest(1.0 / _own_operations_per_second())


@lru_cache(maxsize=1)
def _own_operations_per_second() -> float:
    a = torch.ones(384, 384)
    fastest = math.inf
    for _ in range(4):
        start = time.perf_counter()
        a @ a
        fastest = min(fastest, time.perf_counter() - start)
    return 2 * 384**3 / fastest

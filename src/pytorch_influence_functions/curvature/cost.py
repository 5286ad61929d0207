"""What work costs, counted before it is done: the sizes of a problem, and passes, operations and bytes.

A *pass* is one forward and one backward pass over all training data that gives a gradient row per example. The backward
pass goes to the layers' outputs only, so forward and backward weigh the same here. What is counted elsewhere (products,
decompositions) is given in the same units, so that one sum can be compared and turned into seconds.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from functools import cache, partial
from typing import NamedTuple, TypeAlias

import torch

from ..core.distributed import World, current
from ..core.errors import NotLikelihood
from ..gradients.per_example import Derivatives
from ..linalg.block_diagonal import subspace
from ..linalg.blocks import AbstractBlock, Conv, Indexed, Outer, Sum, matrix_shape
from ..linalg.chunks import CHUNK_NUMBERS, written_numbers
from ..linalg.rows import Route, outer_plans
from ..linalg.space import Space
from ..objectives.differentiated import output_curvature
from ..problem.data import Source
from ..problem.problem import first_batch
from .convexity import is_affine
from .own_losses import find_obstacle

# Operations are counted as those of a float32 matrix product. Measured on one core, for a matrix of side d: an
# eigendecomposition in float64 takes as long as 25 d^3 of them, in float32 11 d^3, a Cholesky factor 1.5 d^3, and a
# product in float64 2.3 times as long as one in float32.
EIGENDECOMPOSITION = 25.0
SINGLE_EIGENDECOMPOSITION = 11.0
FACTORISATION = 1.5
DOUBLE = 2.3
# A pass through a network takes so many times as long as its operations in one large product: where every weight is
# used once per example, and where weights are shared (measured on convolutions of 8 channels).
_PASS, _SHARED_PASS = 4, 20
# Measured on perceptrons of 3,610 to 50,890 parameters, by the steps that conjugate gradients took.
_TRACE_OVER_TOP = 20
# The most examples that are read for a forecast, where they are not in memory.
_MOST_READ = 256
# Examples that are counted on where nothing is timed.
_COUNTED = 32
# Repetitions of a short batch, of which the fastest is taken.
_REPEATS, _SHORT = 3, 0.05


Amount: TypeAlias = int | float


@dataclass(frozen=True)
class Cost:
    """What a piece of work takes, beside the model itself."""

    passes: Amount = 0.0
    """Forward and backward passes over the training data."""
    flops: Amount = 0.0
    """Operations of the algebra beside them, as those of a float32 matrix product."""
    bytes: Amount = 0.0
    """Memory held at the same time."""
    products: Amount = 0.0
    """How many of the passes are taken by products with a curvature, in batches and at a speed of their own."""
    passing: Amount = 0.0
    """Memory beside `bytes` that is held while this is done, and let go before anything else is."""

    def __add__(self, other: Cost) -> Cost:
        return Cost(
            self.passes + other.passes,
            self.flops + other.flops,
            self.bytes + other.bytes,
            self.products + other.products,
            max(self.passing, other.passing),
        )

    def repeated(self, times: Amount) -> Cost:
        """The same work several times, one after the other in the same memory."""
        return replace(self, passes=self.passes * times, flops=self.flops * times, products=self.products * times)

    def over_share(self, share: Amount) -> Cost:
        """The same work on a share of the training data only."""
        return replace(self, passes=self.passes * share, products=self.products * share)


def passes_for_rows(columns: Amount) -> float:
    """One forward pass, and one backward pass for each of `columns` rows per example."""
    return (1 + columns) / 2


class Meeting(NamedTuple):
    """What it takes that the gradients of some examples meet some vectors in one block of parameters."""

    operations: float
    written: float
    """Numbers that are written out and read back, one piece after the other."""
    held: float
    """Numbers of them that are held at once."""


@dataclass(frozen=True)
class BlockSize:
    """One block of parameters, and what one example's gradient of it is made of."""

    shape: tuple[int, ...]
    terms: int
    """How many outer products (or table entries) the gradient is a sum of."""
    numbers: Amount
    """Numbers held for one example in the cheapest exact form."""
    factored: bool
    """Whether it is held as outer products."""

    @staticmethod
    def of(block: AbstractBlock) -> BlockSize:
        """The size of a block of `n` rows, per row."""
        n, size = len(block), torch.Size(block.shape).numel()
        factored = isinstance(block, (Outer, Conv))
        return BlockSize(tuple(block.shape), terms_of(block), min(block.numbers / n, size), factored)

    @property
    def numel(self) -> int:
        """The number of parameters."""
        return int(torch.Size(self.shape).numel())

    @property
    def pair_flops(self) -> Amount:
        """Operations of the inner product of two examples' gradients: factor by factor, or written out."""
        return 2.0 * min(self.terms * self.numbers, self.numel)

    def meeting(self, n: int, m: int, number_bytes: int, factored: bool = False) -> Meeting:
        """What the inner products of `n` examples' gradients with `m` vectors take, by the route that is taken.

        Args:
            n: examples.
            m: vectors.
            number_bytes: of each number.
            factored: whether the vectors are gradients in the same form; else they are written out.
        """
        numel = self.numel
        if m == 1 or self.numbers == numel:
            return Meeting(2.0 * n * m * numel, 0.0, 0.0)
        if factored and not self.factored:  # tables meet entry by entry, a few at a time
            return Meeting(self.pair_flops * n * m, 0.0, 0.0)
        others = float(m * numel) if factored else 0.0
        if self.factored:
            o, i = matrix_shape(self.shape)
            terms = self.terms if factored else None
            plan = min(outer_plans(n, self.terms, o, i, m, terms, number_bytes), key=lambda p: p.cost("cpu"))
            if plan.route is Route.GHOST:
                return Meeting(2.0 * plan.macs, 0.0, 0.0)
            if plan.route is Route.APPLY:
                each = float(n * self.terms * o)
                return Meeting(2.0 * plan.macs, each * m + others, min(each * m, max(CHUNK_NUMBERS, each)) + others)
        held = min(n * numel, max(written_numbers(numel), numel))
        return Meeting(2.0 * n * m * numel, n * numel + others, held + others)


def terms_of(block: AbstractBlock) -> int:
    """How many terms an example's gradient is a sum of."""
    if isinstance(block, Sum):
        return max(terms_of(p) for p in block.parts)
    if isinstance(block, Indexed):
        return int(block.index.shape[1])
    return block.terms if isinstance(block, (Outer, Conv)) else 1


@dataclass(frozen=True)
class ProblemSize:
    """The sizes that a choice and a forecast depend on."""

    space: Space
    """Where gradient rows live: the parameters, or their projection."""
    examples: int
    outputs: int | None
    """Columns of H^(1/2) per example; None where the loss has no Gauss-Newton matrix."""
    n_queries: int
    blocks: Mapping[str, BlockSize]
    operations: Amount
    """Floating-point operations of one example's forward pass."""
    number_bytes: int = 4
    pass_numbers: Amount = 0.0
    """Numbers that one example's forward pass keeps for the backward pass, as far as layers are recorded."""
    seconds: float = 0.0
    """Measured seconds for one example's gradient row, reading included."""
    once_seconds: float = 0.0
    """Measured seconds for a batch of two examples: what a step costs that has hardly anything to compute."""
    product_seconds: float | None = None
    """Measured seconds for one example's part of a product, per pass that it counts for; None: as for a row."""
    steps: float | None = None
    """Products that an iterative solve takes, measured on one batch; None: not known."""
    obstacle: NotLikelihood | None = None
    """Why the loss has no Gauss-Newton matrix."""
    damping_share: Amount = 1.0
    """Damping in mean eigenvalues of the curvature, as far as it is known beforehand."""
    top: int | None = None
    """How many scores are kept of every query at either end; None: all."""
    asks_affine: Callable[[], bool] = lambda: True
    """Looks whether the outputs are affine in the parameters; it costs passes, so that only who needs to know asks."""

    @staticmethod
    def of(derivatives: Derivatives, n_queries: int, timed: bool = True) -> ProblemSize:
        """Count on one batch, and time a second one: the first pays for whatever is paid once.

        Args:
            derivatives: how gradients are taken.
            n_queries: how many queries are expected.
            timed: measure seconds too, on a batch of full size; a choice needs counts alone, of few examples.
        """
        problem = derivatives.problem
        obstacle = find_obstacle(derivatives)
        some = torch.arange(timed_examples(derivatives.batched(problem.data)))
        some = some if timed else some[:_COUNTED]
        rows = next(derivatives.stream(ids=some, label="counting", world=World())).rows
        # The pass goes through the parameters even where rows are projected.
        whole = derivatives if derivatives.projector is None else replace(derivatives, projector=None)
        one = rows if whole is derivatives else next(whole.stream(ids=some[:2], world=World())).rows
        return ProblemSize(
            space=derivatives.space,
            examples=len(problem),
            outputs=root_size(derivatives) if obstacle is None else None,
            obstacle=obstacle,
            n_queries=n_queries,
            blocks={name: BlockSize.of(block) for name, block in rows.blocks.items()},
            operations=sum(2.0 * terms_of(b) * torch.Size(b.shape).numel() for b in one.blocks.values()),
            number_bytes=next(iter(rows.blocks.values())).reference.element_size(),
            pass_numbers=one.numbers / len(one),
            seconds=_seconds_each(derivatives, some) if timed else 0.0,
            once_seconds=_seconds_each(derivatives, some[:2]) * len(some[:2]) if timed else 0.0,
            asks_affine=cache(partial(is_affine, problem)),
        )

    @property
    def affine(self) -> bool:
        """Whether the outputs are affine in the parameters: their Gauss-Newton matrix is the Hessian everywhere."""
        return self.asks_affine()

    @property
    def parameters(self) -> int:
        """P."""
        return self.space.size

    @property
    def row_numbers(self) -> Amount:
        """Numbers held for one example's gradient row in its cheapest exact form."""
        return sum(block.numbers for block in self.blocks.values())

    @property
    def row_bytes(self) -> Amount:
        """Bytes of one example's gradient row in its cheapest exact form."""
        return self.row_numbers * self.number_bytes

    @property
    def pair_flops(self) -> Amount:
        """Operations of the inner product of two examples' gradients."""
        return sum(block.pair_flops for block in self.blocks.values())

    @property
    def top_eigenvalue(self) -> float:
        """The largest eigenvalue over the damping, as it is in networks of the size: a twentieth of the trace."""
        return self.parameters / (_TRACE_OVER_TOP * self.damping_share)

    @property
    def columns(self) -> int:
        """Rows per example of the Gauss-Newton matrix; 1 where the objective has none."""
        return self.outputs or 1

    @property
    def used_once(self) -> bool:
        """Whether every weight is used once per example."""
        return all(block.terms == 1 for block in self.blocks.values())

    def flops(self, cost: Cost) -> Amount:
        """All of a cost in operations: a pass is a forward pass and as much again backward, slower than one product."""
        slower = _PASS if self.used_once else _SHARED_PASS
        return cost.flops + cost.passes * self.examples * 2 * self.operations * slower

    def for_queries(self, count: Amount) -> ProblemSize:
        """The size of the same problem with another number of queries."""
        return replace(self, n_queries=math.ceil(count))

    def over(self, names: Iterable[str]) -> ProblemSize:
        """The size of the same problem with only some blocks of parameters."""
        wanted = list(names)
        return replace(self, space=subspace(self.space, wanted), blocks={k: self.blocks[k] for k in wanted})


def root_size(derivatives: Derivatives) -> int:
    """Columns of H^(1/2) per example, from the outputs of two: `.squeeze()` takes the axis of one alone away."""
    objective, problem = derivatives.objective, derivatives.problem
    with first_batch(problem, ids=torch.arange(min(2, len(problem)))) as (_, batch), torch.no_grad():
        return output_curvature(objective).root_size(objective.outputs(problem.model, batch))


def timed_examples(source: Source) -> int:
    """How many examples of `source` are timed: one of its batches, or a part of it where each has to be read."""
    return source.batch_size if source.in_memory else min(source.batch_size, _MOST_READ)


def _seconds_each(derivatives: Derivatives, some: torch.Tensor) -> float:
    """Seconds per example of a batch that is not the first."""
    fastest = float("inf")
    for _ in range(_REPEATS):
        start, done = time.perf_counter(), 0
        for batch in derivatives.stream(ids=some, label="timing", world=World()):
            done += len(batch.ids)
        # Of the slowest process: all have to go on, and to choose, alike.
        spent = current().largest(time.perf_counter() - start)
        fastest = min(fastest, spent / done)
        if spent > _SHORT:
            break
    return fastest

"""Curvature that is made of rows: C = G^T G / count, dense, kept as rows, or by products with rows made anew."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..core.distributed import World, alone, current
from ..core.indexing import spread_sample
from ..gradients.per_example import Derivatives
from ..linalg.blocks import cat, matrix_shape
from ..linalg.dense import Matrix
from ..linalg.gram import Gram
from ..linalg.implicit import Implicit
from ..linalg.operator import AbstractSymmetric, dense_bytes
from ..linalg.rows import Rows
from ..linalg.rows_together import everyones_rows
from ..problem.data import Source
from ..problem.problem import sweep
from .base import TRACE_EXAMPLES, AbstractCurvature, Budget, Form
from .cost import DOUBLE, Amount, Cost, ProblemSize, passes_for_rows
from .second_moment import SecondMoment, piece_bytes


class AbstractRowCurvature(AbstractCurvature):
    """C = G^T G / count, with the rows G of every batch at hand.

    A new one says how many rows an example has (`columns`), over how many of them C is a mean (`averaged`), and makes
    those of a batch (`rows_of`); all three forms follow.
    """

    forms: ClassVar[tuple[Form, ...]] = (Form.MATRIX, Form.GRAM, Form.IMPLICIT)
    label: ClassVar[str] = "curvature rows"

    @abstractmethod
    def columns(self, size: ProblemSize) -> int:
        """Rows per example of a problem of this `size`."""

    @property
    @abstractmethod
    def averaged(self) -> int:
        """How many of an example's rows stand for the same thing: C is their mean, and the sum over the others."""

    @abstractmethod
    def rows_of(self, derivatives: Derivatives, ids: Tensor, batch: Any) -> Iterator[Rows]:
        """The rows of one batch, column by column, each with a row per example.

        Args:
            derivatives: how gradients are taken.
            ids: dataset indices of the batch.
            batch: what the collate function gave for them.
        """

    def count(self, examples: int) -> int:
        """What G^T G is divided by."""
        return examples * self.averaged

    def batches(self, derivatives: Derivatives) -> Iterator[Iterator[Rows]]:
        """The rows of every batch of this process's share, in dataset order, gradients taken as `derivatives` say."""
        source = self.source(derivatives)
        for ids, batch in sweep(derivatives.problem, source, label=self.label):
            yield self.rows_of(derivatives, ids, batch)

    def source(self, derivatives: Derivatives) -> Source:
        """The training data of `derivatives` in batches that suit the size of a row: small ones are mostly overhead."""
        return derivatives.batched(derivatives.problem.data)

    def stream(self, derivatives: Derivatives) -> Iterator[Rows]:
        """All rows, one batch and column after the other."""
        for batch in self.batches(derivatives):
            yield from batch

    def of(self, derivatives: Derivatives, form: Form, budget: Budget) -> AbstractSymmetric:
        self.require(form)
        self.check_objective(derivatives)
        if form is Form.IMPLICIT:
            return self.implicit(derivatives)
        return self.dense(derivatives, budget) if form is Form.MATRIX else self.stored(derivatives, budget)

    def check_objective(self, derivatives: Derivatives) -> None:
        """Refuse `derivatives` whose objective does not know enough for this curvature."""
        return

    def dense(self, derivatives: Derivatives, budget: Budget) -> Matrix:
        """The matrix, added up batch by batch.

        Args:
            derivatives: how gradients are taken.
            budget: what the matrix and its decomposition may take.
        """
        space = derivatives.space
        check_dense(space.size, budget)
        total = SecondMoment(space, derivatives.problem.device)
        for batch in self.batches(derivatives):
            total.add(batch)
        matrix = current().sum_into(total.matrix())
        most = float(current().all_sum(torch.tensor(total.directions)))
        return Matrix(space, matrix.div_(self.count(len(derivatives.problem))), most)

    def stored(self, derivatives: Derivatives, budget: Budget) -> Gram:
        """All rows, kept.

        Args:
            derivatives: how gradients are taken.
            budget: what the rows may take.
        """
        kept: list[Rows] = []
        kept_bytes, looked_at, n = 0.0, 0, len(derivatives.problem)
        if n < current().size:
            with alone(apart=False):  # all of them do all of it
                return self.stored(derivatives, budget)
        for batch in self.batches(derivatives):
            so_far = looked_at
            for column in batch:
                kept.append(column.compact())
                kept_bytes += kept[-1].numbers * kept[-1].dtype.itemsize
                looked_at = so_far + len(column)
                # What the first batch takes tells what the rest will.
                expected = kept_bytes / looked_at * n
                budget.check(expected, "Keeping the gradient rows", "use CG() or EKFAC(), or name fewer parameters")
        return Gram(derivatives.space, everyones_rows(_joined(kept)), self.count(n), current().size)

    def implicit(self, derivatives: Derivatives) -> Implicit:
        """C x = mean of g <g, x> over rows that `derivatives` make anew at every product."""
        product, means = partial(self._product, derivatives), partial(self.block_means, derivatives)
        return Implicit(derivatives.space, product, means, len(derivatives.problem))

    def _product(self, derivatives: Derivatives, x: Rows, ids: Tensor | None = None) -> Rows:
        problem, total = derivatives.problem, x.flat().new_zeros(len(x), derivatives.space.size)
        world = current() if ids is None else World()
        for batch_ids, batch in sweep(problem, ids=ids, label="curvature products", world=world):
            for g in self.rows_of(derivatives, batch_ids, batch):
                total += g.combine(g.inner(x).T).flat()
        count = self.count(len(problem) if ids is None else len(ids))
        return derivatives.space.rows(world.sum_into(total) / count)

    def block_means(self, derivatives: Derivatives) -> dict[str, float]:
        """trace(C_bb) / P_b of every block b, on some of the examples of `derivatives`."""
        some = spread_sample(len(derivatives.problem), TRACE_EXAMPLES)
        batches = sweep(derivatives.problem, ids=some, label="trace", world=World())
        rows = (g for ids, batch in batches for g in self.rows_of(derivatives, ids, batch))
        return mean_eigenvalues(derivatives, rows, self.count(len(some)))

    # ---------------------------------------------------------------- what it costs

    def projectable(self, form: Form) -> bool:
        return form in (Form.MATRIX, Form.GRAM)

    def rows(self, size: ProblemSize) -> int:
        return size.examples * self.columns(size)

    def cost(self, size: ProblemSize, form: Form) -> Cost:
        columns, n, p = self.columns(size), size.examples, size.parameters
        passes = passes_for_rows(columns)
        if form is Form.MATRIX:
            products: float = columns
            if size.used_once:
                # One product for all columns, and of a layer with itself a triangle of its outputs' pairs.
                sides = [matrix_shape(block.shape)[0] for block in size.blocks.values()]
                products = (1 + 1 / sides[0]) / 2 if len(sides) == 1 else 1
            held = max(dense_bytes(p), 2 * 8 * p**2 + piece_bytes(p))
            return Cost(passes, DOUBLE * 2 * n * products * p**2, held)
        if form is Form.GRAM:
            return Cost(passes, bytes=n * columns * size.row_bytes)
        return self.trace_cost(size)

    def product_cost(self, size: ProblemSize, vectors: Amount) -> Cost:
        columns = self.columns(size)
        passes = passes_for_rows(columns)
        return Cost(passes, 4 * vectors * size.examples * columns * size.row_numbers, products=passes)

    def trace_cost(self, size: ProblemSize) -> Cost:
        return Cost(passes_for_rows(self.columns(size)) * min(1.0, TRACE_EXAMPLES / size.examples))


def _joined(kept: list[Rows]) -> Rows:
    """Rows of several batches, one after the other; `kept` is used up, so that only one block is held twice."""
    parts = [dict(rows.blocks) for rows in kept]
    kept.clear()
    return Rows({name: cat([part.pop(name) for part in parts]) for name in list(parts[0])})


def check_dense(size: int, budget: Budget) -> None:
    """Refuse a dense matrix, with what decomposing it takes, that is above the budget.

    Raises:
        TooLarge: it is.
    """
    budget.check(dense_bytes(size), f"A dense matrix over {size:,} parameters", "use CG() or Woodbury()")


def mean_eigenvalues(derivatives: Derivatives, rows: Iterator[Rows], count: int) -> dict[str, float]:
    """Mean eigenvalue per block of sum g g^T / count."""
    traces = dict.fromkeys(derivatives.space.blocks, 0.0)
    for r in rows:
        for name, block in r.blocks.items():
            traces[name] += float(block.squared_norms().double().sum())
    return {k: trace / count / derivatives.space.numel(k) for k, trace in traces.items()}

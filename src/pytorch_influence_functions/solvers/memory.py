"""What a run holds at its peak: while the curvature is fitted, queries are solved, and the training data pass by."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ..curvature.cost import Amount, BlockSize, Cost, ProblemSize
from ..gradients.per_example import MOST_TOGETHER
from ..linalg.blocks import matrix_shape
from ..linalg.chunks import CHUNK_NUMBERS, SCORE_NUMBERS, SCORE_ROWS, gathered_columns, written_numbers
from ..linalg.rows import Route, outer_plans
from ..problem.data import suited_size
from .base import AbstractSolver

# What a pass holds beside an example's row: where every weight is used once per example the layers' inputs and the
# gradients at their outputs a second time, where weights are shared the graph, and what is unfolded and multiplied.
# Measured on perceptrons, and on U-Nets of 64² to 256² pixels.
_PASS_COPIES, _SHARED_PASS_COPIES = 2.5, 6
# Scores are added up in float64, and handed over in float32.
_SCORE_BYTES, _RESULT_BYTES = 8, 4
# Products of one batch of training examples, their sum, and the scores made of the batch before.
_SCORE_COPIES = 3
# Of what is let go while it is needed again in other sizes, the allocator keeps so much.
_KEPT_FREE = 1.25
# Of every query k scores and indices at the upper end, twice as many at the lower, and once more while they are merged.
_EXTREME_BYTES = 2 * 3 * (8 + 8)


@dataclass(frozen=True)
class Meeting:
    """How the gradients of `n` examples meet `m` vectors in one block of parameters, by the route that is taken."""

    operations: float
    written: float
    """Numbers that are written out and read back, of all examples."""
    held: float
    """Numbers of them that are held at once."""

    @staticmethod
    def of(block: BlockSize, n: int, m: int, number_bytes: int) -> Meeting:
        """Count for vectors that are written out; the route is that of `choose_route`.

        Args:
            block: of parameters.
            n: training examples that meet the vectors together.
            m: vectors.
            number_bytes: of each number.
        """
        numel = block.numel
        plain = 2.0 * n * m * numel
        if m == 1 or block.numbers == numel:
            return Meeting(plain, 0.0, 0.0)
        if block.factored:
            o, i = matrix_shape(block.shape)
            plan = min(outer_plans(n, block.terms, o, i, m, None, number_bytes), key=lambda p: p.cost("cpu"))
            if plan.route is Route.APPLY:
                each = float(n * block.terms * o)
                return Meeting(2.0 * plan.macs, each * m, min(each * m, max(float(CHUNK_NUMBERS), each)))
        return Meeting(plain, float(n * numel), float(min(n * numel, max(written_numbers(numel), numel))))


def batch_examples(size: ProblemSize) -> int:
    """Training examples whose gradients are taken together."""
    return min(size.examples, MOST_TOGETHER, suited_size(size.pass_numbers))


def batch_bytes(size: ProblemSize) -> Amount:
    """What the forward and backward pass of one wide batch holds, with the rows that it gives."""
    copies = _PASS_COPIES if size.used_once else _SHARED_PASS_COPIES
    return _KEPT_FREE * copies * batch_examples(size) * size.pass_numbers * size.number_bytes


def piece_examples(size: ProblemSize) -> int:
    """Training examples of a batch whose scores are computed together."""
    return min(batch_examples(size), max(SCORE_ROWS, SCORE_NUMBERS // max(1, size.n_queries)))


def peak_bytes(solver: AbstractSolver[Any], size: ProblemSize, fitting: Cost, held: Amount, at_once: int) -> Amount:
    """What is held at most, but for the pass of a batch.

    Args:
        solver: solves for the queries.
        size: of the problem, with what is asked.
        fitting: what fitting one checkpoint takes.
        held: what stays of it, of all checkpoints.
        at_once: queries that are solved together.
    """
    group = min(size.n_queries, at_once)
    own = group * size.row_bytes
    vectors = 0.0 if solver.solves_in_dual else float(group * size.parameters * size.number_bytes)
    solving = own + (1 + solver.vectors_held) * vectors
    streaming = (own if solver.solves_in_dual else vectors) + _kept_bytes(size) + _products_bytes(size, vectors > 0)
    return held + max(_KEPT_FREE * fitting.passing, solving, streaming, _result_bytes(size))


def _kept_bytes(size: ProblemSize) -> Amount:
    """The scores as they come in: all of them, or the extremes and the columns that are gathered for them."""
    if size.top is None:
        return _SCORE_BYTES * size.n_queries * size.examples
    columns, piece = gathered_columns(size.top), piece_examples(size)
    waiting = columns if piece < min(columns, size.examples) else 0
    return size.n_queries * (size.number_bytes * waiting + _EXTREME_BYTES * min(size.top, size.examples))


def _products_bytes(size: ProblemSize, written_out: bool) -> Amount:
    """The scores of a piece of a batch as they are made, and what their products take."""
    piece, q = piece_examples(size), size.n_queries
    meetings = [Meeting.of(b, piece, q, size.number_bytes) for b in size.blocks.values()] if written_out else []
    numbers = _SCORE_COPIES * q * piece + max((m.held for m in meetings), default=0.0)
    return _KEPT_FREE * size.number_bytes * numbers


def _result_bytes(size: ProblemSize) -> Amount:
    """All scores in both precisions, at the end."""
    if size.top is not None:
        return 0.0
    return (_SCORE_BYTES + (_RESULT_BYTES if size.number_bytes < _SCORE_BYTES else 0)) * size.n_queries * size.examples

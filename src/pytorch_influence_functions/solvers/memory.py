"""What a run holds at its peak: while the curvature is fitted, queries are solved, and the training data pass by."""

from __future__ import annotations

from typing import Any

from ..curvature.cost import Amount, Cost, ProblemSize
from ..gradients.per_example import MOST_TOGETHER
from ..gradients.products import DIRECTIONS
from ..linalg.chunks import SCORE_NUMBERS, SCORE_ROWS, gathered_columns
from ..problem.data import suited_size
from .base import AbstractSolver

# What a pass holds beside an example's row: where every weight is used once per example the layers' inputs and the
# gradients at their outputs a second time, where weights are shared what layers without weights keep too. Measured on
# perceptrons, convolutions and transformers.
_PASS_COPIES, _SHARED_PASS_COPIES = 2.5, 4
# Scores are added up in float64, and handed over in float32.
_SCORE_BYTES, _RESULT_BYTES = 8, 4
# Products of one batch of training examples, their sum, and the scores made of the batch before.
_SCORE_COPIES = 3
# Of what is let go while it is needed again in other sizes, the allocator keeps so much.
_KEPT_FREE = 1.25
# Products with rows of the curvature, in float32 those of a layer and their sum, and in float64.
_BASIS_BYTES = 2 * 4 + 8
# Of every query k scores and indices at the upper end, twice as many at the lower, and once more while they are merged.
_EXTREME_BYTES = 2 * 3 * (8 + 8)


def batch_examples(size: ProblemSize) -> int:
    """Training examples whose gradients are taken together."""
    return min(size.examples, MOST_TOGETHER, suited_size(size.pass_numbers))


def batch_bytes(size: ProblemSize) -> Amount:
    """What the forward and backward pass of one wide batch holds, with the rows that it gives."""
    copies = _PASS_COPIES if size.used_once else _SHARED_PASS_COPIES
    return _KEPT_FREE * copies * batch_examples(size) * size.pass_numbers * size.number_bytes


def piece_examples(size: ProblemSize, basis: Amount = 0) -> int:
    """Training examples of a batch whose scores are computed together.

    Args:
        size: of the problem.
        basis: rows of the curvature that they meet too.
    """
    return min(batch_examples(size), max(SCORE_ROWS, int(SCORE_NUMBERS // max(1, size.n_queries + basis))))


def peak_bytes(
    solver: AbstractSolver[Any],
    size: ProblemSize,
    fitting: Cost,
    held: Amount,
    at_once: int,
    factored: bool,
    basis: Amount,
) -> Amount:
    """What is held at most, but for the pass of a batch.

    Args:
        solver: solves for the queries.
        size: of the problem, with what is asked.
        fitting: what fitting one checkpoint takes.
        held: what stays of it, of all checkpoints.
        at_once: queries that are solved together.
        factored: whether solutions stay in the form of gradients.
        basis: rows of the curvature that training gradients meet for scores.
    """
    group = min(size.n_queries, at_once)
    own = group * size.row_bytes
    vectors = 0.0 if factored else float(group * size.parameters * size.number_bytes)
    solving = own + (1 + solver.vectors_held) * vectors + (_KEPT_FREE * _product_bytes(size) if fitting.products else 0)
    streaming = (own if factored else vectors) + _kept_bytes(size) + _scoring_bytes(size, factored, basis)
    return held + max(_KEPT_FREE * fitting.passing, solving, streaming, _result_bytes(size))


def _product_bytes(size: ProblemSize) -> Amount:
    """What a product with the curvature holds, which goes through the model in several directions at once."""
    directions = min(size.n_queries, DIRECTIONS)
    together = min(size.examples, MOST_TOGETHER, suited_size(size.pass_numbers * DIRECTIONS))
    return directions * together * size.pass_numbers * size.number_bytes


def _kept_bytes(size: ProblemSize) -> Amount:
    """The scores as they come in: all of them, or the extremes and the columns that are gathered for them."""
    if size.top is None:
        return _SCORE_BYTES * size.n_queries * size.examples
    columns, piece = gathered_columns(size.top), piece_examples(size)
    waiting = columns if piece < min(columns, size.examples) else 0
    return size.n_queries * (size.number_bytes * waiting + _EXTREME_BYTES * min(size.top, size.examples))


def _scoring_bytes(size: ProblemSize, factored: bool, basis: Amount) -> Amount:
    """The scores of a piece of a batch as they are made, and what their products take."""
    piece, q = piece_examples(size, basis), size.n_queries
    meetings = [] if factored else [b.meeting(piece, q, size.number_bytes) for b in size.blocks.values()]
    numbers = _SCORE_COPIES * q * piece + max((m.held for m in meetings), default=0.0)
    return _KEPT_FREE * (size.number_bytes * numbers + _BASIS_BYTES * basis * piece)


def _result_bytes(size: ProblemSize) -> Amount:
    """All scores in both precisions, at the end."""
    if size.top is not None:
        return 0.0
    return (_SCORE_BYTES + (_RESULT_BYTES if size.number_bytes < _SCORE_BYTES else 0)) * size.n_queries * size.examples

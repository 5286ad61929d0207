"""What a Kronecker fit is to measure: on which examples, and what it holds for that."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from os import PathLike
from typing import Any

import torch
from torch import Tensor

from ...core.indexing import spread_sample
from ...gradients.per_example import MOST_TOGETHER
from ...linalg.blocks import matrix_shape
from ...linalg.chunks import CHUNK_NUMBERS
from ...problem.data import suited_size
from ..base import Budget
from ..cost import BlockSize
from ..exact import ENUMERATED_OUTPUTS
from ..fisher import AbstractFisher
from .moments import IN_TURN, Moments, Sharing

# Share of the memory budget that rows kept for a second look may take.
KEPT_SHARE = 1 / 16
# A side of length d is measured on at least this many gradients times d.
_TERMS_PER_SIDE = 2
# At least so many examples for the basis and for the eigenvalues in it: where every example is one term, and where it
# is the sum of many. Linear datamodelling score of a perceptron (one term) with 2,000, 512, 256 and 128 examples for
# the eigenvalues: .44, .44, .43, .41.
_ALONE, _SHARED = (256, 512), (128, 256)


@dataclass(frozen=True)
class Plan:
    """What is measured, on what, and where it is kept: the settings of one fit."""

    moments: Moments
    sharing: Sharing
    corrected: bool
    fisher: AbstractFisher | None
    examples: int | None
    largest: int
    folder: str | PathLike[str] | None

    @property
    def settings(self) -> dict[str, Any]:
        """The settings that change the numbers: all but where they are kept."""
        return {f.name: getattr(self, f.name) for f in fields(self) if f.name != "folder"}


def needed_examples(plan: Plan, blocks: Mapping[str, BlockSize]) -> tuple[dict[str, int], dict[str, int]]:
    """On how many examples the basis of every block is measured, and on how many the eigenvalues in it."""
    if plan.examples is not None:
        return dict.fromkeys(blocks, plan.examples), dict.fromkeys(blocks, plan.examples)
    alone = all(block.terms == 1 for block in blocks.values())
    fewest, measured = _ALONE if alone else _SHARED
    basis = dict.fromkeys(blocks, fewest)
    for name, block in blocks.items():
        # Scales and biases alone are few: their block may be of low rank, and damping fills it up.
        if block.factored:
            side = max((d for d in matrix_shape(block.shape) if d <= plan.largest), default=0)
            basis[name] = max(fewest, _TERMS_PER_SIDE * side // block.terms)
    if alone or not plan.corrected:
        # Where every example is one term, reading more of them costs little; and products are of whole factors.
        basis = dict.fromkeys(blocks, max(basis.values()))
    values = {name: max(count, measured) for name, count in basis.items()}
    return (basis if plan.corrected else values), values


def nested_samples(n: int, counts: Mapping[str, int]) -> dict[str, Tensor]:
    """So many of n examples for every name, spread over all; those of a name that needs fewer are among the others'.

    >>> {name: sample.tolist() for name, sample in nested_samples(9, {"a": 3, "b": 6, "c": 20}).items()}
    {'a': [2, 5, 6], 'b': [0, 2, 3, 5, 6, 8], 'c': [0, 1, 2, 3, 4, 5, 6, 7, 8]}
    """
    sample, of_count = torch.arange(n), {}
    for count in sorted({min(count, n) for count in counts.values()}, reverse=True):
        sample = of_count[count] = sample[spread_sample(len(sample), count)]
    return {name: of_count[min(count, n)] for name, count in counts.items()}


def stretches(samples: Mapping[str, Tensor], names: Sequence[str]) -> Iterator[tuple[tuple[str, ...], Tensor]]:
    """The examples of nested samples, each once, and the names whose samples they belong to.

    >>> pair = stretches(nested_samples(9, {"a": 3, "b": 6}), ("a", "b"))
    >>> [(names, ids.tolist()) for names, ids in pair]
    [(('a', 'b'), [2, 5, 6]), (('b',), [0, 3, 8])]
    """
    done = torch.arange(0)
    for count in sorted({len(samples[name]) for name in names}):
        wanting = tuple(name for name in names if len(samples[name]) >= count)
        sample = next(samples[name] for name in wanting if len(samples[name]) == count)
        yield wanting, sample[~torch.isin(sample, done)]
        done = sample


def columns_by_default(columns: int, blocks: Sequence[BlockSize]) -> int | None:
    """How many columns are enumerated where nothing was asked for; None where a label is drawn instead."""
    return columns if columns <= ENUMERATED_OUTPUTS and all(block.terms == 1 for block in blocks) else None


def numbers_of(shape: tuple[int, ...], plan: Plan) -> int:
    """What a finished block holds: two bases and eigenvalues, which are float64 where they are products."""
    o, i = matrix_shape(shape)
    return sum(d * d for d in (o, i) if d <= plan.largest) + (1 if plan.corrected else 2) * o * i


def passing_bytes(plan: Plan, blocks: Mapping[str, BlockSize], n: int, columns: int, number_bytes: int) -> float:
    """What a fit on `n` examples holds beside its factors, and lets go: rows for the second look, or of one batch, the
    space of the largest decomposition, and what is written out of rows that are no single outer product.

    Args:
        plan: what is measured.
        blocks: of parameters.
        n: training examples.
        columns: rows per example.
        number_bytes: of each number.
    """
    basis, values = (min(n, max(counts.values())) for counts in needed_examples(plan, blocks))
    each = sum(_held_each(block, columns) for block in blocks.values())
    rows, most = each * basis, KEPT_SHARE * Budget().bytes / number_bytes
    together = min(max(basis, values), MOST_TOGETHER, suited_size(each))
    if not plan.corrected or basis != values or rows > most:
        rows = each * together
    workspace = max((workspace_of(block.shape, plan.largest) for block in blocks.values()), default=0)
    # Squares of single outer products, and on a CPU of large blocks, are taken without writing the gradients out.
    shared = [block for block in blocks.values() if not block.factored or (block.terms > 1 and block.numel < IN_TURN)]
    written = max((min(CHUNK_NUMBERS, together * block.numel) for block in shared), default=0)
    return float(number_bytes) * (rows + max(workspace, written))


def _held_each(block: BlockSize, columns: int) -> float:
    """Numbers that the columns of one example hold in one block, when their input is kept once."""
    if not block.factored:
        return float(block.numbers * columns)
    return float(block.numbers + (columns - 1) * block.terms * matrix_shape(block.shape)[0])


def check_layers(shapes: Mapping[str, tuple[int, ...]], plan: Plan, number_bytes: int, budget: Budget) -> None:
    """Refuse a layer whose factors alone, with what their decomposition takes, are above the budget.

    Raises:
        TooLarge: there is one; it is named.
    """
    sizes = {k: (numbers_of(s, plan) + workspace_of(s, plan.largest)) * number_bytes for k, s in shapes.items()}
    if sizes:
        worst = max(sizes, key=lambda k: sizes[k])
        budget.check(
            sizes[worst], f"The Kronecker factors of one layer, {worst!r},", "lower `largest`, or leave the layer out"
        )


def workspace_of(shape: tuple[int, ...], largest: int) -> int:
    """What decomposing takes beside it: the longer side three times in its own type, and LAPACK's three."""
    return 6 * max((d * d for d in matrix_shape(shape) if d <= largest), default=0)

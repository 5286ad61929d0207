"""Scores of several checkpoints as one matrix, and in which units they are added up."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from jaxtyping import Float, Int
from torch import Tensor

from ..core.distributed import World, current
from ..curvature.base import Budget
from .agreement import CheckpointAgreement, Units
from .question import Question
from .scoring import QUERY_SHARE, refuse_nonfinite

# Matrices of scores that are held at once: the sum, the present checkpoint, and one on its way.
_MATRICES = 3


@dataclass(eq=False)
class CheckpointAverage:
    r"""The average of the scores [Q, N] of several checkpoints, which come one after the other.

    With s_c the row of a query at checkpoint c, sigma_c its standard deviation over the N training examples, and G the
    geometric mean of all sigma_c (the last one for `Units.FINAL`), the average is G * mean_c(s_c / sigma_c). For
    `Units.RAW` it is sum_c weight_c s_c. A checkpoint at which all scores of a query are equal ranks nothing and is
    left out of that query's average.

    Two matrices are held, however many checkpoints there are. Under `distributed()` every process holds the columns of
    its own share of the training examples, and adds what it scored of them.

    Args:
        units: in which units the rows are added up.
        weights: one number per checkpoint, for `Units.RAW`.
        n_queries: Q.
        n_train: N.
        world: over whom the columns are shared out; `None`: as `distributed()` says.
    """

    units: Units
    weights: tuple[float, ...]
    n_queries: int
    n_train: int
    world: World | None = None
    spreads: list[Float[Tensor, " q"]] = field(default_factory=list)
    """sigma_c of every query, for each checkpoint that is done; empty for `Units.RAW`."""
    _total: Tensor = field(init=False)
    _scores: Tensor = field(init=False)
    _done: int = 0
    _eps: float = torch.finfo(torch.float64).eps

    def __post_init__(self) -> None:
        self._total = torch.zeros(self.n_queries, len(self.columns), dtype=torch.float64)
        self._scores = self._total if self.units is Units.RAW else torch.zeros_like(self._total)

    def add(self, rows: Int[Tensor, " q"], ids: Int[Tensor, " n"], values: Float[Tensor, "q n"]) -> None:
        """Add a block of the present checkpoint's scores: rows of the matrix, on training examples `ids` of `columns`.

        Raises:
            NonFinite: a score is NaN or infinite.
        """
        refuse_nonfinite(values, rows, ids)
        self._eps = max(self._eps, float(torch.finfo(values.dtype).eps))
        weight = self.weights[self._done] if self.units is Units.RAW else 1.0
        scores = values.double().cpu()
        self._scores[rows[:, None], ids[None] - self._first] += scores if weight == 1.0 else scores * weight

    def end_checkpoint(self) -> None:
        """All blocks of the present checkpoint are there: the next one begins."""
        self._done += 1
        if self.units is Units.RAW:
            return
        self.spreads.append(spread_of(self._scores, self._eps, self._world))
        self._total += self._scores * reciprocal(self.spreads[-1])[:, None]
        self._scores.zero_()

    @property
    def _world(self) -> World:
        return current() if self.world is None else self.world

    @property
    def columns(self) -> range:
        """The training examples whose scores this process holds: all of them, or its share."""
        return range(self.n_train)[self._world.share(self.n_train)]

    @property
    def _first(self) -> int:
        return self.columns.start

    def result(self) -> Float[Tensor, "q n"]:
        """The average over the checkpoints that are done, for the examples in `columns`."""
        if self.units is Units.RAW:
            return self._total
        return self._total * self._factor()[:, None]

    def factors(self) -> Iterator[Float[Tensor, " q"]]:
        """For every checkpoint what each query's scores are multiplied by before they are added up."""
        for c in range(self._done):
            if self.units is Units.RAW:
                yield torch.full((self.n_queries,), self.weights[c], dtype=torch.float64)
            else:
                yield self._factor() * reciprocal(self.spreads[c])

    def _factor(self) -> Tensor:
        """The unit G of every query over the number of checkpoints that rank anything."""
        count = (torch.stack(self.spreads) > 0).sum(0).clamp(min=1)
        return self._unit() / count

    def _unit(self) -> Tensor:
        spreads = torch.stack(self.spreads)
        if self.units is Units.FINAL:
            return spreads[-1]
        count = (spreads > 0).sum(0)
        logarithms = torch.where(spreads > 0, spreads, torch.ones_like(spreads)).log().sum(0)
        return torch.where(count > 0, (logarithms / count.clamp(min=1)).exp(), torch.zeros_like(logarithms))

    def agreement(self) -> CheckpointAgreement:
        """How alike the checkpoints were, query by query."""
        if self.units is Units.RAW or self._done < 2:
            return CheckpointAgreement()
        spreads = torch.stack(self.spreads)
        usable = (spreads > 0).all(0)
        spreads, total = spreads[:, usable], self._total[usable]
        if not len(total):
            return CheckpointAgreement()
        # Each s_c / sigma_c has variance 1, so that the variance of their mean tells their mean correlation.
        variance = _moments(total, self._world)[1] / self._done**2
        correlation = (self._done * variance - 1) / (self._done - 1)
        ranges = spreads.max(0).values / spreads.min(0).values
        return CheckpointAgreement(correlation.tolist(), ranges.tolist(), variance.sqrt().tolist())


def spread_of(scores: Float[Tensor, "q n"], eps: float, world: World | None = None) -> Float[Tensor, " q"]:
    """The standard deviation of every row; 0 where the row is constant up to rounding.

    Args:
        scores: one row per query; under `world` the columns that this process holds.
        eps: the rounding of one score, relative.
        world: over whom the columns are shared out.
    """
    world = World() if world is None else world
    spread = _moments(scores, world)[1].sqrt()
    largest = scores.abs().amax(1) if scores.shape[1] else torch.zeros_like(spread)
    return torch.where(spread > 4 * eps * world.all_max(largest), spread, torch.zeros_like(spread))


def _moments(scores: Tensor, world: World) -> tuple[Tensor, Tensor]:
    """Mean and variance of every row, whose columns lie on several processes."""
    count = int(world.all_sum(torch.tensor([scores.shape[1]])))
    mean = world.all_sum(scores.sum(1)) / count
    return mean, world.all_sum((scores - mean[:, None]).square().sum(1)) / count


def reciprocal(spreads: Float[Tensor, " q"]) -> Float[Tensor, " q"]:
    """1 / sigma, and 0 where sigma is 0."""
    return torch.where(spreads > 0, 1 / torch.where(spreads > 0, spreads, 1.0), 0.0)


def held_in_average(units: Units, checkpoints: int, n_queries: int, n_train: int) -> int:
    """Bytes of the matrices that averaging checkpoints in units of their spread holds beside the result.

    Args:
        units: in which they are averaged.
        checkpoints: how many there are.
        n_queries: Q.
        n_train: N.
    """
    return 0 if units is Units.RAW or checkpoints == 1 else (_MATRICES - 1) * 8 * n_queries * n_train


def split_queries(question: Question, n_train: int, budget: Budget) -> Iterator[Int[Tensor, " q"]]:
    """The queries in parts whose scores fit the memory budget, where only the extremes are asked for.

    Args:
        question: the queries.
        n_train: how many training examples are scored, by all processes together.
        budget: of which a share is taken.
    """
    each = -(-n_train // current().size)
    room = max(1, int(budget.bytes * QUERY_SHARE / (_MATRICES * 8 * each)))
    yield from torch.split(torch.arange(len(question)), len(question) if question.top is None else room)

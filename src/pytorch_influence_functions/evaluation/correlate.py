"""Rank and linear correlation per query over subsets, with resampling of the subsets."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import final

import torch
from jaxtyping import Float, Int
from torch import Tensor

from ..core.errors import InvalidInput

RESAMPLES = 1000
LEVEL = 0.95
# Student's t beyond which 2.5 % lie, for 1, 2, ... degrees of freedom; above 30 the last is a little too wide.
_STUDENT = (
    12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145, 2.131, 2.120,
    2.110, 2.101, 2.093, 2.086, 2.080, 2.074, 2.069, 2.064, 2.060, 2.056, 2.052, 2.048, 2.045, 2.042,
)  # fmt: skip
# How many resampled ranks are held in memory at once.
_RANKS_AT_ONCE = 20_000_000
Statistic = Callable[[Tensor, Tensor, Tensor], Tensor]
"""`(predicted [Q, S], actual [Q, S], weights [B, S]) -> [B, Q]`; weights say how many times each subset counts."""


def weighted_ranks(values: Float[Tensor, "q s"], weights: Float[Tensor, "b s"]) -> Float[Tensor, "b q s"]:
    """Ranks along the last axis where value s occurs `weights[b, s]` times; equal values share their mean rank."""
    order = values.argsort(-1)
    ordered = values.gather(-1, order)
    s = values.shape[-1]
    position = torch.arange(s).expand_as(order)
    opens = torch.ones_like(order, dtype=torch.bool)
    opens[:, 1:] = ordered[:, 1:] != ordered[:, :-1]
    closes = opens.roll(-1, -1)
    closes[:, -1] = True
    first = torch.where(opens, position, 0).cummax(-1).values
    last = torch.where(closes, position, s - 1).flip(-1).cummin(-1).values.flip(-1)
    total = weights[:, order].cumsum(-1)
    before = torch.cat([torch.zeros_like(total[..., :1]), total], -1)
    spread = total.shape
    ranks = (total.gather(-1, last.expand(spread)) + before.gather(-1, first.expand(spread))) / 2
    return torch.zeros_like(ranks).scatter(-1, order.expand(spread), ranks)


def _linear(a: Tensor, b: Tensor, weights: Tensor) -> Tensor:
    """Weighted Pearson correlation [B, Q]; 0 where one side does not vary."""
    w = (weights / weights.sum(-1, keepdim=True))[:, None]
    a, b = a - (a * w).sum(-1, keepdim=True), b - (b * w).sum(-1, keepdim=True)
    size = ((a * a * w).sum(-1) * (b * b * w).sum(-1)).clamp_min(0).sqrt()
    correlation: Tensor = torch.where(size > 0, (a * b * w).sum(-1) / size.where(size > 0, 1.0), 0.0)
    return correlation


def pearson(predicted: Tensor, actual: Tensor, weights: Tensor) -> Tensor:
    """Linear correlation per query [B, Q]."""
    return _linear(predicted[None], actual[None], weights)


def spearman(predicted: Tensor, actual: Tensor, weights: Tensor) -> Tensor:
    """Rank correlation per query [B, Q]."""
    return _linear(weighted_ranks(predicted, weights), weighted_ranks(actual, weights), weights)


def slope(predicted: Tensor, actual: Tensor, weights: Tensor) -> Tensor:
    """Least-squares slope of actual on predicted per query [B, Q], with an intercept; 0 where nothing is predicted."""
    w = (weights / weights.sum(-1, keepdim=True))[:, None]
    x, y = predicted[None], actual[None]
    x, y = x - (x * w).sum(-1, keepdim=True), y - (y * w).sum(-1, keepdim=True)
    size = (x * x * w).sum(-1)
    slopes: Tensor = torch.where(size > 0, (x * y * w).sum(-1) / size.where(size > 0, 1.0), 0.0)
    return slopes


def per_query(statistic: Statistic, predicted: Tensor, actual: Tensor) -> Float[Tensor, " q"]:
    """The statistic of each query, in which every subset counts once."""
    return statistic(predicted.double(), actual.double(), torch.ones(1, predicted.shape[-1], dtype=torch.float64))[0]


def resampled(
    statistic: Statistic, predicted: Tensor, actual: Tensor, resamples: int, seed: int = 0
) -> Float[Tensor, " b"]:
    """The mean over queries under resampled subsets. The same seed gives the same draws, so differences are paired."""
    predicted, actual = predicted.double(), actual.double()
    return torch.cat([statistic(predicted, actual, w).mean(-1) for w in _draws(predicted.shape, resamples, seed)])


def resampled_ids(n: int, resamples: int, seed: int = 0) -> Int[Tensor, "b n"]:
    """The numbers 0 to n - 1 drawn again with replacement; the same seed gives the same draws."""
    return torch.randint(n, (resamples, n), generator=torch.Generator().manual_seed(seed))


def resampled_counts(n: int, resamples: int, seed: int = 0) -> Float[Tensor, "b n"]:
    """How often each number was drawn by `resampled_ids`."""
    ids = resampled_ids(n, resamples, seed)
    return torch.zeros(resamples, n, dtype=torch.float64).scatter_add_(
        1, ids, torch.ones(resamples, n, dtype=torch.float64)
    )


def _draws(shape: torch.Size, resamples: int, seed: int) -> Iterator[Tensor]:
    queries, subsets = shape
    weights = resampled_counts(subsets, resamples, seed)
    yield from torch.split(weights, max(1, _RANKS_AT_ONCE // (queries * subsets)))


@final
@dataclass(frozen=True, eq=False, repr=False)
class Estimate:
    """A number, the middle 95 % of its resampled values, and the protocol it belongs to.

    Args:
        value: the number, on everything.
        low: the lower end of the interval.
        high: the upper end.
        protocol: how the truth was made; numbers of different protocols are not compared.
        draws: the values on each resampling.
    """

    value: float
    low: float
    high: float
    protocol: str
    draws: Tensor = field(default_factory=lambda: torch.empty(0))

    @staticmethod
    def of(value: float, draws: Tensor, protocol: str) -> Estimate:
        """Make an estimate from the value on everything and the values on each resampling.

        Args:
            value: the number, on everything.
            draws: the values on each resampling.
            protocol: how the truth was made.
        """
        if not len(draws):
            raise InvalidInput("resamples must be at least 1.")
        tail = (1.0 - LEVEL) / 2
        low, high = torch.quantile(draws.double(), torch.tensor([tail, 1.0 - tail], dtype=torch.float64)).tolist()
        return Estimate(float(value), low, high, protocol, draws)

    @staticmethod
    def mean_of(values: Float[Tensor, " n"], protocol: str, resamples: int = RESAMPLES, seed: int = 0) -> Estimate:
        """The mean of some values, the values resampled; with one seed and one count every method is resampled alike.

        Args:
            values: one for each query or removal.
            protocol: how they were made.
            resamples: how often they are drawn again, with replacement.
            seed: of the draws.

        >>> print(Estimate.mean_of(torch.tensor([1.0, 1.0]), "two queries"))
        1.000 (1.000 to 1.000)
        """
        draws = values[resampled_ids(len(values), resamples, seed)]
        return Estimate.of(float(values.mean()), draws.mean(1), protocol)

    @staticmethod
    def over_seeds(values: Float[Tensor, " r"], protocol: str) -> Estimate:
        """The mean over seeds with Student's 95 % interval, NaN for a single seed.

        Args:
            values: one for each seed.
            protocol: how they were made.

        >>> print(Estimate.over_seeds(torch.tensor([1.0, 2.0, 3.0]), "three seeds"))
        2.000 (-0.484 to 4.484)
        """
        values = values.double()
        mean, count = float(values.mean()), len(values)
        if count < 2:
            return Estimate(mean, math.nan, math.nan, protocol)
        quantile = _STUDENT[min(count - 1, len(_STUDENT)) - 1]
        around = quantile * float(values.std()) / math.sqrt(count)
        return Estimate(mean, mean - around, mean + around, protocol)

    def minus(self, other: Estimate) -> Estimate:
        """The paired difference; both estimates must have been resampled alike.

        Args:
            other: what is taken away.

        Raises:
            InvalidInput: numbers of different protocols, or of different numbers of resamplings.
        """
        if self.protocol != other.protocol or len(self.draws) != len(other.draws):
            raise InvalidInput(
                f"Numbers of different protocols cannot be compared: {self.protocol!r} and {other.protocol!r}; use the "
                "same truth and resamples for both."
            )
        return Estimate.of(self.value - other.value, self.draws - other.draws, self.protocol)

    def __str__(self) -> str:
        return f"{self.value:.3f} ({self.low:.3f} to {self.high:.3f})"

    def __repr__(self) -> str:
        return f"Estimate({self}, {self.protocol})"

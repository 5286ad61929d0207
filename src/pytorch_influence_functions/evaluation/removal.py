"""Subset-removal curves: retrain without the examples most helpful to a query, and measure how much worse it gets."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, final

import torch
from jaxtyping import Float
from torch import Tensor

from ..core.errors import InvalidInput, UnknownName, nearest
from ..problem.data import Source
from ..problem.problem import Problem
from ..scores.scores import Scores
from .correlate import RESAMPLES, Estimate
from .retraining import retrain
from .subsets import Subsets
from .table import contenders


@final
@dataclass(frozen=True, eq=False, repr=False)
class RemovalCurves:
    """How each query changed when its own top examples were removed. More harm means better attribution.

    Args:
        counts: the numbers k of removed examples.
        measured: for each name [K, R, Q], the query's measure after training without its own top k.
        baseline: [R, Q], after training on everything.
        lower_is_better: of the measure.
        protocol: a description.
        left_out: controls that could not be computed, with the reason.
    """

    counts: tuple[int, ...]
    measured: Mapping[str, Float[Tensor, "k r q"]]
    baseline: Float[Tensor, "r q"]
    lower_is_better: bool
    protocol: str
    left_out: Mapping[str, str]

    def harm(self, name: str, count: int, resamples: int = RESAMPLES) -> Estimate:
        """The mean over queries of how much worse the measure became; the interval resamples queries.

        Args:
            name: of a method.
            count: how many examples were removed.
            resamples: of the queries, for the interval.

        Raises:
            UnknownName: no such method.
            InvalidInput: that number was not removed.
        """
        if name not in self.measured:
            raise UnknownName(f"No method {name!r} among the curves.{nearest(name, self.measured)}")
        if count not in self.counts:
            raise InvalidInput(f"{count} examples were not removed; removed were {', '.join(map(str, self.counts))}.")
        change = self.measured[name][self.counts.index(count)].double() - self.baseline.double()
        worse = (change if self.lower_is_better else -change).mean(0)
        return Estimate.mean_of(worse, f"{self.protocol}, {count} removed", resamples)

    def __str__(self) -> str:
        width = max(map(len, self.measured))
        lines = [f"harm to a query by {self.protocol}; 95 % intervals over queries"]
        lines.append("  " + " " * width + "".join(f"  {f'{k} removed':>24}" for k in self.counts))
        order = sorted(self.measured, key=lambda name: -self.harm(name, self.counts[-1], 1).value)
        for name in order:
            cells = "".join(f"  {self.harm(name, k)!s:>24}" for k in self.counts)
            lines.append(f"  {name:<{width}}{cells}")
        lines += [f"  {name:<{width}}  not available: {why}" for name, why in self.left_out.items()]
        return "\n".join(lines)

    __repr__ = __str__


def removal_curves(
    recipe: Any,
    methods: Any,
    counts: Sequence[int] = (10, 40, 160),
    seeds: int | Sequence[int] = 3,
    *,
    train: Any,
    queries: Any,
    measure: Any = None,
    problem: Problem | None = None,
    folder: str | os.PathLike[str] | None = None,
    workers: int | None = None,
) -> RemovalCurves:
    """Retrain without each query's `k` most helpful examples, for every method and k: brittleness curves.

    With `problem` the controls (random, loss, embedding similarity, gradient dot product) are run too; without it only
    the random one. One training per method, query, k and seed. `methods` are given as in `evaluate`, the other
    arguments as in `retrain`.

    Args:
        recipe: as in `retrain`.
        methods: as in `evaluate`.
        counts: how many examples are removed: the k of each point of a curve.
        seeds, train, queries, measure, folder, workers: as in `retrain`.
        problem: the trained model with its data, where methods are to be run.

    Raises:
        InvalidInput: k below 1 or not below N, scores that do not fit.

    Reference: Ilyas et al. (2022), "Datamodels".
    """
    source = Source.of(train)
    query_source = source.read_alike(queries)
    n, q = len(source), len(query_source)
    removed = tuple(int(k) for k in counts)
    if not removed or min(removed) < 1 or max(removed) >= n or len(set(removed)) < len(removed):
        raise InvalidInput(f"counts must be different numbers from 1 to {n - 1}, got {tuple(counts)}.")
    scored, left_out = contenders(methods, (q, n), problem, query_source, measure)
    orders = {c.name: helpful_orders(c.scores, (q, n)) for c in scored}
    groups = [order[row, :k] for order in orders.values() for k in removed for row in range(q)]
    truth = retrain(
        recipe, Subsets.groups(n, groups), seeds, train=source, queries=query_source, measure=measure, folder=folder,
        workers=workers,
    )  # fmt: skip
    table = truth.measured.reshape(len(orders), len(removed), q, len(truth.seeds), q)
    own_removal = table.diagonal(dim1=2, dim2=4)  # each query after its own removal: [names, K, R, Q]
    protocol = f"removal of each query's most helpful examples, {len(truth.seeds)} seeds, {q} queries"
    measured = dict(zip(orders, own_removal, strict=True))
    return RemovalCurves(removed, measured, truth.baseline, truth.lower_is_better, protocol, left_out)


def helpful_orders(scores: Scores | Tensor, shape: tuple[int, int]) -> Tensor:
    """Training indices from most to least helpful, [Q, N]; a plain matrix counts as scores of a loss."""
    wrapped = scores if isinstance(scores, Scores) else Scores(scores)
    if wrapped.indices is not None or wrapped.shape != shape:
        raise InvalidInput(
            f"Scores of shape {wrapped.shape} do not fit {shape[0]} queries and {shape[1]} training examples; score "
            "the same data, without top=."
        )
    return torch.stack([wrapped.helpful_order(q) for q in range(len(wrapped))])

"""Rows that are weighted sums of queries: means, sums, groups, pairs. Sums are taken before the solve."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from ..core.errors import InfluenceError, InvalidInput
from ..scores.indexing import parse_positions


@dataclass(frozen=True, eq=False)
class Combination:
    """`size` rows over `count` queries; entry e adds `weights[e]` times query `queries[e]` to row `rows[e]`.

    Args:
        size: how many rows.
        count: how many queries there are.
        rows: the row of each entry, in ascending order.
        queries: the query of each entry.
        weights: float64.
    """

    size: int
    count: int
    rows: Int[Tensor, " e"]
    queries: Int[Tensor, " e"]
    weights: Float[Tensor, " e"]

    @staticmethod
    def each(count: int) -> Combination:
        """Every query as a row of its own."""
        return Combination.picked(torch.arange(count), count)

    @staticmethod
    def picked(queries: Int[Tensor, " r"], count: int) -> Combination:
        """Row r is query `queries[r]`."""
        ones = torch.ones(len(queries), dtype=torch.float64)
        return Combination(len(queries), count, torch.arange(len(queries)), queries, ones)

    @staticmethod
    def of_weights(weights: Sequence[Float[Tensor, " q"]]) -> Combination:
        """Row r is the sum of all queries, each times its number in `weights[r]`."""
        matrix = torch.stack([w.double() for w in weights])
        rows, queries = matrix.nonzero(as_tuple=True)
        return Combination(len(matrix), matrix.shape[1], rows, queries, matrix[rows, queries])

    @property
    def selects(self) -> bool:
        """Whether every row has exactly one query, so that rows keep the form of gradients."""
        return torch.equal(self.rows, torch.arange(self.size))

    @property
    def trivial(self) -> bool:
        """Whether the rows are the queries."""
        everyone = torch.arange(self.count)
        return self.selects and torch.equal(self.queries, everyone) and bool((self.weights == 1).all())

    def restricted(self, ids: Int[Tensor, " r"]) -> Combination:
        """The rows `ids` (ascending), counted from 0."""
        place = torch.full((self.size,), -1)
        place[ids] = torch.arange(len(ids))
        rows = place[self.rows]
        kept = rows >= 0
        return Combination(len(ids), self.count, rows[kept], self.queries[kept], self.weights[kept])

    def after(self, first: Combination) -> Combination:
        """Rows of these rows: `first` makes from its queries what this takes as queries."""
        order = torch.argsort(first.rows, stable=True)
        starts = torch.searchsorted(first.rows[order], torch.arange(first.size + 1))
        lengths = (starts[1:] - starts[:-1])[self.queries]
        entries = torch.repeat_interleave(torch.arange(len(self.queries)), lengths)
        offset = torch.arange(len(entries)) - torch.repeat_interleave(lengths.cumsum(0) - lengths, lengths)
        inner = order[starts[self.queries[entries]] + offset]
        weights = self.weights[entries] * first.weights[inner]
        return Combination(self.size, first.count, self.rows[entries], first.queries[inner], weights)

    def scaled(self, factor: float) -> Combination:
        """Every row times a number."""
        return replace(self, weights=self.weights * factor)

    def apply(self, values: Float[Tensor, "q n"]) -> Float[Tensor, "r n"]:
        """The same sums of anything that has a row for every query."""
        total = torch.zeros(self.size, values.shape[1], dtype=torch.float64)
        return total.index_add_(0, self.rows, values.double().cpu()[self.queries] * self.weights[:, None])


@dataclass(frozen=True, eq=False)
class Aggregate:
    """What `aggregate=` says: named rows, how they are made, and that in words."""

    names: tuple[str, ...]
    combination: Combination
    description: str


def aggregate_of(aggregate: Any, count: int) -> Aggregate:
    """Read `aggregate=` for so many queries.

    Raises:
        InvalidInput: it is nothing that queries can be put together by; the message says what is.
    """
    queries = f"{count:,} quer{'y' if count == 1 else 'ies'}"
    if isinstance(aggregate, str):
        if aggregate not in ("mean", "sum"):
            raise InvalidInput(
                f"aggregate={aggregate!r} is no way to put queries together; write 'mean', 'sum', a group for every "
                "query, or groups by name."
            )
        weight = 1.0 / count if aggregate == "mean" else 1.0
        combination = Combination.of_weights([torch.full((count,), weight, dtype=torch.float64)])
        name = f"{aggregate} over {queries}"
        return Aggregate((name,), combination, f"the row is the {name}, solved as one right-hand side")
    groups = dict(aggregate) if isinstance(aggregate, Mapping) else _by_label(aggregate, count)
    if not groups:
        raise InvalidInput("aggregate= names no group; give at least one.")
    weights = [_weights_of(str(name), members, count) for name, members in groups.items()]
    rows = f"{len(weights)} right-hand side{'' if len(weights) == 1 else 's'}"
    description = f"each row is a weighted sum over a group of the {queries}, solved as {rows}"
    names = tuple(str(name) for name in groups)
    if len(set(names)) < len(names):
        raise InvalidInput(f"Two groups of aggregate= are called {_twice(names)!r}; give each a name of its own.")
    return Aggregate(names, Combination.of_weights(weights), description)


def _twice(names: Sequence[str]) -> str:
    return next(name for name in names if names.count(name) > 1)


def _by_label(labels: Any, count: int) -> dict[Any, Tensor]:
    """The queries of every label, in the order of the labels where they have one."""
    try:
        values = labels.tolist() if hasattr(labels, "tolist") else list(labels)
    except TypeError:
        raise InvalidInput(
            f"aggregate={labels!r} is no way to put queries together; write 'mean', 'sum', a group for every query, "
            "or groups by name."
        ) from None
    if len(values) != count:
        raise InvalidInput(
            f"aggregate= holds {len(values):,} labels for {count:,} queries; give each query the name of its group, or "
            "None to leave it out."
        )
    odd = next((v for v in values if v is not None and not isinstance(v, (str, int))), None)
    if odd is not None:
        raise InvalidInput(
            f"aggregate= holds {odd!r}, expected the name or number of a group for every query; give weights by name: "
            "aggregate={'name': weights}."
        )
    groups: dict[Any, list[int]] = {}
    for query, label in enumerate(values):
        if label is not None:
            groups.setdefault(label, []).append(query)
    same_kind = len({isinstance(label, str) for label in groups}) == 1
    ordered = sorted(groups) if same_kind else list(groups)
    return {label: torch.tensor(groups[label]) for label in ordered}


def _weights_of(name: str, members: Any, count: int) -> Float[Tensor, " q"]:
    """One number per query: those given, or what makes the mean over the positions given."""
    try:
        values = None if isinstance(members, slice) else torch.as_tensor(members)
        if values is not None and values.is_floating_point() and values.numel():
            return _checked_weights(name, values.detach().cpu().double(), count)
        _refuse_whole_weights(values, count)
        positions = parse_positions(members, count, "query")
    except InfluenceError as error:
        error.args = (f"In the group {name!r} of aggregate=, {str(error)[0].lower()}{str(error)[1:]}",)
        raise
    except (TypeError, ValueError, RuntimeError) as cause:
        raise InvalidInput(
            f"The group {name!r} of aggregate= is {members!r}; expected positions of queries, a mask over them, or "
            f"{count:,} weights."
        ) from cause
    weights = torch.zeros(count, dtype=torch.float64)
    weights[positions] = 1.0 / len(positions)
    return weights


def _refuse_whole_weights(values: Tensor | None, count: int) -> None:
    """Refuse as many whole numbers as queries that nobody writes for positions: they would be the mean of all."""
    if values is None or values.dtype == torch.bool or values.shape != (count,) or count < 2:
        return
    if bool((values < 0).any()) or not bool((values.diff() > 0).all()):
        raise InvalidInput(
            f"{values.tolist()} are as many whole numbers as queries, which may be positions or weights; write weights "
            "with a decimal point (1.0), and all positions in their order."
        )


def _checked_weights(name: str, weights: Tensor, count: int) -> Tensor:
    if weights.shape != (count,):
        raise InvalidInput(f"there are weights of shape {tuple(weights.shape)} for {count:,} queries; give one each.")
    if not bool(torch.isfinite(weights).all()) or not bool(weights.any()):
        raise InvalidInput("the weights must be finite and not all zero; leave the group out otherwise.")
    return weights

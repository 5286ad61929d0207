"""The extremes of a stream of score blocks, without ever holding all of them."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from ..core.distributed import World
from ..linalg.chunks import chunks, gathered_columns


@dataclass(eq=False)
class TopK:
    """Per query the `k` largest and the `k` smallest scores of a stream, with their training indices.

    Equal scores go to the smaller index, so the result does not depend on how the stream was cut. Holds 3 k scores per
    query, and a buffer of a few thousand columns for one group of queries.
    """

    n_queries: int
    k: int
    _largest: _Extremes = field(init=False)
    _smallest: _Extremes = field(init=False)
    _queries: Tensor | None = field(default=None, init=False)
    _buffer: list[tuple[Tensor, Tensor]] = field(default_factory=list, init=False)

    def __post_init__(self) -> None:
        self._largest = _Extremes.empty(self.n_queries, self.k, sign=1.0)
        # Twice as many: where equal scores stand among both the largest and the smallest, the next ones move up.
        self._smallest = _Extremes.empty(self.n_queries, 2 * self.k, sign=-1.0)

    def add(self, query_ids: Int[Tensor, " q"], ids: Int[Tensor, " n"], values: Float[Tensor, "q n"]) -> None:
        """Merge one block: scores of queries `at` on training examples `ids`."""
        if self._queries is not None and not torch.equal(self._queries, query_ids):
            self._merge()
        self._queries = query_ids
        self._buffer.append((ids.cpu(), values.cpu()))
        if sum(len(i) for i, _ in self._buffer) >= gathered_columns(self.k):
            self._merge()

    def result(self) -> tuple[Float[Tensor, "q m"], Int[Tensor, "q m"]]:
        """Scores and training indices, each row in descending order of score; m is 2 k, or N where that is less."""
        self._merge()
        largest, smallest = self._largest, self._smallest
        values = torch.cat([largest.values, smallest.values], 1)
        ids = torch.cat([largest.ids, smallest.ids], 1)
        twice = torch.zeros_like(smallest.ids, dtype=torch.bool)
        for part in chunks(self.n_queries, 2 * self.k**2):
            twice[part] = (smallest.ids[part, :, None] == largest.ids[part, None]).any(2)
        usable = torch.cat([largest.ids >= 0, (smallest.ids >= 0) & ~twice], 1)
        width = min(2 * self.k, int(usable.sum(1).min()))
        # The usable ones first, the largest before the smallest: both are in the order in which they are taken.
        kept = torch.argsort((~usable).int(), dim=1, stable=True)[:, :width]
        values, ids = values.gather(1, kept), ids.gather(1, kept)
        order = _descending(values, ids)
        return values.gather(1, order), ids.gather(1, order)

    def everyones(self, world: World) -> TopK:
        """The extremes of all processes' streams together, on every process; 3 k scores per query travel."""
        self._merge()
        if world.size == 1:
            return self
        merged, both = TopK(self.n_queries, self.k), (self._largest, self._smallest)
        for parts in zip(*(world.gather(t) for side in both for t in (side.values, side.ids)), strict=True):
            merged.absorb(*parts)
        return merged

    def absorb(self, high: Tensor, high_ids: Tensor, low: Tensor, low_ids: Tensor) -> None:
        """Merge the largest [q, k] and the smallest [q, 2 k] of another stream, with their training indices."""
        every = torch.arange(self.n_queries)
        self._largest.merge(every, high_ids, high)
        self._smallest.merge(every, low_ids, low)

    def _merge(self) -> None:
        if self._queries is None:
            return
        ids, values = self._buffer[0]
        if len(self._buffer) > 1:
            ids = torch.cat([i for i, _ in self._buffer])
            values = torch.cat([v for _, v in self._buffer], 1)
        # Later in a long stream next to no example enters a list, and to compare is cheaper than to select.
        entering = self._largest.admit(self._queries, values) | self._smallest.admit(self._queries, values)
        places = entering.nonzero().flatten()
        if len(places) < len(ids):
            ids, values = ids[places], values[:, places]
        if len(ids):
            for extremes in (self._largest, self._smallest):
                extremes.merge(self._queries, ids, values)
        self._queries = None
        self._buffer.clear()


@dataclass(eq=False)
class _Extremes:
    """The best scores of every query in descending order of sign * score; -1 stands where there is none yet."""

    values: Float[Tensor, "q k"]
    ids: Int[Tensor, "q k"]
    sign: float

    @staticmethod
    def empty(n_queries: int, k: int, sign: float) -> _Extremes:
        values = torch.full((n_queries, k), -sign * torch.inf, dtype=torch.float64)
        return _Extremes(values, torch.full((n_queries, k), -1), sign)

    def admit(self, query_ids: Tensor, values: Float[Tensor, "q n"]) -> Bool[Tensor, " n"]:
        """Which columns could enter a list of one of these queries."""
        last = self.values[query_ids, -1].to(values.dtype)
        # One step beyond, so that no rounding of the last one keeps its equals out.
        last = torch.nextafter(last, torch.full_like(last, -self.sign * torch.inf))[:, None]
        able: Tensor = (values - last).amax(0) >= 0 if self.sign > 0 else (values - last).amin(0) <= 0
        return able

    def merge(self, query_ids: Tensor, ids: Tensor, values: Tensor) -> None:
        """Take scores [q, n] of these queries in; `ids` are those of the examples, [n], or [q, n] for each query's."""
        known = self.ids[query_ids]
        # The block's own best first, in its own precision: only these few are merged with what is known.
        ids = ids.expand(len(query_ids), -1)
        best = _best(values, ids, min(known.shape[1], values.shape[1]), self.sign > 0)
        ids = torch.cat([known, ids.gather(1, best)], 1)
        signed = self.sign * torch.cat([self.values[query_ids], values.gather(1, best).double()], 1)
        best = _best(signed, ids, known.shape[1])
        self.values[query_ids] = self.sign * signed.gather(1, best)
        self.ids[query_ids] = ids.gather(1, best)


def _best(values: Float[Tensor, "q w"], ids: Int[Tensor, "q w"], k: int, largest: bool = True) -> Int[Tensor, "q k"]:
    """Columns of the k largest (or smallest) values of every row, best first, the smaller id first among equals."""
    # One more than k: it tells whether a value beyond equals the last one.
    best, columns = torch.topk(values, min(k + 1, values.shape[1]), dim=1, largest=largest)
    columns = columns[:, :k].clone()
    # Which of several equal values `topk` takes is not promised, so rows with equals among them are sorted in full.
    rows = (best[:, 1:] == best[:, :-1]).any(1).nonzero().flatten()
    if len(rows):
        signed = values[rows] if largest else -values[rows]
        columns[rows] = _descending(signed, ids[rows])[:, :k]
    return columns


def _descending(values: Tensor, ids: Tensor) -> Tensor:
    """The order of every row: descending by value, ascending by id among equals."""
    by_id = torch.argsort(ids, dim=1)
    return by_id.gather(1, torch.argsort(values.gather(1, by_id), dim=1, descending=True, stable=True))

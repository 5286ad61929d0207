"""One pass over stored rows: blocks of products, filtered, ranked or put side by side."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Final, final

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from ..core.distributed import World
from ..influence.candidates import Candidates
from ..influence.scoring import refuse_nonfinite
from ..influence.topk import TopK
from .build import HASHES, LABELS
from .folder import IndexFolder
from .layouts import AbstractLayout, Stored

# Rows that are looked at together, numbers that are made of them, and scores on them: enough that what is done once
# for each piece costs little beside its products.
_MOST: Final = 1 << 18
_NUMBERS: Final = 1 << 23
_SCORES: Final = 1 << 20
# Where fewer than this share of a file's rows count, these are taken out, and no other is read.
_FEW: Final = 1 / 4


@final
@dataclass(frozen=True, eq=False)
class Part:
    """Some neighbouring rows of one shard.

    Args:
        ids: the examples they belong to.
        stored: their tensors.
        forms: what else is needed to read them.
        kept: which of them count; None: all.
    """

    ids: Int[Tensor, " n"]
    stored: Stored
    forms: Any
    kept: Bool[Tensor, " n"] | None


@final
@dataclass(frozen=True, eq=False)
class StoredRows:
    """The rows of an index, shard by shard and piece by piece, without those that do not count.

    Args:
        folder: the index.
        layout: how its rows are stored.
        mask: which examples count, of all that were given.
        world: whose share of the shards is read.
    """

    folder: IndexFolder
    layout: AbstractLayout
    mask: Bool[Tensor, " n"]
    world: World = World()

    def parts(self, queries: int = 1, as_stored: bool = False, width: int = 0) -> Iterator[Part]:
        """All rows that count, in pieces that suit so many queries.

        Args:
            queries: how many.
            as_stored: whether they are only multiplied as they are stored.
            width: numbers that are made of each row.
        """
        shards = self.folder.manifest.shards
        for shard in shards[self.world.share(len(shards))]:
            asked = self.mask[shard.first : shard.stop]
            if not bool(asked.any()):
                continue
            file, ids = self.folder.read(shard.file), shard.ids
            kept = asked if shard.kept is None else self.mask[ids]
            stored = {k: v for k, v in file.tensors.items() if k not in (HASHES, LABELS)}
            numbers = 1.0 if as_stored else max(width, sum(v.numel() for v in stored.values()) / max(1, len(ids)))
            step = max(1, min(_MOST, int(_NUMBERS / max(1.0, numbers)), _SCORES // max(1, queries)))
            yield from self._pieces(ids, stored, file.record["forms"], kept, step)

    def _pieces(self, ids: Tensor, stored: Stored, forms: Any, kept: Tensor, step: int) -> Iterator[Part]:
        if int(kept.sum()) < _FEW * len(ids):
            for some in torch.split(kept.nonzero().flatten(), step):
                yield Part(ids[some], {k: v[some] for k, v in stored.items()}, forms, None)
            return
        everything = bool(kept.all())
        for start in range(0, len(ids), step):
            chunk = slice(start, start + step)
            some = kept[chunk]
            if everything:
                yield Part(ids[chunk], {k: v[chunk] for k, v in stored.items()}, forms, None)
            elif bool(some.any()):
                yield Part(ids[chunk], {k: v[chunk] for k, v in stored.items()}, forms, some)

    def scores(
        self, ready: Sequence[Any], queries: int, inverse: Tensor | None
    ) -> Iterator[tuple[Int[Tensor, " n"], list[Float[Tensor, "q n"]]]]:
        """(training ids, scores of all queries on them by part) before they are divided by N.

        Args:
            ready: solved queries for each part, as `AbstractLayout.ready` gives them.
            queries: how many there are.
            inverse: where scores are divided by sqrt(g^T (C + D)^-1 g) of each example: 1 / (eigenvalue + damping).
        """
        as_stored = inverse is None and self.layout.multiplies_as_stored
        for part in self.parts(queries, as_stored, 0 if inverse is None else 2 * len(inverse)):
            several = [self.layout.products(some, part.stored, part.forms) for some in ready]
            if inverse is not None:
                norms = self._own(part, inverse).sqrt().to(several[0])
                several = [values / torch.where(norms > 0, norms, torch.ones_like(norms)) for values in several]
            if part.kept is None:
                yield part.ids, several
            else:
                yield part.ids[part.kept], [values[:, part.kept.to(values.device)] for values in several]

    def self_influence(self, inverse: Float[Tensor, " k"]) -> Iterator[tuple[Tensor, Tensor]]:
        """(training ids, g^T (C + D)^-1 g of each)."""
        for part in self.parts(width=2 * len(inverse)):
            own = self._own(part, inverse)
            yield (part.ids, own) if part.kept is None else (part.ids[part.kept], own[part.kept])

    def _own(self, part: Part, inverse: Float[Tensor, " k"]) -> Float[Tensor, " n"]:
        rows = self.layout.coordinates(part.stored, part.forms)
        return rows.square().double() @ inverse.to(rows.device)


@final
@dataclass(eq=False)
class Ranking:
    """Collects blocks of scores: the extremes of every query, all of them, or those of a query's own candidates.

    Args:
        queries: how many.
        mask: which examples count.
        top: how many of each end; None: all.
        candidates: of every query; None: whatever counts.
    """

    queries: int
    mask: Bool[Tensor, " n"]
    top: int | None
    candidates: Candidates | None = None

    def __post_init__(self) -> None:
        self._extremes: TopK | None = None
        self._columns = torch.arange(0)
        width = 0
        if self.candidates is not None:
            width = self.candidates.width
        elif self.top is not None:
            self._extremes = TopK(self.queries, min(self.top, int(self.mask.sum())))
        else:
            self._columns = self.mask.nonzero().flatten()
            width = len(self._columns)
        self._whole = torch.zeros(self.queries if width else 0, width, dtype=torch.float64)

    def add(self, query_ids: Int[Tensor, " q"], ids: Int[Tensor, " n"], values: Float[Tensor, "q n"]) -> None:
        """Add the scores of some queries on examples `ids`, which come in increasing order.

        Raises:
            NonFinite: a score is NaN or infinite.
        """
        refuse_nonfinite(values, query_ids, ids)
        if self._extremes is not None:
            self._extremes.add(query_ids, ids, values)
        elif self.candidates is not None:
            self._whole[query_ids] += self.candidates.pick(query_ids, ids, values)
        else:
            start = int(torch.searchsorted(self._columns, ids[0]))
            self._whole[query_ids, start : start + len(ids)] = values.double().cpu()

    def everyones(self, world: World) -> Ranking:
        """What all processes have collected together, each of its own examples; on every process."""
        if self._extremes is not None:
            self._extremes = self._extremes.everyones(world)
        else:
            world.sum_into(self._whole)
        return self

    def result(self) -> tuple[Float[Tensor, "q m"], Int[Tensor, "q m"]]:
        """Scores, and the examples behind them."""
        if self._extremes is not None:
            return self._extremes.result()
        if self.candidates is not None:
            return self._whole, self.candidates.positions.expand(self.queries, -1)
        return self._whole, self._columns.expand(self.queries, -1)

"""A graph of nearest neighbours over stored rows: candidates for both ends of a ranking, without reading every row.

A score is the inner product of a solved query with a row, so the graph is one for the largest inner product, faiss's
HNSW. Its vectors are A^(-1/2) g with A = C + lambda, the curvature with the damping that the index was built
with, and it is asked with A^(1/2) x for a solved query x: products are the scores whatever damping x was solved with,
and with that damping queries A^(-1/2) g_q lie where the rows do, which is where such graphs lead best.

Reference: Malkov & Yashunin (2018), "Efficient and robust approximate nearest neighbor search using hierarchical
navigable small world graphs"; for inner products Morozov & Babenko (2018), "Non-metric similarity graphs for maximum
inner product search".
"""

from __future__ import annotations

import importlib
import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Final, final

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from ..core.distributed import World
from ..core.errors import InvalidInput, MissingExtra
from ..core.files import replacing
from ..core.progress import Meter
from ..core.validate import whole_number
from ..influence.candidates import lists_of
from .audit import Recall, count_entering, draw_audit, ends_of
from .build import fitted_of, whole_layout
from .fitted_basis import FittedBasis
from .folder import GRAPH, IndexFolder, check_room, writing
from .layouts import ColumnLayout
from .manifest import GraphRecord
from .search import StoredRows
from .shard_files import describe_file

# The smallest rows, which together hold this share of the squared size of all, are left out of a graph: a score is at
# most the product of two sizes, and most rows of a fitted network are next to nothing.
_LEFT_OUT: Final = 1e-3
# A search for more candidates than this share of the rows in a graph costs as much as reading them all.
_MOST: Final = 1 / 8
_TINY: Final = torch.finfo(torch.float64).tiny


def import_faiss() -> Any:
    """The library that makes and searches the graph.

    Raises:
        MissingExtra: it is not installed.
    """
    try:
        return importlib.import_module("faiss")
    except ImportError as cause:
        raise MissingExtra(
            "A graph of nearest neighbours needs faiss: pip install 'pytorch-influence-functions[ann]'."
        ) from cause


@contextmanager
def _own_threads(faiss: Any) -> Iterator[None]:
    """As many threads as torch has, of which the library would otherwise take all that the machine has."""
    before = faiss.omp_get_max_threads()
    faiss.omp_set_num_threads(torch.get_num_threads())
    try:
        yield
    finally:
        faiss.omp_set_num_threads(before)


def build_graph(folder: IndexFolder, links: int, ef: int) -> IndexFolder:
    """Make the graph of the rows that are stored now, in place of one that is there.

    Args:
        folder: the index.
        links: of each row.
        ef: candidates that are looked at for the links of a row.

    Raises:
        InvalidInput: the rows are factors, the index was not built to its end, or it cannot be written.
        MissingExtra: faiss is not installed.
    """
    faiss = import_faiss()
    whole_number("links", links, 2)
    whole_number("ef", ef, 1)
    fitted = fitted_of(folder)
    layout = whole_layout(folder, fitted)
    if not isinstance(layout, ColumnLayout):
        raise InvalidInput(
            "A graph of nearest neighbours is over rows of some hundred or thousand numbers, and this index keeps "
            "Factors(); build one with representation=Sketch(1024), or ask without ef=."
        )
    with writing(folder.path) as path:
        opened = IndexFolder.open(path, folder.check)
        stored = StoredRows(opened, layout, opened.manifest.mask(), World())
        roots = fitted.inverse(None)[0].sqrt()
        sizes = torch.zeros(opened.manifest.examples, dtype=torch.float64)
        for ids, own in stored.self_influence(roots.square()):
            sizes[ids] = own.cpu().sqrt()
        large, largest_left = _large(sizes)
        check_room(path, int(large.sum()) * 2 * (len(roots) + 2 * links))
        linked = faiss.IndexHNSWSQ(len(roots), faiss.ScalarQuantizer.QT_fp16, links, faiss.METRIC_INNER_PRODUCT)
        linked.hnsw.efConstruction = ef
        graph = faiss.IndexIDMap(linked)
        # No larger than 1: the vectors are kept in half precision.
        scale = roots / sizes.max().clamp_min(_TINY)
        with _own_threads(faiss):
            _add_rows(graph, replace(stored, mask=large), scale)
        name = f"{GRAPH}-{secrets.token_hex(4)}.faiss"
        with replacing(path / name) as aside:
            faiss.write_index(graph, os.fspath(aside))
        stop, left = len(sizes), int((stored.mask & ~large).sum())
        record = GraphRecord(describe_file(path, name), opened.manifest.digest_rows(stop), stop, left, largest_left)
        opened.write(replace(opened.manifest, graph=record))
        opened.drop_unlisted()
    return opened


def _large(sizes: Float[Tensor, " n"]) -> tuple[Bool[Tensor, " n"], float]:
    """Which rows hold all but a thousandth of the squared size, and the size of the largest other one."""
    ordered, order = sizes.sort(descending=True, stable=True)
    total = ordered.square().cumsum(0)
    count = max(1, int((total < (1 - _LEFT_OUT) * total[-1]).sum()) + 1)
    large = torch.zeros(len(sizes), dtype=torch.bool)
    large[order[:count]] = True
    return large, float(ordered[count]) if count < len(ordered) else 0.0


def _add_rows(graph: Any, stored: StoredRows, scale: Float[Tensor, " k"]) -> None:
    with Meter(int(stored.mask.sum()), "linking the rows of the index", "row") as meter:
        for part in stored.parts(width=4 * len(scale)):
            rows = (stored.layout.coordinates(part.stored, part.forms).double().cpu() * scale).float()
            ids = part.ids
            if part.kept is not None:
                ids, rows = ids[part.kept], rows[part.kept]
            if not graph.is_trained:  # half precision has nothing to learn, and wants to be told so
                graph.train(rows.numpy())
            graph.add_with_ids(rows.numpy(), ids.numpy())
            meter.advance(len(ids))


def check_ef(ef: int, top: int | None, audit: int, ids: Any, by: Any, normalised: bool) -> None:
    """Refuse what a graph cannot be asked; the arguments are those of `Index.score`.

    Raises:
        InvalidInput: it cannot.
    """
    whole_number("ef", ef, top or 1, hint="it is how many candidates are looked at for the top= that is kept")
    whole_number("audit", audit, 0)
    given = {
        "no top=": top is None,
        "normalised=True": normalised,
        "by=": by is not None,
        "a list of ids= for each query": lists_of(ids) is not None,
    }
    for what, asked in given.items():
        if asked:
            raise InvalidInput(
                f"ef= asks a graph for the ends of a ranking by whole scores, and {what} was asked for; write top=10, "
                f"ef={ef} without that, or leave ef= out."
            )


@final
@dataclass(frozen=True, eq=False)
class Graph:
    """The graph of an index, open.

    Args:
        record: what the index says of it.
        neighbours: the graph itself.
        roots: the square root of 1 / (eigenvalue + damping of the index) of every coordinate.
    """

    record: GraphRecord
    neighbours: Any
    roots: Float[Tensor, " k"]

    @staticmethod
    def open(folder: IndexFolder, fitted: FittedBasis) -> Graph:
        """That of an index.

        Raises:
            InvalidInput: it has none, or one of other rows; or its file is damaged.
            MissingExtra: faiss is not installed.
        """
        faiss, record, where = import_faiss(), folder.manifest.graph, os.fspath(folder.path)
        if record is None:
            raise InvalidInput(
                f"ef= asks a graph of nearest neighbours, and the index in {where!r} has none; make it once with "
                "index.build_graph(), or leave ef= out."
            )
        if record.rows != folder.manifest.digest_rows(record.stop):
            raise InvalidInput(
                f"The graph of the index in {where!r} was built on other rows than are stored; make it again with "
                "index.build_graph()."
            )

        def restore(path: Path) -> Any:
            return faiss.read_index(os.fspath(path), faiss.IO_FLAG_MMAP_IFC)

        return Graph(record, folder.open_graph(record.file, restore), fitted.inverse(None)[0].sqrt())

    def sizes(self, solved: Float[Tensor, "q k"]) -> Float[Tensor, " q"]:
        """Of solved queries: no score is larger than this times the size of a row."""
        sizes: Tensor = torch.linalg.vector_norm(solved / self.roots, dim=1)
        return sizes

    def candidates(self, solved: Float[Tensor, "q k"], ef: int, mask: Bool[Tensor, " n"]) -> Bool[Tensor, " n"] | None:
        """Examples that may be at an end of a query's ranking; None where the graph knows no few.

        Args:
            solved: coordinates of solved queries, float64.
            ef: how many that count are taken from each end.
            mask: which examples count.
        """
        if ef > _MOST * self.neighbours.ntotal:
            return None
        asked = solved / self.roots
        # A query's length orders nothing, and half precision holds no very large or small numbers.
        asked = asked / asked.norm(dim=1, keepdim=True).clamp_min(_TINY)
        faiss = import_faiss()
        counts = np.packbits(mask.numpy(), bitorder="little")
        some = None if bool(mask.all()) else faiss.IDSelectorBitmap(counts)
        settings = faiss.SearchParametersHNSW(efSearch=ef, sel=some)
        with _own_threads(faiss):
            _, near = self.neighbours.search(torch.cat([asked, -asked]).float().numpy(), ef, params=settings)
        if bool((near < 0).any()):
            return None
        chosen = torch.zeros_like(mask)
        chosen[torch.from_numpy(near.ravel())] = True
        # What was appended later is in no graph.
        chosen[self.record.stop :] = True
        return chosen & mask


@final
@dataclass(eq=False)
class Shortlist:
    """Keeps a question to what a graph names, and some others at random that tell what it missed.

    Args:
        graph: the graph.
        ef: candidates of each end of every query.
        audit: how many others are looked at.
        mask: which examples count.
    """

    graph: Graph
    ef: int
    audit: int
    mask: Bool[Tensor, " n"]
    _chosen: Tensor = field(init=False)
    _all_chosen: Tensor = field(init=False)
    _aside: list[tuple[Tensor, Tensor]] = field(default_factory=list, init=False)
    _sizes: list[tuple[Tensor, Tensor]] = field(default_factory=list, init=False)
    _audited: int = field(default=0, init=False)
    _trials: int = field(default=0, init=False)
    _left: int = field(default=0, init=False)

    @staticmethod
    def open(folder: IndexFolder, fitted: FittedBasis, ef: int, audit: int, mask: Bool[Tensor, " n"]) -> Shortlist:
        """Of the graph of an index; see `Graph.open`."""
        return Shortlist(Graph.open(folder, fitted), ef, audit, mask)

    def __post_init__(self) -> None:
        self._all_chosen = torch.zeros_like(self.mask)

    def of(self, query_ids: Int[Tensor, " q"], solved: Float[Tensor, "q k"], stored: StoredRows) -> StoredRows:
        """The rows that some queries meet: those that the graph names for any of them, and those drawn at random.

        Args:
            query_ids: which queries.
            solved: their coordinates, float64.
            stored: all rows that count.
        """
        chosen = self.graph.candidates(solved, self.ef, self.mask)
        self._chosen = self.mask if chosen is None else chosen
        self._all_chosen |= self._chosen
        self._sizes.append((query_ids, self.graph.sizes(solved)))
        others = draw_audit(self.mask, self._chosen.nonzero().flatten(), self.audit)
        self._audited = max(self._audited, len(others))
        self._trials += len(others) * len(query_ids)
        mask = self._chosen.clone()
        mask[others] = True
        self._left = max(self._left, int(self.mask.sum() - mask.sum()))
        return replace(stored, mask=mask)

    def without_audited(
        self, query_ids: Int[Tensor, " q"], ids: Int[Tensor, " n"], values: Float[Tensor, "q n"]
    ) -> tuple[Int[Tensor, " c"], Float[Tensor, "q c"]]:
        """Those of a block of scores that are ranked; the others are kept to compare the lists with."""
        chosen = self._chosen[ids]
        self._aside.append((query_ids, values[:, ~chosen].double().cpu()))
        return ids[chosen], values[:, chosen]

    def note(self, values: Float[Tensor, "q m"], top: int, world: World) -> str:
        """What was looked at and what was missed, in words.

        Args:
            values: the products of every query's lists.
            top: how many an end has.
            world: the processes that shared the rows.
        """
        counted, chosen = int(self.mask.sum()), int(self._all_chosen.sum())
        if chosen == counted:
            return f"all {counted:,} examples that count were scanned: ef={self.ef:,} names no few of them"
        better = torch.tensor([sum(count_entering(values[q], some, top) for q, some in self._aside)])
        better = world.sum_into(better.double())
        since = int(self.mask[self.graph.record.stop :].sum())
        looked_at = f"the rows of {chosen:,} examples"
        looked_at += f", of which {since:,} came after the graph was built," if since else ""
        looked_at += f" that the graph named (ef={self.ef:,}) were scored as they are stored"
        recall = Recall(looked_at, self._audited, self._trials, int(better), self._left)
        return f"{recall}{self._about_left(values, top)}"

    def _about_left(self, values: Float[Tensor, "q m"], top: int) -> str:
        """What is known of the rows that are in no graph because they are small."""
        record, queries = self.graph.record, len(values)
        if not record.left:
            return ""
        sizes = torch.zeros(queries, dtype=torch.float64)
        for query_ids, some in self._sizes:
            sizes[query_ids] = some
        bounds = sizes * record.largest_left
        highest, lowest = ends_of(values, top)
        able = int(((highest < bounds) | (lowest > -bounds)).sum())
        which = (
            f"which could be in lists of {able:,} of {queries:,} queries" if able else "none of which can be in a list"
        )
        return f"; the graph leaves out the {record.left:,} smallest rows, {which}"

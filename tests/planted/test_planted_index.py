"""Bugs planted in what an index stores, masks, merges and compares: each must break its law."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
import torch

from pytorch_influence_functions.core.fingerprint import Fingerprint
from pytorch_influence_functions.store import TwoSided, build, codecs, graph, rerank
from pytorch_influence_functions.store.fitted_basis import FittedBasis
from pytorch_influence_functions.store.folder import IndexFolder
from pytorch_influence_functions.store.graph import Graph
from pytorch_influence_functions.store.layouts import ColumnLayout, FactorLayout
from pytorch_influence_functions.store.manifest import Manifest
from pytorch_influence_functions.store.search import Ranking, StoredRows
from tests.file_formats import test_index_store
from tests.laws import test_index, test_index_graph
from tests.planted.planting import Bug, must_be_noticed, swap


def in_a_folder(law: Callable[[Path], None]) -> Callable[[], None]:
    """The law in an empty folder of its own."""

    def check() -> None:
        with TemporaryDirectory() as folder:
            law(Path(folder))

    return check


def rounding(representation: Any, dtype: str, bound: float) -> Callable[[], None]:
    return in_a_folder(
        partial(test_index.test_numbers_of_every_type_are_off_by_their_rounding, representation, dtype, bound)
    )


def compared(folder: Path) -> None:
    with pytest.MonkeyPatch.context() as monkeypatch:
        test_index_store.test_every_example_is_compared_with_what_is_stored(folder, monkeypatch)


formula = in_a_folder(partial(test_index.test_projected_scores_are_the_explicit_formula, TwoSided(3), test_index.GGN()))
pieces = in_a_folder(test_index.test_batches_order_and_shards_do_not_matter)
extremes = in_a_folder(test_index.test_the_extremes_are_those_of_all_scores)
appended = in_a_folder(test_index.test_examples_can_be_added)
removed = in_a_folder(test_index.test_examples_can_be_removed)
missed = in_a_folder(test_index.test_what_the_first_stage_missed_is_bounded)
linked = in_a_folder(test_index_graph.test_after_the_graph_was_built_examples_come_and_go)
unnamed = in_a_folder(test_index_graph.test_what_a_poor_graph_missed_is_counted)
own = in_a_folder(test_index.test_every_query_may_have_its_own_candidates)
changed = in_a_folder(test_index_store.test_data_model_and_settings_that_changed_are_named)


def one_scale_for_all(original: Any, self: Any, rows: Any) -> Any:
    stored = original(self, rows)
    return stored | {codecs.SCALES: stored[codecs.SCALES].mean().expand(len(rows)).clone()}


def without_peaks(original: Any, self: Any, stored: Any, key: str, shape: Any) -> Any:
    return original(self, {k: v for k, v in stored.items() if not k.endswith(".peaks")}, key, shape)


def first_shard_forgotten(original: Any, self: Any, *some: Any) -> Any:
    yield from list(original(self, *some))[1:]


def without_its_last_column(original: Any, self: Any, damping: Any) -> Any:
    inverse, mean = original(self, damping)
    return torch.cat([inverse[:-1], inverse[-2:-1]]), mean


def without_those_that_came_later(original: Any, self: Any, solved: Any, ef: int, mask: Any) -> Any:
    chosen = original(self, solved, ef, mask)
    chosen[self.record.stop :] = False
    return chosen


def one_row_late(original: Any, self: Any, query_ids: Any, ids: Any, values: Any) -> Any:
    original(self, query_ids, ids, values.roll(1, 1))


def all_hashes_equal(original: Any, batch: Any, n: int) -> Any:
    return torch.zeros(n, dtype=torch.long)


def in_the_first_place(original: Any, self: Any, first: int, stop: int, *content: Any) -> Any:
    length = stop - first
    before = self.manifest.examples if len(self.manifest.parts) < 2 else 0
    return original(self, before, before + length, *content)


def first_for_all(original: Any, self: Any) -> Any:
    values, indices = original(self)
    return values, indices[:1].expand(len(indices), -1)


BUGS = [
    Bug(
        "one scale for all rows of int8",
        swap(codecs.Int8, "encode", one_scale_for_all),
        rounding(TwoSided(3), "int8", 3e-2),
    ),
    Bug(
        "scales of int8 left out of products",
        swap(codecs, "integer_products", lambda f, rows, q: f(rows, q) * torch.linspace(0.5, 1.5, len(rows))),
        rounding(TwoSided(3), "int8", 3e-2),
    ),
    Bug(
        "columns not multiplied back",
        swap(ColumnLayout, "ready", lambda f, self, solved: solved.float()),
        rounding(TwoSided(3), "float16", 2e-3),
    ),
    Bug(
        "peaks of float16 factors lost",
        swap(FactorLayout, "_decode_tensor", without_peaks),
        rounding(test_index.Factors(), "float16", 2e-3),
    ),
    Bug("an eigenvalue in another's place", swap(FittedBasis, "inverse", without_its_last_column), formula),
    Bug("a shard is not scanned", swap(StoredRows, "parts", first_shard_forgotten), pieces),
    Bug("scores one row late", swap(Ranking, "add", one_row_late), formula),
    Bug("one too few at each end", swap(Ranking, "result", lambda f, self: tuple(t[:, 1:] for t in f(self))), extremes),
    Bug("removed examples still count", swap(Manifest, "mask", lambda f, self: torch.ones(self.examples) > 0), removed),
    Bug("appended under the numbers of others", swap(IndexFolder, "write_shard", in_the_first_place), appended),
    Bug("every query gets the first one's candidates", swap(Ranking, "result", first_for_all), own),
    Bug("digests that are all equal", swap(build, "hash_examples", all_hashes_equal), in_a_folder(compared)),
    Bug("a fingerprint that sees no change", swap(Fingerprint, "differences", lambda f, *some, **more: []), changed),
    Bug("later examples not looked at", swap(Graph, "candidates", without_those_that_came_later), linked),
    Bug("rows of others not counted", swap(graph, "count_entering", lambda f, values, audited, top: 0), unnamed),
    Bug("audited scores not counted", swap(rerank, "count_entering", lambda f, values, audited, top: 0), missed),
]


@pytest.mark.parametrize("bug", BUGS, ids=lambda bug: bug.name)
def test_a_planted_bug_breaks_its_law(bug: Bug, monkeypatch: pytest.MonkeyPatch) -> None:
    must_be_noticed(bug, monkeypatch)

"""A graph of nearest neighbours names candidates: against the scan of all rows, whose scores and lists it must give."""

from __future__ import annotations

import json
import re
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import pytorch_influence_functions as ptif
from pytorch_influence_functions.core.errors import InvalidInput, MissingExtra
from pytorch_influence_functions.core.files import write_bytes
from pytorch_influence_functions.store import Factors, TwoSided, graph
from pytorch_influence_functions.store.manifest import MANIFEST
from tests.tolerance import gap

N, K, EF = 900, 5, 60


def problem_of(n: int = N) -> tuple[ptif.Problem, tuple[Tensor, Tensor]]:
    """Examples of very different sizes, as those of a fitted network are."""
    g = torch.Generator().manual_seed(0)
    x, y = torch.randn(n, 6, generator=g), torch.arange(n) % 3
    x *= torch.rand(n, 1, generator=g) ** 4
    model = nn.Sequential(nn.Linear(6, 5, bias=False), nn.Tanh(), nn.Linear(5, 3, bias=False))
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn(p.shape, generator=g))
    queries = torch.randn(12, 6, generator=g), torch.arange(12) % 3
    return ptif.Problem(model, ptif.CrossEntropy(), (x, y)), queries


def built(folder: Path, problem: ptif.Problem, links: int = 8, ef: int = 40, **settings: Any) -> ptif.Index:
    index = ptif.Index.build(problem, folder, **{"representation": TwoSided(3), "shard": 9000} | settings)
    return index.build_graph(links, ef)


def note_of(scores: ptif.Scores) -> str:
    return scores.diagnostics.notes[-1].replace(",", "")


def share_named(exact: ptif.Scores, scores: ptif.Scores) -> float:
    """Of the examples at both ends of every ranking."""
    return float((exact.indices[:, :, None] == scores.indices[:, None]).any(2).double().mean())


@pytest.mark.parametrize("dtype", ["float32", "int8"])
@pytest.mark.parametrize("damping", [None, 1e-4, 1.0])
def test_both_ends_are_named_and_have_the_scores_of_the_scan(damping: Any, dtype: str, tmp_path: Path) -> None:
    """Whatever the damping: the graph is that of the index's own."""
    problem, queries = problem_of()
    index = ptif.Index.open(built(tmp_path / "i", problem, dtype=dtype).folder.path, problem.model)
    every = index.score(queries, damping=damping).values
    exact = index.score(queries, top=K, damping=damping)
    scores = index.score(queries, top=K, damping=damping, ef=EF)
    assert scores.shape == (12, 2 * K) and gap(scores.values, every.gather(1, scores.indices)) < 1e-6
    assert share_named(exact, scores) > 0.95
    (looked_at,) = re.findall(r"the rows of (\d+) examples that the graph named \(ef=60\)", note_of(scores))
    assert 2 * EF <= int(looked_at) < N
    everything = index.score(queries, top=K, damping=damping, ef=N)
    assert torch.equal(everything.indices, exact.indices) and torch.equal(everything.values, exact.values)
    assert note_of(everything) == "all 900 examples that count were scanned: ef=900 names no few of them"


def test_candidates_that_cover_the_graph_give_the_lists_of_the_scan(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The rows that are left out of it can be in no list, as the note says."""
    monkeypatch.setattr(graph, "_MOST", 1)
    problem, queries = problem_of()
    index = built(tmp_path, problem, 32, 200)
    record = index.folder.manifest.graph
    assert record is not None and 100 < record.left < 700
    exact, scores = index.score(queries, top=K), index.score(queries, top=K, ef=400)
    assert torch.equal(scores.indices, exact.indices) and gap(scores.values, exact.values) < 1e-6
    assert note_of(scores).endswith(f"the {record.left} smallest rows none of which can be in a list")
    # A list of nearly all examples has some of the small ones.
    many = note_of(index.score(queries, top=400, ef=400))
    assert many.endswith(f"the {record.left} smallest rows which could be in lists of 12 of 12 queries")


def test_what_a_poor_graph_missed_is_counted(tmp_path: Path) -> None:
    """By hand, from the scores of all: with every other example drawn, all that is missed."""
    problem, queries = problem_of()
    index = built(tmp_path, problem, links=4, ef=2)
    every, scores = index.score(queries).values.double(), index.score(queries, top=K, ef=K, audit=N)
    high, low = scores.values[:, K - 1 : K].double(), scores.values[:, K][:, None].double()
    missed = int((every > high).sum() + (every < low).sum()) - 2 * 12 * (K - 1)
    (told,) = re.findall(r"of all \d+ other examples (\d+) of \d+ scores would have entered", note_of(scores))
    assert int(told) == missed > 0


def test_after_the_graph_was_built_examples_come_and_go(tmp_path: Path) -> None:
    problem, queries = problem_of()
    index = built(tmp_path, problem)
    best = index.score(queries, top=K, ef=EF).indices.unique()
    x, y = problem.data.dataset.tensors
    index = index.append((x[best] + 0.01, y[best])).remove(best)
    for compacted in (False, True):
        index = index.compact() if compacted else index
        scores, exact = index.score(queries, top=K, ef=EF), index.score(queries, top=K)
        assert not torch.isin(scores.indices, best).any() and bool((scores.indices >= N).any())
        assert share_named(exact, scores) > 0.9
        assert f"of which {len(best)} came after the graph was built" in note_of(scores)
    anew = index.build_graph(8, 40)
    assert "came after" not in note_of(anew.score(queries, top=K, ef=EF))
    assert len(list(tmp_path.glob("graph-*"))) == 1


def test_filters_and_exact_scores_of_candidates(tmp_path: Path) -> None:
    problem, queries = problem_of()
    index = built(tmp_path, problem)
    for chosen in ({"where": lambda y: y != 1}, {"ids": slice(0, 600)}):
        scores, exact = index.score(queries, top=K, ef=EF, **chosen), index.score(queries, top=K, **chosen)
        assert share_named(exact, scores) > 0.95 and "the graph named" in note_of(scores)
    few = index.score(queries, top=K, ef=EF, ids=range(0, N, 30))
    assert torch.equal(few.indices, index.score(queries, top=K, ids=range(0, N, 30)).indices)
    assert note_of(few).startswith("all 30 examples that count were scanned")
    reranked = index.score(queries, top=3, ef=EF, rerank=20)
    live = ptif.ekfac().fit(problem).score(queries).values
    assert gap(reranked.values, live.gather(1, reranked.indices)) < 1e-4
    assert "of the index" in note_of(reranked) and "the graph named" in reranked.diagnostics.notes[-2]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"ef": 10},
            r"asks a graph for the ends of a ranking by whole scores, and no top= was asked for; write top=10",
        ),
        ({"ef": 10, "top": 3, "normalised": True}, r"and normalised=True was asked for; write top=10, ef=10 without"),
        ({"ef": 10, "top": 3, "by": "layer"}, r"and by= was asked for"),
        ({"ef": 10, "top": 1, "ids": [[1]] * 12}, r"and a list of ids= for each query was asked for"),
        ({"ef": 2, "top": 3}, r"ef=2 must be a whole number of at least 3; it is how many candidates"),
        ({"ef": 3, "top": 3, "audit": -1}, r"audit=-1 must be a whole number of at least 0"),
        (
            {"ef": 3, "top": 3},
            r"ef= asks a graph of nearest neighbours, and the index in .* has none; make it once with",
        ),
    ],
)
def test_what_a_graph_cannot_be_asked(settings: dict[str, Any], message: str, tmp_path: Path) -> None:
    problem, queries = problem_of(30)
    index = ptif.Index.build(problem, tmp_path / "i", representation=TwoSided(2))
    with pytest.raises(InvalidInput, match=message):
        index.score(queries, **settings)


def test_a_graph_that_cannot_be_made_or_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    problem, queries = problem_of(200)
    with pytest.raises(
        InvalidInput, match=r"this index keeps Factors\(\); build one with representation=Sketch\(1024\)"
    ):
        ptif.Index.build(problem, tmp_path / "f", representation=Factors()).build_graph()
    index = built(tmp_path / "i", problem)
    for wrong, message in (
        ({"links": 1}, r"links=1 must be a whole number of at least 2"),
        ({"ef": 0}, r"ef=0 must be"),
    ):
        with pytest.raises(InvalidInput, match=message):
            index.build_graph(**wrong)
    record = index.folder.manifest.graph
    assert record is not None
    stale = replace(index.folder.manifest, graph=replace(record, rows="of others"))
    with pytest.raises(
        InvalidInput, match=r"was built on other rows than are stored; make it again with index.build_gra"
    ):
        replace(index, folder=replace(index.folder, manifest=stale)).score(queries, top=3, ef=5)
    path = tmp_path / "i" / record.file.name
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    write_bytes(path, bytes(content))
    opened = ptif.Index.open(tmp_path / "i", problem)
    for ask in (lambda: opened.score(queries, top=3, ef=5), opened.folder.check_all):
        with pytest.raises(InvalidInput, match=r"is damaged: its contents are not those that were written"):
            ask()
    (tmp_path / "i" / "graph-unlisted.faiss").write_bytes(b"what a killed process left")
    again = opened.build_graph(8, 40)
    assert len(list((tmp_path / "i").glob("graph-*"))) == 1 and again.score(queries, top=3, ef=5).shape == (12, 6)
    monkeypatch.setitem(sys.modules, "faiss", None)
    for ask in (again.build_graph, lambda: again.score(queries, top=3, ef=5)):
        with pytest.raises(MissingExtra, match=r"needs faiss: pip install 'pytorch-influence-functions\[ann\]'"):
            ask()
    built_anew = ptif.Index.build(problem, tmp_path / "i", representation=TwoSided(2), overwrite=True)
    assert built_anew.folder.manifest.graph is None and not list((tmp_path / "i").glob("graph-*"))
    assert "graph" not in json.loads((tmp_path / "i" / MANIFEST).read_text())

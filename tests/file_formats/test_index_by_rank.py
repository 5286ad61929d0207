"""An index that several processes build and ask together is the one that a single process builds."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import pytorch_influence_functions as ptif
from pytorch_influence_functions.store import Factors, TwoSided, graph
from pytorch_influence_functions.store.manifest import MANIFEST
from tests.laws.several import message_of, run_on

# Projected gradients of ROWS examples fill a file.
N, ROWS = 41, 6
KEPT = {"factors": Factors(), "projected": TwoSided(3)}
queries = torch.linspace(-1, 1, 18, dtype=torch.float64).reshape(3, 6), torch.tensor([0, 2, 1])


def problem_of(train: Any = None) -> ptif.Problem:
    g = torch.Generator().manual_seed(0)
    x, y = torch.randn(N, 6, generator=g, dtype=torch.float64), torch.arange(N) % 3
    model = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3)).double()
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn(p.shape, generator=g) / 3)
    return ptif.Problem(model, nn.CrossEntropyLoss(), (x, y) if train is None else train)


def build(folder: Path, kept: str = "projected", **settings: Any) -> ptif.Index:
    asked = {"representation": KEPT[kept], "dtype": "float64", "shard": 1000}
    return ptif.Index.build(problem_of(), folder, **asked | settings)


def answers(index: ptif.Index) -> dict[str, Tensor]:
    top = index.score(queries, top=4)
    assert top.indices is not None
    exact = index.score(queries, top=2, rerank=5, audit=3)
    return {
        "all": index.score(queries).values,
        "top": top.values,
        "top, examples": top.indices,
        "normalised, some": index.score(queries, normalised=True, where=lambda y: y > 0).values,
        "each its own": index.score(queries, ids=[[0, 40], [7, 8], [39, 3]]).values,
        "of itself": index.self_influence(),
        "reranked": exact.values,
        "labels": torch.as_tensor(top.train_labels),
    }


def stream(shards: int | None = None) -> Iterator[Any]:
    """The data, one by one; they break off before more than so many shards are read."""
    for i, example in enumerate(zip(*problem_of().data.dataset.tensors, strict=True)):
        if shards is not None and i >= shards * ROWS:
            raise OSError("the disk is gone")
        yield example


def by_graph(folder: Path) -> Tensor:
    """Scores of what a graph names, however few there are in all."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(graph, "_MOST", 1)
        index = ptif.Index.open(folder, problem_of())
        index = index if index.folder.manifest.graph else index.build_graph()
        scores = index.score(queries, top=2, ef=9, audit=5)
    assert "that the graph named (ef=9)" in scores.diagnostics.notes[-1]
    return scores.values


def program(rank: int, folder: Path) -> dict[str, Any]:
    told: dict[str, Any] = {}
    with ptif.distributed(timeout=600):
        for kept in KEPT:
            told[kept] = answers(build(folder / kept, kept))
        reopened = ptif.Index.open(folder / "projected", problem_of())
        told["opened"] = answers(reopened)
        x, y = queries
        told["appended"] = reopened.append((x, y)).remove([3, 17]).compact().score(queries).values
        told["goes on"] = build(folder / "of one", data=stream()).score(queries).values
        told["by graph"] = by_graph(folder / "projected")
        told["failed"] = message_of(lambda: build(folder / "of two", data=stream(5 if rank == 1 else None)))
    with ptif.distributed(timeout=600):
        told["elsewhere"] = message_of(lambda: build(folder / f"of {rank}"))
    return told


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("shared")


@pytest.fixture(scope="module")
def told(folder: Path) -> list[dict[str, Any]]:
    """What each of two processes gave; one process has begun a build in "of one"."""
    assert "the disk is gone" in message_of(lambda: build(folder / "of one", data=stream(3)))
    return run_on(2, program, folder / "processes", folder)


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> dict[str, ptif.Index]:
    folder = tmp_path_factory.mktemp("alone")
    return {kept: build(folder / kept, kept) for kept in KEPT}


def test_two_processes_give_the_index_and_the_answers_of_one(
    told: list[dict[str, Any]], folder: Path, alone: dict[str, ptif.Index]
) -> None:
    for kept, index in alone.items():
        shared = ptif.Index.open(folder / kept, problem_of())
        if kept == "factors":
            assert [(s.first, s.stop) for s in shared.folder.manifest.shards] == [
                (s.first, s.stop) for s in index.folder.manifest.shards
            ]
            shared.folder.check_all()
        expected = answers(index)
        for rank in told:
            for name, values in expected.items():
                torch.testing.assert_close(rank[kept][name], values, rtol=1e-6, atol=1e-9, msg=f"{kept}, {name}")
    for rank in told:
        for name, values in told[0]["projected"].items():
            torch.testing.assert_close(rank["opened"][name], values, rtol=1e-9, atol=1e-12)


def test_examples_are_added_and_removed_together(told: list[dict[str, Any]], folder: Path, tmp_path: Path) -> None:
    expected = build(tmp_path).append(queries).remove([3, 17]).compact().score(queries)
    for rank in told:
        torch.testing.assert_close(rank["appended"], expected.values, rtol=1e-6, atol=1e-9)
        torch.testing.assert_close(rank["by graph"], by_graph(folder / "projected"), rtol=1e-6, atol=1e-9)


def test_a_build_that_was_left_goes_on_with_another_number_of_processes(
    told: list[dict[str, Any]], folder: Path, alone: dict[str, ptif.Index]
) -> None:
    expected = alone["projected"].score(queries).values
    for rank in told:
        torch.testing.assert_close(rank["goes on"], expected, rtol=1e-6, atol=1e-9)
    # Process 1 failed in the third round: what both wrote in the first two counts, and both say why they end.
    assert "Process 1 of 2 failed, and all stop with it: OSError: the disk is gone" in told[0]["failed"]
    assert "OSError: the disk is gone" in told[1]["failed"]
    left = folder / "of two"
    listed = [shard["name"] for shard in json.loads((left / MANIFEST).read_text())["shards"]]
    times = {name: (left / name).stat().st_mtime_ns for name in listed}
    assert len(listed) == 4 and not (left / ".lock").exists()
    index = build(left, data=stream())
    torch.testing.assert_close(index.score(queries).values, expected, rtol=1e-6, atol=1e-9)
    assert {name: (left / name).stat().st_mtime_ns for name in listed} == times
    assert len(index.folder.manifest.shards) == -(-N // ROWS) > 6


def test_a_folder_that_not_all_of_them_see_is_refused(told: list[dict[str, Any]]) -> None:
    sentence = "Process 1 does not find in"
    assert sentence in told[1]["elsewhere"] and "give every process the same folder" in told[1]["elsewhere"]
    assert f"Process 1 of 2 failed, and all stop with it: InvalidInput: {sentence}" in told[0]["elsewhere"]

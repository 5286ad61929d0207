"""Queries that together have no room in memory share one pass over the training data all the same."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import pytorch_influence_functions as ptif
from pytorch_influence_functions.curvature import EKFAC, GGN
from pytorch_influence_functions.curvature.base import Budget
from pytorch_influence_functions.influence import fitted_member
from pytorch_influence_functions.influence.scoring import TrainingStream
from pytorch_influence_functions.linalg import on_disk
from pytorch_influence_functions.solvers import CG, Truncation
from tests.tiny_lm import TinyLM, loader, texts


@pytest.fixture
def passes(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many queries each pass over the training data took."""
    counted: list[int] = []
    original = TrainingStream._by_rows
    monkeypatch.setattr(TrainingStream, "_by_rows", lambda self: counted.append(len(self.solved)) or original(self))
    return counted


def problem_of(tied: bool = False) -> tuple[ptif.Problem, Any]:
    torch.manual_seed(0)
    model = TinyLM(tied).double()
    return ptif.Problem(model, ptif.TokenCrossEntropy(shift=True), loader(texts(10))), loader(texts(7, seed=1))


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("pieces", [1, 1 << 27])
def test_scores_of_queries_on_disk_are_those_in_memory(
    tied: bool, pieces: int, passes: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    problem, queries = problem_of(tied)
    attribution = ptif.ekfac().fit(problem)
    want, best = attribution.score(queries).values, attribution.score(queries, top=2)
    monkeypatch.setattr(on_disk, "_READ", pieces)
    monkeypatch.setattr(fitted_member.FittedMember, "room", lambda self, budget: 2)
    torch.testing.assert_close(attribution.score(queries).values, want, rtol=1e-10, atol=1e-14)
    top = attribution.score(queries, top=2)
    torch.testing.assert_close(top.values, best.values, rtol=1e-10, atol=1e-14)
    assert passes == [7, 7, 7, 7]


def test_the_folder_is_gone_afterwards(monkeypatch: pytest.MonkeyPatch) -> None:
    problem, queries = problem_of()
    attribution = ptif.ekfac().fit(problem)
    monkeypatch.setattr(fitted_member.FittedMember, "room", lambda self, budget: 2)
    places: list[Any] = []
    original = fitted_member.QueryStore.rows
    monkeypatch.setattr(
        fitted_member.QueryStore, "rows", lambda self: places.append(self.folder.path) or original(self)
    )
    attribution.score(queries)
    assert len(places) == 1 and not places[0].exists()


def test_a_disk_without_room_costs_more_passes_and_nothing_else(
    passes: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    problem, queries = problem_of()
    attribution = ptif.ekfac().fit(problem)
    want = attribution.score(queries).values
    monkeypatch.setattr(fitted_member.FittedMember, "room", lambda self, budget: 2)
    monkeypatch.setattr("shutil.disk_usage", lambda path: type("usage", (), {"free": 10}))
    torch.testing.assert_close(attribution.score(queries).values, want, rtol=1e-10, atol=1e-14)
    assert passes == [7, 2, 2, 2, 1]


def test_truncated_queries_are_taken_whole(passes: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    problem, queries = problem_of()
    spec = ptif.Influence(EKFAC(), damping=1e-3, truncation=Truncation(rank=2))
    want = spec.fit(problem).score(queries).values
    monkeypatch.setattr(fitted_member.FittedMember, "room", lambda self, budget: 2)
    torch.testing.assert_close(spec.fit(problem).score(queries).values, want, rtol=1e-8, atol=1e-12)
    assert passes == [7, 2, 2, 2, 1]


def test_gradients_that_stay_in_factors_are_counted_as_such() -> None:
    """A gradient dot product holds the factors of a query, and not a vector as long as the model."""
    problem, _ = problem_of()
    member = ptif.methods.grad_dot().fit(problem).members[0]
    numbers = member.derivatives.numbers
    assert numbers != problem.space.size
    assert member.room(Budget(int(numbers) * 8 * 10)) == 9


def test_memory_that_the_curvature_leaves_is_for_the_queries() -> None:
    torch.manual_seed(0)
    model = nn.Linear(20, 10)
    problem = ptif.Problem(model, ptif.CrossEntropy(), (torch.randn(30, 20), torch.randint(0, 10, (30,))))
    member = ptif.Influence(EKFAC(GGN())).fit(problem).members[0]
    held = 4 * (10 * 10 + 21 * 21) + 4 * 2 * 210
    assert member.room(Budget(held + 210 * 4 * 10)) == 9
    guided = ptif.Influence(GGN(), CG()).fit(problem).members[0]
    # What is held beside each answer is an estimate: a quarter of the memory is for both.
    assert guided.room(Budget(210 * 4 * (1 + CG().vectors_held) * 10 * 4)) == 10

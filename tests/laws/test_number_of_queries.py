"""Law: a query's scores do not depend on how many others are asked beside it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import pytorch_influence_functions as ptif
from tests.tolerance import gap

Made = tuple[nn.Module, tuple[Tensor, Tensor], tuple[Tensor, Tensor]]


def made(layers: Callable[[], nn.Module], inputs: int, n: int) -> Made:
    torch.manual_seed(0)
    x, y = torch.randn(n + 60, inputs), torch.arange(n + 60) % 3
    x[:, 0] += 2 * y
    model = layers()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    for _ in range(30):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x[:n]), y[:n]).backward()
        optimizer.step()
    return model, (x[:n], y[:n]), (x[n:], y[n:])


PROBLEMS: dict[str, Callable[[], Made]] = {
    "dense": lambda: made(lambda: nn.Linear(5, 3), 5, 60),
    "dual": lambda: made(lambda: nn.Sequential(nn.Linear(300, 8), nn.Tanh(), nn.Linear(8, 3)), 300, 40),
    "convex": lambda: made(lambda: nn.Linear(800, 3), 800, 700),
    "network": lambda: made(lambda: nn.Sequential(nn.Linear(300, 32), nn.ReLU(), nn.Linear(32, 3)), 300, 3000),
}


def first(made: Made, count: int, **options: Any) -> ptif.Scores:
    model, train, queries = made
    return ptif.attribute(model, train, (queries[0][:count], queries[1][:count]), loss=nn.CrossEntropyLoss(), **options)


@pytest.mark.parametrize("name", ["dense", "dual", pytest.param("convex", marks=pytest.mark.slow), "network"])
def test_a_query_has_the_same_scores_whatever_is_asked_beside_it(name: str) -> None:
    problem = PROBLEMS[name]()
    asked = {count: first(problem, count) for count in (1, 11, 12, 60)}
    alone = asked[1]
    for count, scores in asked.items():
        assert scores.values.shape[0] == count
        # Iterative solves stop at a residual of 1e-3.
        assert gap(scores.values[0], alone.values[0]) < 5e-3, (name, count)
        assert scores.diagnostics.damping == pytest.approx(alone.diagnostics.damping, rel=1e-4)
    assert gap(asked[60].values[:12], asked[12].values) < 5e-3


def test_nor_along_a_run() -> None:
    problem = PROBLEMS["network"]()
    states = [{k: v * s for k, v in problem[0].state_dict().items()} for s in (0.5, 1.0)]
    one, many = (first(problem, count, run=states) for count in (1, 60))
    assert gap(one.values[0], many.values[0]) < 1e-4

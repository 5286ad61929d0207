"""Fitted methods that follow a run by themselves answer alike, alone and shared over processes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from torch import Tensor, nn

import pytorch_influence_functions as ptif
from pytorch_influence_functions.core.errors import InvalidInput
from pytorch_influence_functions.methods import less, unrolled
from pytorch_influence_functions.problem.checkpoints import load_checkpoint
from pytorch_influence_functions.trajectory import SOURCE, Recording
from tests.laws.several import run_on
from tests.laws.test_influence import relative_gap
from tests.laws.test_selection import data, recorded
from tests.laws.test_unrolled import OPTIMIZERS, Run


def fit_all(folder: Path) -> list[tuple[Any, Any]]:
    """Every such method, fitted to what `recorded` wrote, with queries."""
    run = Recording.open(folder)
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).double()
    model.load_state_dict(load_checkpoint(run.checkpoints[-1]))
    x, y, *queries = data()
    problem = ptif.Problem(model, ptif.CrossEntropy(), (x, y))
    short = Run(OPTIMIZERS["momentum, dampening and decay"])
    of_run = unrolled(short.replay, least_smoothness=-1).fit(short.problem())
    methods = (less(run), SOURCE(run.segments(2)))
    return [*((method.fit(problem), tuple(queries)) for method in methods), (of_run, short.queries)]


def answers(fitted: Any, queries: Any) -> list[Tensor]:
    top = fitted.score(queries, top=2)
    return [fitted.score(queries).values, top.values, top.indices.double(), fitted.self_influence()]


def shared(rank: int, folder: Path) -> list[list[Tensor]]:
    with ptif.distributed():
        return [answers(*one) for one in fit_all(folder)]


def test_two_processes_give_what_one_gives(tmp_path: Path) -> None:
    recorded(tmp_path / "run")
    alone = [answers(*one) for one in fit_all(tmp_path / "run")]
    for found in run_on(2, shared, tmp_path / "processes", tmp_path / "run"):
        for want, have in zip(alone, found, strict=True):
            assert all(relative_gap(b, a) < 1e-6 for a, b in zip(want, have, strict=True))


def test_parts_are_told_apart_where_they_can_be(tmp_path: Path) -> None:
    recorded(tmp_path)
    of_less, of_source, of_run = fit_all(tmp_path)
    parts = of_source[0].score(of_source[1], by="layer")
    whole = of_source[0].score(of_source[1]).values
    assert relative_gap(sum(s.values.double() for s in parts.values()), whole) < 1e-6
    for fitted, queries in (of_less, of_run):
        with pytest.raises(InvalidInput, match="takes no by="):
            fitted.score(queries, by="layer")

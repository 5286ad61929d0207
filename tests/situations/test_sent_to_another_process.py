"""A fitted method is kept or sent to another process: it is pickled with its model and data, and answers there."""

from __future__ import annotations

import pickle
from typing import Any

import pytest
import torch
from torch import nn

import pytorch_influence_functions as ptif
from pytorch_influence_functions import curvature, solvers
from pytorch_influence_functions.actions import what_if
from pytorch_influence_functions.core.errors import InvalidInput

X, Y = torch.randn(24, 4, generator=torch.Generator().manual_seed(0)), torch.arange(24) % 3
QUERIES, LOSS = (X[:2], Y[:2]), nn.CrossEntropyLoss()
METHODS: dict[str, Any] = {
    "exact": ptif.exact(),
    "dual": ptif.dual(),
    "ekfac": ptif.ekfac(),
    "trak": ptif.trak(k=8),
    "gauss_newton": ptif.gauss_newton(),
    "hessian": ptif.Influence(curvature.Hessian(), solvers.CG(), damping=0.5),
    "empirical fisher": ptif.Influence(curvature.EmpiricalFisher(), solvers.CG(), damping=0.1),
}


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3))


@pytest.mark.parametrize("name", METHODS)
def test_a_fitted_method_answers_alike_after_pickling(name: str) -> None:
    model = net()
    fitted = METHODS[name].fit(ptif.Problem(model, LOSS, (X, Y)))
    for one in (fitted, fitted.with_damping(0.7)):
        other = pickle.loads(pickle.dumps(one))
        torch.testing.assert_close(other.score(QUERIES).values, one.score(QUERIES).values)
    with torch.no_grad():
        model[0].weight.mul_(2)
    assert other.score(QUERIES).shape == (2, 24), "it has the model of then"
    with pytest.raises(InvalidInput, match="weights have changed"):
        fitted.score(QUERIES)


def test_checkpoints_and_predicted_edits_too() -> None:
    problem = ptif.Problem(net(), LOSS, (X, Y))
    edit = what_if(ptif.exact().fit(problem), remove=[0, 5])
    again = pickle.loads(pickle.dumps(edit))
    torch.testing.assert_close(again.change(QUERIES), edit.change(QUERIES))
    along = ptif.ekfac().fit(problem.with_(checkpoints=[net().state_dict()] * 3))
    other = pickle.loads(pickle.dumps(along))
    torch.testing.assert_close(other.score(QUERIES).values, along.score(QUERIES).values)

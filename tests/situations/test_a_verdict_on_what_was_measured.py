"""Scores of another measure than the loss are checked by retraining, without saying again what was measured."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import pytorch_influence_functions as ptif
from pytorch_influence_functions.core.errors import InvalidInput

X = torch.randn(30, 3, generator=torch.Generator().manual_seed(0)).double()
Y = (X.sum(1) + 0.5 * torch.randn(30, generator=torch.Generator().manual_seed(1)).double())[:, None]


def fit_ridge(data: Any, seed: int) -> nn.Module:
    """The minimum of the mean squared error with a little weight decay, in closed form."""
    examples = [data[i] for i in range(len(data))]
    x, y = torch.stack([e[0] for e in examples]), torch.stack([e[1] for e in examples])
    model = nn.Linear(3, 1, bias=False).double()
    solution = torch.linalg.solve(x.T @ x / len(x) + 0.01 * torch.eye(3).double(), x.T @ y / len(x))
    model.weight.data = solution.T
    return model


def prediction(outputs: Tensor, targets: Tensor) -> Tensor:
    return outputs.flatten()


def test_the_measure_of_the_scores_is_measured() -> None:
    train, queries = torch.utils.data.TensorDataset(X, Y), (X[:4] + 1.0, Y[:4])
    scores = ptif.attribute(
        fit_ridge(train, 0), train, queries, loss=nn.MSELoss(), measure=prediction, method="exact", weight_decay=0.02
    )
    verdict = scores.verify(fit_ridge, n=6, size=1, seeds=1)
    model = fit_ridge(train, 0)
    for removal in verdict.removals:
        left = torch.utils.data.Subset(train, [i for i in range(30) if i not in removal.ids])
        x = queries[0][removal.query : removal.query + 1]
        change = (prediction(fit_ridge(left, 0)(x), x) - prediction(model(x), x)).detach()
        assert abs(removal.actual - float(change[0])) < 1e-9
    assert verdict.r.value > 0.9


def test_a_function_that_trains_needs_no_measure() -> None:
    train, queries = torch.utils.data.TensorDataset(X, Y), (X[:4] + 1.0, Y[:4])
    scores = ptif.attribute(fit_ridge(train, 0), train, queries, loss=F.mse_loss, method="exact")
    assert len(scores.verify(fit_ridge, n=6, size=1, seeds=1).removals) == 6


def test_methods_are_compared_with_a_truth_only() -> None:
    with pytest.raises(InvalidInput, match=r"truth from retraining, got NoneType; make one with .*retrain"):
        ptif.evaluate(torch.randn(2, 5), None)  # type: ignore[arg-type]

"""Forces and physics: forward differentiates by itself, and nobody wrote `enable_grad` around it."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import pytorch_influence_functions as ptif
from tests.oracles.autograd import example_gradients
from tests.tolerance import gap, rounding


class Forces(nn.Module):
    """Minus the slope of an energy."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.energy = nn.Sequential(nn.Linear(3, 6), nn.Tanh(), nn.Linear(6, 1))

    def forward(self, x: Tensor) -> Tensor:
        x = x.clone().requires_grad_(True)
        return -torch.autograd.grad(self.energy(x).sum(), x, create_graph=True)[0]


class ForcesOfWhatWasGiven(Forces):
    """The same, of the positions themselves, marked where nobody has marked them."""

    def forward(self, x: Tensor) -> Tensor:
        x = x if x.requires_grad else x.requires_grad_()
        with torch.enable_grad():
            return -torch.autograd.grad(self.energy(x).sum(), x, create_graph=True)[0]


class Residual(Forces):
    """What is left of u'' + u = f, for a network u."""

    def forward(self, x: Tensor) -> Tensor:
        x = x.detach().requires_grad_()
        u = self.energy(x)
        slope = torch.autograd.grad(u.sum(), x, create_graph=True)[0]
        return torch.autograd.grad(slope.sum(), x, create_graph=True)[0].sum(1, keepdim=True) + u


X = torch.randn(12, 3, generator=torch.Generator().manual_seed(0)).double()


@pytest.mark.parametrize("kind", [Forces, ForcesOfWhatWasGiven, Residual])
def test_scores_are_those_of_autograd(kind: type[Forces]) -> None:
    model = kind().double()
    y = torch.randn(12, 1 if kind is Residual else 3, generator=torch.Generator().manual_seed(1)).double()
    data, queries = (X, y), (X[:3], y[:3])
    scores = ptif.attribute(model, data, queries, loss=nn.MSELoss(), method="grad_dot")
    rows = example_gradients(model, F.mse_loss, X.clone(), y)
    assert gap(scores.values, rows[:3] @ rows.T / 12) < rounding(torch.float64, 100)
    for method in (None, "ekfac", "dual"):
        assert torch.isfinite(ptif.attribute(model, data, queries, loss=nn.MSELoss(), method=method).values).all()
    problem = ptif.Problem(model, nn.MSELoss(), data)
    assert torch.isfinite(ptif.what_if(problem, remove=[0]).change(queries)).all()

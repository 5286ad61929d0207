"""Activations are recomputed in the backward pass: `torch.utils.checkpoint`, both kinds."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils import checkpoint

import pytorch_influence_functions as ptif
from tests.oracles.autograd import dense_ggn, example_gradients
from tests.tolerance import gap, rounding

X, Y = torch.randn(20, 4, generator=torch.Generator().manual_seed(0)).double(), torch.arange(20) % 3
TRAIN, QUERIES = (X[:16], Y[:16]), (X[16:], Y[16:])


class Recomputing(nn.Module):
    """A body whose activations are not kept."""

    def __init__(self, reentrant: bool | None) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.reentrant = reentrant
        self.first, self.body, self.head = nn.Linear(4, 4), nn.Sequential(nn.Tanh(), nn.Linear(4, 4)), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.first(x)
        if self.reentrant is None:
            return self.head(self.body(hidden))
        return self.head(checkpoint.checkpoint(self.body, hidden, use_reentrant=self.reentrant))


@pytest.mark.parametrize("reentrant", [False, True])
def test_every_route_is_that_of_the_model_that_keeps_them(reentrant: bool) -> None:
    model, plain = Recomputing(reentrant).double(), Recomputing(None).double()
    function = checkpoint.CheckpointFunction
    rows = [example_gradients(plain, F.cross_entropy, *data) for data in (QUERIES, TRAIN)]
    curvature = dense_ggn(plain, F.cross_entropy, *TRAIN) + 0.1 * torch.eye(rows[0].shape[1]).double()
    expected = rows[0] @ torch.linalg.solve(curvature, rows[1].T) / 16
    methods = {
        "dense": ptif.exact(ptif.curvature.GGN(), damping=0.1),
        "products": ptif.gauss_newton(damping=0.1, rtol=1e-12, preconditioner=None),
        "dual": ptif.dual(ptif.curvature.GGN(), damping=0.1),
    }
    for name, method in methods.items():
        values = ptif.attribute(model, TRAIN, QUERIES, loss=nn.CrossEntropyLoss(), method=method).values
        assert gap(values, expected) < rounding(torch.float64, 1e4), name
    dots = ptif.attribute(model, TRAIN, QUERIES, loss=nn.CrossEntropyLoss(), method="grad_dot").values
    assert gap(dots, rows[0] @ rows[1].T / 16) < rounding(torch.float64, 100)
    assert checkpoint.CheckpointFunction is function

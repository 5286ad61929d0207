"""Law: the result says which parameters took part, and how the weights stand."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import pytorch_influence_functions as ptif
from tests.oracles.autograd import example_gradients


def test_shares_of_the_gradient_norm_and_the_distance_from_a_minimum() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).double()
    x, y = torch.randn(3, 4).double(), torch.randint(0, 3, (3,))
    g = example_gradients(model, lambda o, t: F.cross_entropy(o, t, reduction="none"), x, y)
    sums = g.square().sum(0)
    first, whole = float(sums[:25].sum()), float(sums.sum())
    for p in model[0].parameters():
        p.requires_grad_(False)
    scores = ptif.attribute(model, (x, y), (x, y), loss=nn.CrossEntropyLoss())
    shares = scores.diagnostics.gradient_shares
    assert shares["(left out)"] == pytest.approx(first / whole, rel=1e-9)
    assert shares["2"] == pytest.approx(1 - first / whole, rel=1e-9)
    assert (scores.diagnostics.parameters_used, scores.diagnostics.parameters_total) == (18, 43)
    last = g[:, 25:]
    want = float(last.mean(0).norm() / last.norm(dim=1).mean())
    assert scores.diagnostics.relative_gradient == pytest.approx(want, rel=1e-9)
    assert "18 of 43" in str(scores.diagnostics)
    assert [p.requires_grad for p in model.parameters()] == [False, False, True, True]

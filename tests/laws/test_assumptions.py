"""Law: the result says which parameters took part, and how the weights stand."""

from __future__ import annotations

from typing import Any

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
    assert shares["(frozen)"] == pytest.approx(first / whole, rel=1e-9)
    assert shares["2"] == pytest.approx(1 - first / whole, rel=1e-9)
    assert (scores.diagnostics.parameters_used, scores.diagnostics.parameters_total) == (18, 43)
    last = g[:, 25:]
    want = float(last.mean(0).norm() / last.norm(dim=1).mean())
    assert scores.diagnostics.relative_gradient == pytest.approx(want, rel=1e-9)
    assert "18 of 43" in str(scores.diagnostics)
    assert [p.requires_grad for p in model.parameters()] == [False, False, True, True]


def cross_entropy(outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    return F.cross_entropy(outputs, targets, reduction="none")


@pytest.mark.parametrize("strength", [0.3, {"0.weight": 0.5, "2.weight": 0.1, "2.bias": 0.02}], ids=str)
def test_the_distance_from_a_minimum_is_that_of_loss_and_weight_decay_together(strength: Any) -> None:
    """|mean gradient of the loss + decay * weights| over the mean length of an example's gradient, in float64."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).double()
    x, y = torch.randn(20, 4).double(), torch.randint(0, 3, (20,))
    g = example_gradients(model, cross_entropy, x, y)
    strengths = strength if isinstance(strength, dict) else {k: strength for k, _ in model.named_parameters()}
    pulled = torch.cat([strengths.get(k, 0.0) * p.detach().flatten() for k, p in model.named_parameters()])
    want = float((g.mean(0) + pulled).norm() / g.norm(dim=1).mean())
    scores = ptif.attribute(model, (x, y), (x[:2], y[:2]), loss=nn.CrossEntropyLoss(), weight_decay=strength)
    assert scores.diagnostics.relative_gradient == pytest.approx(want, rel=1e-9)
    assert abs(want - float(g.mean(0).norm() / g.norm(dim=1).mean())) > 0.1 * want, "the decay makes no difference here"


def test_a_minimum_with_weight_decay_is_seen_as_one() -> None:
    """Ridge regression in closed form: the loss alone pulls, the sum of both does not."""
    torch.manual_seed(0)
    x, y, decay = torch.randn(30, 4).double(), torch.randn(30, 1).double(), 0.5
    model = nn.Linear(4, 1, bias=False).double()
    with torch.no_grad():
        model.weight.copy_(torch.linalg.solve(x.T @ x / 30 + decay * torch.eye(4).double(), x.T @ y / 30).T)
    problem = ptif.Problem(model, ptif.SquaredError(), (x, y), weight_decay=decay)
    assert ptif.exact(damping=0.1).fit(problem).score((x[:1], y[:1])).diagnostics.relative_gradient < 1e-12

"""Layers of one model have weights of several types, and forward casts between them."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import pytorch_influence_functions as ptif
from tests.oracles.autograd import dense_ggn, example_gradients
from tests.tolerance import gap, rounding

X, Y = torch.randn(20, 4, generator=torch.Generator().manual_seed(0)), torch.arange(20) % 3
TRAIN, QUERIES = (X[:16], Y[:16]), (X[16:], Y[16:])


class Cast(nn.Module):
    """A body in one type and a head in another."""

    def __init__(self, body: torch.dtype, head: torch.dtype) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.body, self.head = nn.Linear(4, 5).to(body), nn.Linear(5, 3).to(head)

    def forward(self, x: Tensor) -> Tensor:
        hidden = torch.tanh(self.body(x.to(self.body.weight.dtype)))
        return self.head(hidden.to(self.head.weight.dtype))


def twin(model: Cast) -> Cast:
    """The same numbers, in float64 throughout."""
    copied = Cast(torch.float64, torch.float64)
    copied.load_state_dict(model.state_dict())
    return copied


# bfloat16 keeps three digits of what passes between the layers.
TYPES = {
    "float32, float64": (torch.float32, torch.float64, rounding(torch.float32, 100)),
    "float64, float32": (torch.float64, torch.float32, rounding(torch.float32, 100)),
    "bfloat16, float32": (torch.bfloat16, torch.float32, 0.03),
    "float32, bfloat16": (torch.float32, torch.bfloat16, 0.03),
}


@pytest.mark.parametrize("name", TYPES)
def test_every_weight_takes_part_in_the_widest_type(name: str) -> None:
    body, head, tolerance = TYPES[name]
    model = Cast(body, head)
    exact = twin(model)
    rows = [example_gradients(exact, F.cross_entropy, x.double(), y) for x, y in (QUERIES, TRAIN)]
    curvature = dense_ggn(exact, F.cross_entropy, TRAIN[0].double(), TRAIN[1]) + 0.1 * torch.eye(43).double()
    expected = {"grad_dot": rows[0] @ rows[1].T / 16, "exact": rows[0] @ torch.linalg.solve(curvature, rows[1].T) / 16}
    methods = {"grad_dot": ptif.methods.grad_dot(), "exact": ptif.exact(ptif.curvature.GGN(), damping=0.1)}
    for method, composition in methods.items():
        values = ptif.attribute(model, TRAIN, QUERIES, loss=nn.CrossEntropyLoss(), method=composition).values
        assert gap(values, expected[method]) < tolerance, method
    assert (model.body.weight.dtype, model.head.weight.dtype) == (body, head)
    assert not model.body._forward_pre_hooks


@pytest.mark.parametrize("method", ["dual", "ekfac", "gauss_newton", "datainf"])
def test_every_solver_takes_them(method: str) -> None:
    model = Cast(torch.bfloat16, torch.float32)
    scores = ptif.attribute(model, TRAIN, QUERIES, loss=nn.CrossEntropyLoss(), method=method)
    whole = twin(model).float()
    expected = ptif.attribute(whole, TRAIN, QUERIES, loss=nn.CrossEntropyLoss(), method=method)
    assert gap(scores.values, expected.values) < 0.1


@pytest.mark.parametrize("kind", [torch.bfloat16, torch.float16])
def test_an_edited_model_has_the_types_of_the_model(kind: torch.dtype) -> None:
    """Its forward must be its own, too, and not that of the copy that was computed with."""
    model = Cast(kind, kind)
    outcome = ptif.what_if(ptif.Problem(model, nn.CrossEntropyLoss(), TRAIN), remove=[0, 1])
    edited = outcome.model()
    assert type(edited) is Cast
    assert {p.dtype for p in edited.parameters()} == {kind}
    moved = twin(model)
    with torch.no_grad():
        for name, parameter in moved.named_parameters():
            parameter += outcome.parameter_change[name]
    assert gap(edited(X).detach(), moved(X.double())) < 0.05 < gap(model(X).detach(), moved(X.double()))

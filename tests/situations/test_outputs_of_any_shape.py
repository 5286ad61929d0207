"""Outputs of any shape: one number per example with or without an axis of its own, several, sequences, images.

A model that ends in `.squeeze(-1)`, or returns its own loss per example, gives outputs of shape (n,).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import pytorch_influence_functions as ptif
from tests.laws.test_training_mode import SETTINGS
from tests.oracles import autograd as oracle
from tests.tolerance import gap, rounding

N, QUERIES = 18, 3


class Shaped(nn.Module):
    """A small net whose outputs have the shape asked for, after the axis of the examples."""

    def __init__(self, shape: tuple[int, ...]) -> None:
        super().__init__()
        self.shape = shape
        width = 1
        for size in shape:
            width *= size
        self.body = nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, width))

    def forward(self, x: Tensor) -> Tensor:
        outputs: Tensor = self.body(x)
        return outputs.squeeze(-1) if self.shape == () else outputs.reshape(len(x), *self.shape)


SHAPES: dict[str, tuple[int, ...]] = {
    "(n,)": (),
    "(n, 1)": (1,),
    "(n, k)": (2,),
    "(n, T, 1)": (3, 1),
    "(n, C, H, W)": (1, 2, 2),
}


def case(shape: tuple[int, ...]) -> tuple[nn.Module, tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    torch.manual_seed(0)
    model = Shaped(shape).double()
    x = torch.randn(N + QUERIES, 4).double()
    y = torch.randn(N + QUERIES, *shape).double() if shape not in ((), (1,)) else torch.randn(N + QUERIES, 1).double()
    y = y.reshape(N + QUERIES, *shape)
    return model, (x[:N], y[:N]), (x[N:], y[N:])


def loss_of(outputs: Tensor, targets: Tensor) -> Tensor:
    """Squared error, the mean over an example's outputs, as `nn.MSELoss()` trains."""
    return (outputs - targets).square().reshape(len(outputs), -1).mean(1)


def fitted(spec: Any, model: nn.Module, train: Any, loss: Any = None) -> Any:
    return spec.fit(ptif.Problem(model, loss or nn.MSELoss(), train, weight_decay=0.01))


SPECS: dict[str, Callable[[nn.Module], Any]] = {
    name: lambda model, name=name: SETTINGS.get(name, lambda m, p: getattr(ptif.methods, name)())(model, None)  # type: ignore[misc]
    for name in ptif.methods.__all__
}
SPECS |= {
    "leverage": lambda model: ptif.Influence(ptif.curvature.GGN(), scaling=ptif.scaling.Leverage(), damping=0.1),
    "relative": lambda model: ptif.Influence(ptif.curvature.GGN(), scaling=ptif.scaling.RelatIF(), damping=0.1),
    "auto": lambda model: ptif.Influence(),
}
# The Hessian of these untrained nets is indefinite at the method's own damping.
SPECS["arnoldi"] = lambda model: ptif.methods.arnoldi(5, damping=10.0)
# TRAK projects the gradients of a margin: it is for classes, with a test of its own. Unrolling takes a run, BM25 texts.
for other in ("trak", "unrolled", "BM25"):
    del SPECS[other]


@pytest.mark.parametrize("name", SPECS)
def test_one_number_per_example_needs_no_axis_of_its_own(name: str) -> None:
    results = []
    for shape in ((), (1,)):
        model, train, queries = case(shape)
        method = fitted(SPECS[name](model), model, train)
        results.append((method.score(queries).values, method.self_influence()))
    for flat, column in zip(*results, strict=True):
        torch.testing.assert_close(flat, column)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", SPECS)
def test_every_method_takes_outputs_of_every_shape(name: str, shape: str) -> None:
    model, train, queries = case(SHAPES[shape])
    values = fitted(SPECS[name](model), model, train).score(queries).values
    assert values.shape == (QUERIES, N) and bool(torch.isfinite(values).all())


@pytest.mark.parametrize("shape", SHAPES)
def test_scores_are_those_of_the_dense_matrix(shape: str) -> None:
    model, train, queries = case(SHAPES[shape])
    g, q = (oracle.example_gradients(model, loss_of, *data) for data in (train, queries))
    ggn = oracle.dense_ggn(model, loss_of, *train)
    hessian = oracle.dense_hessian(model, loss_of, *train)
    tests = {
        "GGN dense": (ptif.curvature.GGN(), ptif.solvers.Spectral(), ggn),
        "GGN dual": (ptif.curvature.GGN(), ptif.solvers.Woodbury(), ggn),
        "GGN by products": (ptif.curvature.GGN(), ptif.solvers.CG(rtol=1e-10), ggn),
        "Fisher of the data": (ptif.curvature.EmpiricalFisher(), ptif.solvers.Woodbury(), g.T @ g / N),
        "Hessian": (ptif.curvature.Hessian(), ptif.solvers.Cholesky(), hessian),
    }
    for name, (curvature, solver, dense) in tests.items():
        method = ptif.Influence(curvature, solver, damping=5.0)
        problem = ptif.Problem(model, nn.MSELoss(), train)
        values = method.fit(problem).score(queries).values
        expected = oracle.influence(dense, 5.0, q, g)
        assert gap(values, expected) < max(1e-9, rounding(torch.float64, 10.0)), name


@pytest.mark.parametrize("shape", SHAPES)
def test_curves_and_spectra_take_outputs_of_every_shape(shape: str) -> None:
    model, train, queries = case(SHAPES[shape])
    method = fitted(ptif.exact(damping=1.0), model, train)
    assert all(torch.tensor(method.damping_curve(lambdas=[0.1, 1.0, 10.0]).losses).isfinite())
    assert method.spectrum(queries).mean > 0


def test_the_damping_curve_of_outputs_without_an_axis_is_that_of_one_output() -> None:
    curves = []
    for shape in ((), (1,)):
        model, train, _ = case(shape)
        curves.append(fitted(ptif.exact(damping=1.0), model, train).damping_curve(lambdas=[0.1, 1.0, 10.0]).losses)
    assert gap(curves[0], curves[1]) < rounding(torch.float64, 1e3)


class OwnLoss(nn.Module):
    """A model that returns its loss per example, as Hugging Face's do when they are given labels."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Linear(4, 3)

    def forward(self, x: Tensor, labels: Tensor) -> Tensor:
        return nn.functional.cross_entropy(self.net(x), labels, reduction="none")


@pytest.mark.parametrize("name", ["dual", "grad_dot", "tracin", "datainf"])
def test_a_model_that_returns_its_own_loss(name: str) -> None:
    torch.manual_seed(0)
    model = OwnLoss().double()
    x, y = torch.randn(N + QUERIES, 4).double(), torch.arange(N + QUERIES) % 3
    train, queries = (x[:N], y[:N], y[:N]), (x[N:], y[N:], y[N:])
    problem = ptif.Problem(model, lambda losses, labels: losses, train)
    values = SPECS[name](model).fit(problem).score(queries).values
    plain = ptif.Problem(model.net, nn.CrossEntropyLoss(), (x[:N], y[:N]))
    expected = SPECS[name](model.net).fit(plain).score((x[N:], y[N:])).values
    torch.testing.assert_close(values, expected)


def test_trak_of_one_logit_needs_no_axis_of_its_own() -> None:
    results = []
    for shape in ((), (1,)):
        model, (x, y), (xq, yq) = case(shape)
        problem = ptif.Problem(model, nn.BCEWithLogitsLoss(), (x, (y > 0).double()))
        results.append(ptif.trak(4).fit(problem).score((xq, (yq > 0).double()), ptif.Margin()).values)
    torch.testing.assert_close(*results)


@pytest.mark.parametrize("shape", SHAPES)
def test_the_first_call_takes_outputs_of_every_shape(shape: str) -> None:
    model, train, queries = case(SHAPES[shape])
    assert ptif.attribute(model, train, queries, loss=nn.MSELoss()).values.shape == (QUERIES, N)
    assert ptif.forecast(model, train, queries, loss=nn.MSELoss()).passes > 0

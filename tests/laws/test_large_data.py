"""Law: lambda of `Relative` is a share of trace(C) / P on data of any size.

Above 2,000 examples an iterative solver takes the trace from some of them. What was summed over some must be divided
by how many these are; on small data a division by N would pass unseen.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import pytorch_influence_functions as ptif
from pytorch_influence_functions.curvature import GGN, EmpiricalFisher, Fisher, Hessian, exact
from pytorch_influence_functions.curvature.base import TRACE_EXAMPLES
from pytorch_influence_functions.damping import Relative
from pytorch_influence_functions.solvers import CG, Spectral

N = 3000


def softmax(classes: int) -> tuple[nn.Module, Tensor, Tensor]:
    torch.manual_seed(0)
    return nn.Linear(3, classes).double(), torch.randn(N, 3).double(), torch.randint(0, classes, (N,))


def mean_eigenvalue(model: nn.Module, x: Tensor, y: Tensor, empirical: bool) -> float:
    """trace / P in closed form: a linear layer's row is (slope in the outputs) times (input, 1)."""
    p = model(x).softmax(1).detach()
    slopes = (p - nn.functional.one_hot(y, p.shape[1])).square().sum(1)
    each = slopes if empirical else (p * (1 - p)).sum(1)
    return float((each * (x.square().sum(1) + 1)).mean()) / (4 * p.shape[1])


CURVATURES = {
    "GGN": (GGN(), 3, False, 0.03),
    "GGN, one draw per example": (GGN(), exact.ENUMERATED_OUTPUTS + 4, False, 0.05),
    "Hessian": (Hessian(), 3, False, 0.03),
    "Fisher": (Fisher(samples=2), 3, False, 0.05),
    "empirical Fisher": (EmpiricalFisher(), 3, True, 0.03),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", CURVATURES)
def test_relative_damping_is_a_share_of_the_mean_eigenvalue_whatever_the_size(name: str) -> None:
    curvature, classes, empirical, tolerance = CURVATURES[name]
    model, x, y = softmax(classes)
    assert TRACE_EXAMPLES < 0.8 * N, "nothing would be left out"
    problem = ptif.Problem(model, ptif.CrossEntropy(), (x, y), batch_size=500)
    fitted = ptif.Influence(curvature, CG(), Relative(0.5)).fit(problem)
    want = mean_eigenvalue(model, x, y, empirical)
    assert fitted.score((x[:1], y[:1])).diagnostics.damping == pytest.approx(0.5 * want, rel=tolerance)


@pytest.mark.slow
def test_the_trace_from_some_examples_is_near_that_of_all() -> None:
    """The same lambda, whether the solver writes the matrix out (all examples) or only multiplies with it (some)."""
    model, x, y = softmax(3)
    problem = ptif.Problem(model, ptif.CrossEntropy(), (x, y), batch_size=500)
    dampings = [
        ptif.Influence(GGN(), solver, Relative(0.1)).fit(problem).score((x[:1], y[:1])).diagnostics.damping
        for solver in (Spectral(), CG())
    ]
    assert dampings[1] == pytest.approx(dampings[0], rel=0.03)
    assert dampings[0] == pytest.approx(0.1 * mean_eigenvalue(model, x, y, False), rel=1e-9)


def test_classes_that_alternate_do_not_mislead_lambda() -> None:
    """Every third example is of a class of its own scale: a sample with a step of three would see one class alone."""
    torch.manual_seed(0)
    model, n = nn.Linear(3, 2).double(), 3 * TRACE_EXAMPLES
    x = torch.randn(n, 3).double() * torch.tensor([0.1, 1.0, 10.0]).double().repeat(TRACE_EXAMPLES)[:, None]
    y = torch.randint(0, 2, (n,))
    problem = ptif.Problem(model, ptif.CrossEntropy(), (x, y), batch_size=500)
    fitted = ptif.Influence(EmpiricalFisher(), CG(), Relative(0.5)).fit(problem)
    want = mean_eigenvalue(model, x, y, empirical=True)
    # The third of the examples that carries the trace counts within 4 %, and its members differ by as much again.
    assert fitted.score((x[:1], y[:1])).diagnostics.damping == pytest.approx(0.5 * want, rel=0.1)

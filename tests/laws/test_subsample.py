"""A curvature on part of the data: the dense matrix of that part, whatever solves with it; scores of everybody."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset

import pytorch_influence_functions as ptif
from pytorch_influence_functions.core.errors import InvalidInput
from pytorch_influence_functions.curvature import EKFAC, GGN, EmpiricalFisher, Fisher, Hessian, Identity, Subsample
from pytorch_influence_functions.solvers import CG, Cholesky, Neumann, Spectral, Woodbury
from tests.tolerance import gap, rounding

N, PART, DAMPING = 30, 11, 1e-3


def setting() -> tuple[ptif.Problem, tuple[Tensor, Tensor]]:
    torch.manual_seed(0)
    x, y = torch.randn(N, 3).double(), torch.arange(N) % 3
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 3)).double()
    return ptif.Problem(model, ptif.CrossEntropy(), TensorDataset(x, y), batch_size=7), (x[:4] + 0.1, y[:4])


def chosen(seed: int = 0) -> Tensor:
    return torch.randperm(N, generator=torch.Generator().manual_seed(seed))[:PART]


def gradients(problem: ptif.Problem, x: Tensor, y: Tensor) -> Tensor:
    rows = []
    for a, b in zip(x, y, strict=True):
        loss = nn.functional.cross_entropy(problem.model(a[None]), b[None])
        rows.append(torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(problem.model.parameters()))]))
    return torch.stack(rows)


def gauss_newton(problem: ptif.Problem, x: Tensor) -> Tensor:
    total = torch.zeros(31, 31, dtype=torch.float64)
    for a in x:
        p = problem.model(a[None])[0].softmax(0)
        rows = [
            torch.cat([g.flatten() for g in torch.autograd.grad(f, list(problem.model.parameters()))])
            for f in (problem.model(a[None])[0, k] for k in range(3))
        ]
        j = torch.stack(rows)
        total += j.T @ (p.diag() - p[:, None] * p) @ j
    return (total / len(x)).detach()


@pytest.mark.parametrize("seed", [0, 5])
@pytest.mark.parametrize(
    "solver",
    [CG(rtol=1e-11), Spectral(), Cholesky(), Woodbury()],
    ids=["CG", "spectral", "Cholesky", "dual"],
)
def test_it_is_the_matrix_of_its_part_and_scores_are_of_all(solver: Any, seed: int) -> None:
    problem, queries = setting()
    x, y = problem.data.dataset.tensors
    want = torch.linalg.solve(
        gauss_newton(problem, x[chosen(seed)]) + DAMPING * torch.eye(31, dtype=torch.float64),
        gradients(problem, *queries).T,
    )
    method = ptif.Influence(Subsample(GGN(), PART, seed), solver, DAMPING)
    found = method.fit(problem).score(queries).values
    torch.testing.assert_close(found, want.T @ gradients(problem, x, y).T / N, rtol=1e-6, atol=1e-10)


def test_the_empirical_fishers_rows_are_not_taken_for_everybodys() -> None:
    problem, queries = setting()
    x, y = problem.data.dataset.tensors
    g = gradients(problem, x, y)
    part = g[chosen()]
    matrix = part.T @ part / PART + DAMPING * torch.eye(31, dtype=torch.float64)
    attribution = ptif.dual(Subsample(EmpiricalFisher(), PART), DAMPING).fit(problem)
    want = torch.linalg.solve(matrix, gradients(problem, *queries).T).T @ g.T / N
    torch.testing.assert_close(attribution.score(queries).values, want, rtol=1e-7, atol=1e-10)
    own = (g * torch.linalg.solve(matrix, g.T).T).sum(1) / N
    torch.testing.assert_close(attribution.self_influence(), own, rtol=1e-7, atol=1e-10)


@pytest.mark.slow
@pytest.mark.parametrize("curvature", [GGN(), EKFAC(), Fisher(1), Hessian()])
def test_all_examples_are_the_curvature_itself(curvature: Any) -> None:
    problem, queries = setting()
    solver = CG() if isinstance(curvature, Hessian) else Spectral()
    found, want = (
        ptif.Influence(c, solver, 2.0).fit(problem).score(queries).values
        for c in (Subsample(curvature, 10 * N), curvature)
    )
    assert gap(found, want) < rounding(want, condition=1e3)
    other = ptif.Influence(Subsample(curvature, 5), solver, 2.0).fit(problem).score(queries).values
    assert not torch.allclose(other, want, rtol=1e-3)


@pytest.mark.slow
def test_guided_and_random_batches_stay_inside_the_part() -> None:
    """A preconditioner on all data and a system on a part; the same system by random batches."""
    problem, queries = setting()
    part = Subsample(GGN(), PART)
    exact = ptif.Influence(part, Spectral(), 0.05).fit(problem).score(queries).values
    guided = ptif.Influence(part, CG(rtol=1e-10), 0.05, preconditioner=EKFAC()).fit(problem)
    torch.testing.assert_close(guided.score(queries).values, exact, rtol=1e-6, atol=1e-9)
    drawn = ptif.Influence(part, Neumann(steps=3000, batch_size=PART), 0.05).fit(problem).score(queries).values
    assert float((drawn - exact).norm() / exact.norm()) < 0.05


def test_the_forecast_counts_its_passes_over_its_part() -> None:
    problem, _ = setting()
    full, part = (ptif.Influence(c, CG(), 0.1).forecast(problem).passes for c in (GGN(), Subsample(GGN(), 3)))
    rest = ptif.methods.grad_dot().forecast(problem).passes  # what is done over all examples, whatever the curvature
    assert part - rest == pytest.approx((full - rest) * 3 / N)


def test_bad_input_gets_one_sentence() -> None:
    with pytest.raises(InvalidInput, match="takes a curvature such as GGN"):
        Subsample("GGN", 5)
    with pytest.raises(InvalidInput, match="takes a curvature such as GGN"):
        Subsample(Subsample(GGN(), 5), 5)
    for wrong in (0, 2.5, True):
        with pytest.raises(InvalidInput, match="whole number of at least 1"):
            Subsample(GGN(), wrong)
    problem, _ = setting()
    with pytest.raises(InvalidInput, match="only as"):
        ptif.Influence(Subsample(Identity(), 5), Cholesky(), 0.1).fit(problem)

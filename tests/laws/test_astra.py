"""Gauss-Newton solves guided by EK-FAC: preconditioned conjugate gradients and ASTRA's stochastic steps."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import pytorch_influence_functions as ptif
from pytorch_influence_functions.core.errors import InvalidInput
from pytorch_influence_functions.curvature import EKFAC, GGN
from pytorch_influence_functions.linalg.dense import Matrix
from pytorch_influence_functions.linalg.implicit import Implicit
from pytorch_influence_functions.linalg.shift import Shift
from pytorch_influence_functions.solvers import Spectral
from pytorch_influence_functions.solvers.base import System
from pytorch_influence_functions.solvers.cg import CG
from pytorch_influence_functions.solvers.neumann import Neumann
from tests.laws.solver_cases import F64, a_space, some_rows, spectrum_matrix
from tests.laws.test_influence import cross_entropy, mlp, relative_gap
from tests.oracles.autograd import dense_ggn, example_gradients, influence
from tests.tolerance import gap, rounding

SMALL = 1e-3


def oracle(data: Any, damping: float = SMALL) -> Tensor:
    model, x, y, xq, yq = data
    g, gq = example_gradients(model, cross_entropy, x, y), example_gradients(model, cross_entropy, xq, yq)
    return influence(dense_ggn(model, cross_entropy, x, y), damping, gq, g)


def score(spec: ptif.Influence, data: Any) -> ptif.Scores:
    model, x, y, xq, yq = data
    return spec.fit(ptif.Problem(model, ptif.CrossEntropy(), (x, y))).score((xq, yq))


@pytest.mark.slow
def test_ekfac_guides_conjugate_gradients_to_the_dense_solve_in_fewer_steps() -> None:
    data = mlp()
    want = oracle(data)
    plain = score(ptif.gauss_newton(SMALL, rtol=1e-9), data)
    guided = score(ptif.gauss_newton(SMALL, rtol=1e-9, preconditioner=EKFAC(GGN())), data)
    assert relative_gap(guided.values, want) < 1e-7
    assert guided.diagnostics.steps < plain.diagnostics.steps
    assert relative_gap(score(ptif.ekfac(SMALL), data).values, want) > 1e-2
    assert relative_gap(score(ptif.methods.grad_dot(), data).values, want) > 0.5


def test_one_guided_step_is_nearer_than_the_guide_itself() -> None:
    """The first step is a line search along the guide's solution: nearer in the norm of the system, for every row."""
    space = a_space()
    matrix = spectrum_matrix(space)
    shift, b = Shift(0.05), some_rows(space, 5)
    rough = Matrix(space, matrix.matrix.diagonal().diag())
    guide = Spectral().init(rough, shift).inverse
    system = System.of(matrix, shift)
    exact = torch.linalg.solve(matrix.matrix + 0.05 * torch.eye(space.size, dtype=F64), b.flat().T).T

    def distance(x: Tensor) -> Tensor:
        return ((x - exact) * system.product(x - exact)).sum(1)

    one = CG(rtol=1e-12, max_steps=1).solve(CG(rtol=1e-12, max_steps=1).init(matrix, shift, guide), b).value.flat()
    assert bool((distance(one) <= distance(guide.apply(b).flat()) * (1 + 1e-12)).all())


@pytest.mark.slow
def test_astra_without_a_step_is_ekfac() -> None:
    data = mlp()
    still = Neumann(step=1e-14, steps=1, batch_size=10, start="solved")
    got = score(ptif.Influence(GGN(), still, SMALL, EKFAC(GGN())), data)
    assert relative_gap(got.values, score(ptif.ekfac(SMALL, GGN()), data).values) < 1e-10


@pytest.mark.slow
def test_astra_on_all_examples_converges_to_the_dense_solve() -> None:
    data = mlp()
    whole = ptif.methods.astra(0.1, EKFAC(GGN()), steps=170, batch_size=60, momentum=0.0, halve_every=None)
    assert relative_gap(score(whole, data).values, oracle(data, 0.1)) < 1e-4
    assert relative_gap(score(ptif.methods.grad_dot(), data).values, oracle(data, 0.1)) > 0.5


@pytest.mark.slow
def test_astra_on_batches_is_nearer_than_ekfac() -> None:
    data = mlp(n=120)
    want = oracle(data)
    start = relative_gap(score(ptif.ekfac(SMALL, GGN()), data).values, want)
    method = ptif.methods.astra(SMALL, EKFAC(GGN()), steps=80, batch_size=30, halve_every=20)
    got = score(method, data)
    assert relative_gap(got.values, want) < 0.8 * start
    assert gap(score(method, data).values, got.values) < rounding(got.values, condition=1e3)


@pytest.mark.parametrize(("momentum", "halve_every"), [(0.0, None), (0.9, None), (0.5, 7)])
def test_momentum_and_halving_follow_their_definition(momentum: float, halve_every: int | None) -> None:
    space = a_space()
    matrix, b, shift = spectrum_matrix(space), some_rows(space, 3), Shift(0.1)
    step = 0.02 / float(matrix.extremes()[1])
    solver = Neumann(step=step, steps=30, momentum=momentum, halve_every=halve_every, tolerance=0.0)
    whole = Implicit(space, lambda rows, ids: matrix.apply(rows), matrix.mean_eigenvalue, 1)
    got = solver.solve(solver.init(whole, shift), b).value.flat()
    dense, rhs = matrix.matrix + 0.1 * torch.eye(space.size, dtype=F64), b.flat()
    x, moved = step * rhs, torch.zeros_like(rhs)  # the first step from zero has been taken
    for t in range(30):
        moved = momentum * moved + step * 0.5 ** (t // halve_every if halve_every else 0) * (rhs - x @ dense)
        x = x + moved
    torch.testing.assert_close(got, x)


def test_a_measured_step_with_momentum_is_stable() -> None:
    space = a_space()
    matrix, b = spectrum_matrix(space), some_rows(space, 3)
    solver = Neumann(momentum=0.9)
    solution = solver.solve(solver.init(matrix, Shift(0.1)), b)
    want = torch.linalg.solve(matrix.matrix + 0.1 * torch.eye(space.size, dtype=F64), b.flat().T).T
    # The depth leaves five to ten per cent in the weakest direction; an unstable step leaves nothing of the answer.
    assert relative_gap(solution.unwrap().flat(), want) < 0.2


def test_large_data_is_measured_on_some_examples(monkeypatch: pytest.MonkeyPatch) -> None:
    from pytorch_influence_functions.solvers.neumann import tuning

    data = mlp(n=60)
    monkeypatch.setattr(tuning, "_MEASURED", 20)
    sizes: list[int | None] = []
    original = Implicit.apply

    def counted(self: Implicit, rows: Any, ids: Tensor | None = None) -> Any:
        sizes.append(None if ids is None else len(ids))
        return original(self, rows, ids)

    monkeypatch.setattr(Implicit, "apply", counted)
    score(ptif.methods.astra(SMALL, EKFAC(GGN()), steps=5, batch_size=10), data)
    # One full product: the residual that is reported.
    assert sizes.count(None) == 1
    assert sizes.count(20) > 20


@pytest.mark.parametrize("bad", [{"momentum": 1.0}, {"momentum": -0.1}, {"halve_every": 0}], ids=repr)
def test_impossible_settings_are_refused(bad: Any) -> None:
    with pytest.raises(InvalidInput, match=r"momentum|halve_every"):
        Neumann(**bad)

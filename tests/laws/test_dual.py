"""The dual equals the dense solve, holds nothing of length P, and gives leverages exactly."""

from __future__ import annotations

import math

import pytest
import torch

from pytorch_influence_functions.core.errors import InvalidInput, NonFinite, TooLarge
from pytorch_influence_functions.curvature import Budget
from pytorch_influence_functions.linalg.dual_solution import DualSolution
from pytorch_influence_functions.linalg.gram import Gram
from pytorch_influence_functions.linalg.rows import Route, Rows
from pytorch_influence_functions.linalg.shift import Shift
from pytorch_influence_functions.solvers.base import Result
from pytorch_influence_functions.solvers.cg import CG
from pytorch_influence_functions.solvers.dual import Woodbury
from tests.laws.solver_cases import (
    F64,
    a_space,
    dense_gram,
    dense_residual,
    dense_shift,
    dense_solve,
    outer_rows,
    some_rows,
    spectrum_matrix,
    uneven,
    worst,
)


def a_gram(n: int = 20, outputs: int = 1) -> Gram:
    space = a_space()
    return Gram(space, outer_rows(space, n * outputs, terms=2), n)


SHIFTS = {
    "uniform": Shift(1e-4),
    "decay": Shift(1e-4, dict.fromkeys(a_space().blocks, 1e-3)),
    "uneven": uneven(a_space(), 1e-4),
}


@pytest.mark.parametrize("shift", SHIFTS.values(), ids=SHIFTS)
@pytest.mark.parametrize("outputs", [1, 3])
@pytest.mark.parametrize("again", [False, True])
def test_equals_the_dense_solve(shift: Shift, outputs: int, again: bool) -> None:
    gram = a_gram(20, outputs)
    space, solver = gram.space, Woodbury()
    if again:
        Woodbury().init(gram, Shift(1.0))  # the second damping is solved with an eigendecomposition
    b, r = outer_rows(space, 6, 9), outer_rows(space, 8, 10, terms=3)
    expected = dense_solve(space, dense_gram(gram), shift, b.flat())
    value = solver.solve(solver.init(gram, shift), b).unwrap()
    assert isinstance(value, DualSolution)
    assert worst(value.flat(), expected) < 1e-8
    for route in (None, Route.GHOST, Route.MATERIALISE):
        assert worst(value.inner(r, route), expected @ r.flat().T) < 1e-8
    assert worst(value.inner(gram.rows), expected @ gram.rows.flat().T) < 1e-8
    assert worst(value.quadratic()[:, None], (expected * b.flat()).sum(1, keepdim=True)) < 1e-8
    # Curvature matters: the plain gradient dot product is another ranking.
    dots = b.inner(r)
    assert worst(dots * (expected @ r.flat().T).norm() / dots.norm(), expected @ r.flat().T) > 0.1


@pytest.mark.parametrize("shift", SHIFTS.values(), ids=SHIFTS)
def test_equals_conjugate_gradients_on_the_same_curvature(shift: Shift) -> None:
    gram = a_gram()
    b = outer_rows(gram.space, 4, 9)
    solver = CG(rtol=1e-10, max_steps=2000)  # at a damping of 1e-4 rounding stops it at 5e-12
    cg = solver.solve(solver.init(gram, shift), b).unwrap()
    dual = Woodbury().solve(Woodbury().init(gram, shift), b).unwrap()
    assert worst(dual.flat(), cg.flat()) < 1e-6


@pytest.mark.parametrize("shift", SHIFTS.values(), ids=SHIFTS)
def test_the_residual_is_the_true_one(shift: Shift) -> None:
    gram = a_gram()
    b = some_rows(gram.space, 5, 9)
    solution = Woodbury().solve(Woodbury().init(gram, shift), b)
    true = dense_residual(gram.space, dense_gram(gram), shift, solution.value.flat(), b.flat())
    assert float(solution.residual.max()) < 1e-9
    assert (solution.residual >= 0.1 * true).all()  # both are rounding


@pytest.mark.parametrize("shift", SHIFTS.values(), ids=SHIFTS)
def test_a_planted_fault_shows_in_the_residual(shift: Shift, monkeypatch: pytest.MonkeyPatch) -> None:
    gram = a_gram()
    b = some_rows(gram.space, 5, 9)
    state = Woodbury().init(gram, shift)
    good = type(state).solve
    monkeypatch.setattr(type(state), "solve", lambda self, overlaps: 0.9 * good(self, overlaps))
    solution = Woodbury().solve(state, b)
    true = dense_residual(gram.space, dense_gram(gram), shift, solution.value.flat(), b.flat())
    torch.testing.assert_close(solution.residual, true, rtol=1e-6, atol=0)
    assert solution.result is Result.inaccurate
    assert len(solution.failed) == 5


def test_float32_reports_about_what_rounding_does() -> None:
    space = a_space()
    gram = Gram(space, some_rows(space, 20, dtype=torch.float32), 20)
    b, shift = some_rows(space, 5, 9, dtype=torch.float32), Shift(1e-3)
    solution = Woodbury().solve(Woodbury().init(gram, shift), b)
    value = solution.unwrap()
    assert value.dtype is torch.float32
    assert value.inner(gram.rows).dtype is torch.float32
    true = dense_residual(space, dense_gram(gram), shift, value.flat(), b.flat())
    assert float(true.max()) < 5 * float(solution.residual.max()) < 100 * float(true.max())


def test_one_eigendecomposition_serves_every_damping(monkeypatch: pytest.MonkeyPatch) -> None:
    gram = a_gram()
    b = some_rows(gram.space, 3, 9)
    first = Woodbury().init(gram, Shift(1e-1))
    assert first.factor is not None and not gram.eigenvalues_at_hand  # one damping: a Cholesky factor is enough
    Woodbury().init(gram, Shift(1e-2))
    assert gram.eigenvalues_at_hand
    monkeypatch.setattr(torch.linalg, "eigh", lambda *_: pytest.fail("decomposed again"))
    monkeypatch.setattr(torch.linalg, "cholesky_ex", lambda *_: pytest.fail("factorised again"))
    for damping in (1e-4, 1.0):
        value = Woodbury().solve(Woodbury().init(gram, Shift(damping)), b).unwrap()
        expected = dense_solve(gram.space, dense_gram(gram), Shift(damping), b.flat())
        assert worst(value.flat(), expected) < 1e-8


@pytest.mark.parametrize("shift", SHIFTS.values(), ids=SHIFTS)
@pytest.mark.parametrize("again", [False, True])
def test_leverages_are_the_dense_self_influences(shift: Shift, again: bool) -> None:
    gram = a_gram()
    solver = Woodbury()
    if again:
        Woodbury().init(gram, Shift(1.0))
    g = gram.rows.flat()
    inverse = torch.linalg.inv(dense_gram(gram) + dense_shift(gram.space, shift))
    expected = ((g @ inverse) * g).sum(1) / gram.count
    found = solver.leverages(solver.init(gram, shift))
    torch.testing.assert_close(found, expected, rtol=1e-8, atol=1e-12)
    assert ((found > 0) & (found < 1)).all()
    own = solver.solve(solver.init(gram, shift), gram.rows).unwrap()
    torch.testing.assert_close(own.quadratic() / gram.count, expected, rtol=1e-7, atol=1e-10)


def test_ridge_leave_one_out_by_leverage() -> None:
    """Removing example i moves the weights by residual_i (C + D)^-1 g_i / N / (1 - h_i)."""
    space = a_space()
    x, y = some_rows(space, 30).flat(), torch.randn(30, dtype=F64)
    ridge = 0.1
    theta = torch.linalg.solve(x.T @ x / 30 + ridge * torch.eye(space.size, dtype=F64), x.T @ y / 30)
    gram = Gram(space, space.rows(x), 30)
    state = Woodbury().init(gram, Shift(0.0, dict.fromkeys(space.blocks, ridge)))
    h = Woodbury().leverages(state)
    step = Woodbury().solve(state, gram.rows).unwrap().flat() / 30
    keep = torch.arange(30) != 7
    without = torch.linalg.solve(
        x[keep].T @ x[keep] / 30 + ridge * torch.eye(space.size, dtype=F64), x[keep].T @ y[keep] / 30
    )
    predicted = theta + step[7] * (x[7] @ theta - y[7]) / (1 - h[7])
    torch.testing.assert_close(predicted, without, rtol=1e-9, atol=1e-11)


def test_rows_are_solved_independently_in_any_order() -> None:
    gram = a_gram()
    b = some_rows(gram.space, 6, 9)
    state = Woodbury().init(gram, Shift(1e-3))
    together = Woodbury().solve(state, b).unwrap()
    order = torch.tensor([4, 0, 5])
    alone = Woodbury().solve(state, b.take(order)).unwrap()
    assert worst(alone.flat(), together.flat()[order]) < 1e-12
    assert worst(together.take(order).flat(), together.flat()[order]) < 1e-12
    assert worst(together.scaled(3.0).flat(), 3 * together.flat()) < 1e-12
    weights = torch.arange(1.0, 7.0, dtype=F64)
    assert worst(together.scaled(weights).inner(b), weights[:, None] * together.inner(b)) < 1e-12
    assert len(together) == 6 and together.dtype is F64
    assert worst(together.squared_norms()[:, None], together.flat().square().sum(1, keepdim=True)) < 1e-12


def test_nothing_of_length_p_is_made(monkeypatch: pytest.MonkeyPatch) -> None:
    space = a_space()
    gram = Gram(space, outer_rows(space, 10), 10)
    b = outer_rows(space, 2, 9)
    monkeypatch.setattr(Rows, "flat", lambda self: pytest.fail("written out"))
    solution = Woodbury().solve(Woodbury().init(gram, uneven(space)), b)
    solution.unwrap().inner(outer_rows(space, 3, 4), Route.GHOST)
    solution.unwrap().quadratic()


def test_bad_input_is_refused_in_words() -> None:
    gram = a_gram()
    space = gram.space
    with pytest.raises(InvalidInput, match=r"needs the rows of C = .* and got Matrix"):
        Woodbury().init(spectrum_matrix(space), Shift(1.0))
    with pytest.raises(InvalidInput, match=r"which is 0.0 for some block; use a positive damping"):
        Woodbury().init(gram, Shift(0.0))
    with pytest.raises(TooLarge, match="The Gram matrix of 20 rows would take"):
        Woodbury().check_memory(gram, Budget(100))
    with pytest.raises(InvalidInput, match="no use for a preconditioner"):
        Woodbury().init(gram, Shift(1.0), preconditioner=gram)
    flat = some_rows(space, 4).flat().clone()
    flat[2, 3] = math.nan
    with pytest.raises(NonFinite, match="Rows 2 of the curvature hold NaN"):
        Woodbury().init(Gram(space, space.rows(flat), 4), Shift(1.0))
    bad = Woodbury().solve(Woodbury().init(gram, Shift(1.0)), space.rows(flat))
    assert (bad.result, bad.failed) == (Result.nonfinite_input, (2,))
    with pytest.raises(NonFinite, match=r"Rows: 2\."):
        bad.unwrap()
    zero = Woodbury().solve(Woodbury().init(gram, Shift(1.0)), space.rows(torch.zeros(1, 39, dtype=F64)))
    assert float(zero.residual) == 0.0 and not zero.unwrap().flat().any()

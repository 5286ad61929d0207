"""Spectral and Cholesky equal the dense solve, report the true residual, and refuse a saddle."""

from __future__ import annotations

import math
import re

import pytest
import torch

import pytorch_influence_functions as ptif
from pytorch_influence_functions.core.errors import InvalidInput, NonFinite, SolveFailed, TooLarge
from pytorch_influence_functions.curvature import GGN, Budget
from pytorch_influence_functions.linalg.dense import Matrix
from pytorch_influence_functions.linalg.gram import Gram
from pytorch_influence_functions.linalg.rows import Rows
from pytorch_influence_functions.linalg.scaled_identity import ScaledIdentity
from pytorch_influence_functions.linalg.shift import Shift
from pytorch_influence_functions.solvers import direct
from pytorch_influence_functions.solvers.base import Result, Solution
from pytorch_influence_functions.solvers.direct import Cholesky, Spectral
from tests.laws.solver_cases import (
    F64,
    a_space,
    dense_residual,
    dense_solve,
    implicit,
    outer_rows,
    some_rows,
    spectrum_matrix,
    uneven,
    worst,
)

SOLVERS = [Spectral(), Cholesky()]


@pytest.mark.parametrize("solver", SOLVERS, ids=repr)
@pytest.mark.parametrize("kind", ["uniform", "decay", "uneven"])
def test_equals_the_dense_solve(solver, kind: str) -> None:  # type: ignore[no-untyped-def]
    space = a_space()
    shift = {
        "uniform": Shift(1e-5),
        "decay": Shift(1e-5, dict.fromkeys(space.blocks, 1e-4)),
        "uneven": uneven(space, 1e-5),
    }[kind]
    matrix, b = spectrum_matrix(space), outer_rows(space, 50)
    expected = dense_solve(space, matrix.matrix, shift, b.flat())
    solution = solver.solve(solver.init(matrix, shift), b)
    value = solution.unwrap()
    assert worst(value.flat(), expected) < 1e-9
    # The damping is small enough for curvature to matter: the gradient alone is far off.
    grad_dot = b.flat() * (expected * b.flat()).sum() / b.flat().square().sum()
    assert worst(grad_dot, expected) > 0.5
    true = dense_residual(space, matrix.matrix, shift, value.flat(), b.flat())
    torch.testing.assert_close(solution.residual, true, rtol=0, atol=1e-10)


def test_damping_on_b_instead_of_x_would_be_caught() -> None:
    space = a_space()
    matrix, b, shift = spectrum_matrix(space), some_rows(space, 3), Shift(1e-2)
    right = dense_solve(space, matrix.matrix, shift, b.flat())
    planted = dense_solve(space, matrix.matrix, Shift(0.0), b.flat() * (1 + shift.damping))
    assert worst(planted, right) > 0.5
    assert float(dense_residual(space, matrix.matrix, shift, planted, b.flat()).min()) > 1e-2


def test_another_damping_does_not_refit(monkeypatch: pytest.MonkeyPatch) -> None:
    space = a_space()
    matrix, b = spectrum_matrix(space), some_rows(space, 3)
    Spectral().init(matrix, Shift(1e-3))
    monkeypatch.setattr(torch.linalg, "eigh", lambda *_: pytest.fail("refitted"))
    for damping in (1e-5, 1e-1):
        value = Spectral().solve(Spectral().init(matrix, Shift(damping)), b).unwrap()
        assert worst(value.flat(), dense_solve(space, matrix.matrix, Shift(damping), b.flat())) < 1e-9


@pytest.mark.parametrize("solver", SOLVERS, ids=repr)
def test_a_saddle_is_refused_with_a_damping_that_works(solver) -> None:  # type: ignore[no-untyped-def]
    space = a_space()
    matrix = spectrum_matrix(space, -0.2)
    with pytest.raises(SolveFailed, match=r"smallest eigenvalue of C plus weight decay is -0.2 ") as caught:
        solver.init(matrix, Shift(0.1))
    works = float(re.search(r"Absolute\((.*?)\)", str(caught.value)).group(1))  # type: ignore[union-attr]
    assert 0.2 < works < 0.3
    solver.solve(solver.init(matrix, Shift(works)), some_rows(space, 2)).unwrap()


@pytest.mark.parametrize("solver", SOLVERS, ids=repr)
def test_zero_damping_needs_a_positive_definite_curvature(solver) -> None:  # type: ignore[no-untyped-def]
    space = a_space()
    b = some_rows(space, 3)
    good = spectrum_matrix(space, 1e-3)
    value = solver.solve(solver.init(good, Shift(0.0)), b).unwrap()
    assert worst(value.flat(), dense_solve(space, good.matrix, Shift(0.0), b.flat())) < 1e-9
    g = some_rows(space, 5).flat()
    with pytest.raises(SolveFailed, match="not positive definite"):
        solver.init(Matrix(space, g.T @ g), Shift(0.0))


def test_identity_is_solved_block_by_block() -> None:
    space = a_space()
    b, shift = outer_rows(space, 3), uneven(space)
    value = Spectral().solve(Spectral().init(ScaledIdentity(space), shift), b).unwrap()
    assert worst(value.flat(), dense_solve(space, torch.eye(space.size), shift, b.flat())) < 1e-12


@pytest.mark.parametrize("solver", SOLVERS, ids=repr)
def test_float32_rows_get_a_float32_answer_from_a_float64_solve(solver) -> None:  # type: ignore[no-untyped-def]
    space = a_space()
    matrix, shift = spectrum_matrix(space), Shift(1e-5)
    b = some_rows(space, 4, dtype=torch.float32)
    solution = solver.solve(solver.init(matrix, shift), b)
    value = solution.unwrap()
    assert value.dtype is torch.float32
    assert worst(value.flat(), dense_solve(space, matrix.matrix, shift, b.flat())) < 1e-6
    true = dense_residual(space, matrix.matrix, shift, value.flat(), b.flat())
    assert float(solution.residual.max()) == pytest.approx(float(true.max()), rel=0.2)


@pytest.mark.parametrize("solver", SOLVERS, ids=repr)
def test_zero_rows_and_nan_rows(solver) -> None:  # type: ignore[no-untyped-def]
    space = a_space()
    state = solver.init(spectrum_matrix(space), Shift(1e-2))
    solution = solver.solve(state, space.rows(torch.zeros(2, space.size, dtype=F64)))
    assert solution.residual.tolist() == [0.0, 0.0]
    assert not solution.unwrap().flat().any()
    flat = some_rows(space, 3).flat().clone()
    flat[1, 0] = math.nan
    bad = solver.solve(state, space.rows(flat))
    assert bad.result is Result.nonfinite_input
    with pytest.raises(NonFinite, match=r"right-hand side holds NaN or infinity .* Rows: 1\."):
        bad.unwrap()


def test_wrong_operators_are_refused_in_words() -> None:
    space = a_space()
    matrix = spectrum_matrix(space)
    with pytest.raises(InvalidInput, match="needs an operator with known eigenvalues and got Implicit"):
        Spectral().init(implicit(matrix), Shift(1.0))
    with pytest.raises(InvalidInput, match="needs a dense Matrix and got Gram"):
        Cholesky().init(Gram(space, some_rows(space, 2), 2), Shift(1.0))
    with pytest.raises(TooLarge, match=r"of 39 parameters would take .* GiB and the bound is .* with memory="):
        Spectral().check_memory(matrix, Budget(1000))
    with pytest.raises(TooLarge, match="The Cholesky factor of 39 parameters"):
        Cholesky().check_memory(matrix, Budget(1000))
    with pytest.raises(InvalidInput, match="no use for a preconditioner"):
        Spectral().init(matrix, Shift(1.0), preconditioner=matrix)
    with pytest.raises(NonFinite, match="curvature matrix holds NaN"):
        Cholesky().init(Matrix(space, torch.full((39, 39), math.nan)), Shift(1.0))


def test_unwrap_names_the_worst_rows() -> None:
    space = a_space()
    residual = torch.tensor([1e-9, 0.5, 0.1, math.nan], dtype=F64)
    value: Rows = some_rows(space, 4)
    failed = Solution(value, residual, Result.max_steps_reached, 7, {"damping": 0.25}, (1, 2, 3), "More words.")
    with pytest.raises(SolveFailed) as caught:
        failed.unwrap()
    words = str(caught.value)
    assert "The allowed steps came before rtol" in words
    assert "More words. Relative residual nan in row 3, 5.0e-01 in row 1, 1.0e-01 in row 2" in words
    assert "after 7 steps (damping 0.25)" in words
    assert Solution(value, residual, Result.successful, 1).unwrap() is value


def test_the_effective_dimension_of_many_parameters_is_estimated(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    of = ptif.Problem(torch.nn.Linear(20, 10), ptif.CrossEntropy(), (torch.randn(300, 20), torch.arange(300) % 10))
    method = ptif.Influence(GGN(), Cholesky(), 0.01)
    exact = method.fit(of).members[0].effective_dimension
    monkeypatch.setattr(direct, "_INVERTED_UP_TO", 10)
    estimate = method.fit(of).members[0].effective_dimension
    assert estimate != exact
    assert abs(estimate - exact) < 4 * (2 * exact / direct._PROBES) ** 0.5

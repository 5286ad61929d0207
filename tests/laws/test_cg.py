"""Conjugate gradients: equal to the dense solve, row by row, and honest when they are not."""

from __future__ import annotations

import math
import re

import pytest
import torch
from torch import Tensor

import pytorch_influence_functions as ptif
from pytorch_influence_functions.core.errors import IncompleteSolveWarning, InvalidInput, NonFinite, SolveFailed
from pytorch_influence_functions.linalg.dense import Matrix
from pytorch_influence_functions.linalg.gram import Gram
from pytorch_influence_functions.linalg.implicit import Implicit
from pytorch_influence_functions.linalg.operator import AbstractOperator
from pytorch_influence_functions.linalg.rows import Rows
from pytorch_influence_functions.linalg.scaled_identity import ScaledIdentity
from pytorch_influence_functions.linalg.shift import Shift
from pytorch_influence_functions.solvers.base import Result
from pytorch_influence_functions.solvers.cg import CG
from tests.laws.solver_cases import (
    F64,
    a_space,
    dense_gram,
    dense_residual,
    dense_solve,
    implicit,
    outer_rows,
    some_rows,
    spectrum_matrix,
    uneven,
    worst,
)
from tests.tolerance import rounding

SHIFTS = {"uniform": Shift(1e-4), "uneven": uneven(a_space(), 1e-4)}


def counted(matrix: Matrix) -> tuple[Implicit, list[int]]:
    """A matrix-free operator that writes down how many rows each product had."""
    sizes: list[int] = []

    def product(rows: Rows, ids: Tensor | None) -> Rows:
        sizes.append(len(rows))
        return matrix.apply(rows)

    return Implicit(matrix.space, product, matrix.mean_eigenvalue, 1), sizes


@pytest.mark.parametrize("shift", SHIFTS.values(), ids=SHIFTS)
@pytest.mark.parametrize("n", [1, 7, 60])  # 60 rows are more than the 39 parameters
def test_equals_the_dense_solve(shift: Shift, n: int) -> None:
    space, solver = a_space(), CG(rtol=1e-11, max_steps=1000)
    matrix, b = spectrum_matrix(space), outer_rows(space, n)
    solution = solver.solve(solver.init(implicit(matrix), shift), b)
    value = solution.unwrap()
    expected = dense_solve(space, matrix.matrix, shift, b.flat())
    assert worst(value.flat(), expected) < 1e-8
    scale = (expected * b.flat()).sum(1, keepdim=True) / b.flat().square().sum(1, keepdim=True)
    assert worst(scale * b.flat(), expected) > 0.3  # a plain gradient would not do
    true = dense_residual(space, matrix.matrix, shift, value.flat(), b.flat())
    torch.testing.assert_close(solution.residual, true, rtol=1e-2, atol=rounding(F64))


def test_on_a_gram_with_fewer_rows_than_parameters() -> None:
    space, solver = a_space(), CG(rtol=1e-10)
    gram = Gram(space, outer_rows(space, 8), 8)
    b = some_rows(space, 3, 4)
    solution = solver.solve(solver.init(gram, Shift(1e-3)), b)
    assert worst(solution.unwrap().flat(), dense_solve(space, dense_gram(gram), Shift(1e-3), b.flat())) < 1e-8
    assert solution.steps < 20  # nine distinct eigenvalues


@pytest.mark.parametrize("shift", SHIFTS.values(), ids=SHIFTS)
def test_a_preconditioner_changes_the_work_and_not_the_answer(shift: Shift) -> None:
    space, solver = a_space(), CG(rtol=1e-11, max_steps=1000)
    matrix, b = spectrum_matrix(space), some_rows(space, 5)
    rough = spectrum_matrix(space).matrix + 0.02 * torch.eye(space.size, dtype=F64)
    inverse = Matrix(space, rough).shifted(shift.over(space.blocks)).function(lambda lam: 1 / lam)
    plain = solver.solve(solver.init(matrix, shift), b)
    helped = solver.solve(solver.init(matrix, shift, inverse), b)
    assert worst(helped.unwrap().flat(), plain.unwrap().flat()) < 1e-7
    assert helped.steps < plain.steps
    exact = matrix.shifted(shift.over(space.blocks)).function(lambda lam: 1 / lam)
    assert solver.solve(solver.init(matrix, shift, exact), b).steps <= 3


def test_rows_are_solved_independently_in_any_order() -> None:
    space, solver = a_space(), CG(rtol=1e-9, max_steps=1000)
    matrix, b = spectrum_matrix(space, 1e-3), some_rows(space, 6)
    state = solver.init(matrix, Shift(1e-3))
    together = solver.solve(state, b).unwrap().flat()
    for i in range(6):
        assert worst(solver.solve(state, b.take(slice(i, i + 1))).unwrap().flat(), together[i : i + 1]) < 1e-6
    order = torch.tensor([5, 2, 0, 1, 4, 3])
    assert worst(solver.solve(state, b.take(order)).unwrap().flat(), together[order]) < 1e-6


def test_done_rows_drop_out_of_the_product() -> None:
    space = a_space()
    matrix = spectrum_matrix(space, 1e-4)
    operator, sizes = counted(matrix)
    flat = some_rows(space, 3).flat().clone()
    flat[1] = matrix.eigen().vectors[:, -1]  # an eigenvector: one step
    flat[2] = 0.0
    solver = CG(rtol=1e-8, max_steps=500)
    solution = solver.solve(solver.init(operator, Shift(1e-3)), space.rows(flat))
    assert sizes[0] == 2  # the zero row never enters
    assert sizes[5] == 1  # the eigenvector has left
    assert solution.residual[2] == 0 and not solution.unwrap().flat()[2].any()
    assert worst(solution.value.flat()[1:2], flat[1:2] / (1 + 1e-3)) < 1e-10


def test_starts_where_it_is_told() -> None:
    space, solver = a_space(), CG(rtol=1e-9, max_steps=1000)
    matrix, b, shift = spectrum_matrix(space), some_rows(space, 3), Shift(1e-3)
    exact = space.rows(dense_solve(space, matrix.matrix, shift, b.flat()))
    solution = solver.solve(solver.init(matrix, shift), b, start=exact)
    assert solution.steps == 1 and worst(solution.unwrap().flat(), exact.flat()) == 0
    other = solver.solve(solver.init(matrix, shift), b, start=some_rows(space, 3, 8))
    assert worst(other.unwrap().flat(), exact.flat()) < 1e-5


def test_stopped_early_says_so_with_the_true_residual() -> None:
    space, solver = a_space(), CG(rtol=1e-8, max_steps=5, incomplete="error")
    matrix, b, shift = spectrum_matrix(space), some_rows(space, 3), Shift(1e-4)
    solution = solver.solve(solver.init(matrix, shift), b)
    assert (solution.result, solution.steps) == (Result.max_steps_reached, 5)
    true = dense_residual(space, matrix.matrix, shift, solution.value.flat(), b.flat())
    torch.testing.assert_close(solution.residual, true)
    assert float(true.min()) > 1e-3
    with pytest.raises(SolveFailed, match=r"Raise max_steps.* in row \d.* after 5 steps \(damping 0.0001\)"):
        solution.unwrap()


def test_only_the_slow_rows_fail() -> None:
    space, solver = a_space(), CG(rtol=1e-8, max_steps=5)
    matrix = spectrum_matrix(space)
    flat = some_rows(space, 3).flat().clone()
    flat[1] = matrix.eigen().vectors[:, -1]
    solution = solver.solve(solver.init(matrix, Shift(1e-4)), space.rows(flat))
    assert solution.failed == (0, 2)


@pytest.mark.parametrize("preconditioned", [False, True])
def test_negative_curvature_is_named_with_a_damping_that_works(preconditioned: bool) -> None:
    space, solver = a_space(), CG(rtol=1e-8, max_steps=500)
    matrix = spectrum_matrix(space, -0.2)
    b = some_rows(space, 3)
    inverse = ScaledIdentity(space, 2.0) if preconditioned else None
    solution = solver.solve(solver.init(implicit(matrix), Shift(0.01), inverse), b)
    assert solution.result is Result.negative_curvature
    assert -0.2 <= solution.notes["smallest_curvature"] < -0.01
    with pytest.raises(SolveFailed, match=r"GGN\(\) instead of Hessian.*In row \d, p\^T C p") as caught:
        solution.unwrap()
    works = float(re.search(r"Absolute\((.*?)\)", str(caught.value)).group(1))  # type: ignore[union-attr]
    assert 0.2 < works < 0.25
    solver.solve(solver.init(implicit(matrix), Shift(works)), b).unwrap()


def test_a_row_that_meets_negative_curvature_leaves_the_others_alone() -> None:
    space, solver = a_space(), CG(rtol=1e-8, max_steps=500)
    values = torch.linspace(0.1, 1.0, space.size, dtype=F64)
    values[0] = -0.5
    matrix = Matrix(space, values.diag())
    flat = some_rows(space, 3).flat().clone()
    flat[0, 0] = flat[2, 0] = 0.0  # these two never see the negative direction
    solution = solver.solve(solver.init(matrix, Shift(0.1)), space.rows(flat))
    assert solution.failed == (1,)
    for i in (0, 2):
        assert float(solution.residual[i]) < 1e-8
        assert torch.allclose(solution.value.flat()[i, 1:], flat[i, 1:] / (values[1:] + 0.1), rtol=1e-6)


def test_the_smallest_curvature_seen_is_a_rayleigh_quotient() -> None:
    space, solver = a_space(), CG(rtol=1e-10, max_steps=1000)
    matrix = spectrum_matrix(space, 1e-3)
    solution = solver.solve(solver.init(matrix, uneven(space, 0.0)), some_rows(space, 3))
    solution.unwrap()
    assert 1e-3 <= solution.notes["smallest_curvature"] < 0.05


@pytest.mark.parametrize(("rtol", "result"), [(None, Result.successful), (1e-9, Result.stagnated)])
def test_float32_stops_when_rounding_stops_it(rtol: float | None, result: Result) -> None:
    space, solver = a_space(), CG(rtol=rtol, max_steps=5000, incomplete="error")
    single = Matrix(space, spectrum_matrix(space, 1e-4).matrix.float())
    b = some_rows(space, 4, dtype=torch.float32)
    solution = solver.solve(solver.init(single, Shift(1e-3)), b)
    assert solution.result is result
    assert solution.steps < 1000
    true = dense_residual(space, single.matrix, Shift(1e-3), solution.value.flat(), b.flat())
    assert float(true.max()) < 1e-3
    assert float(solution.residual.max()) == pytest.approx(float(true.max()), rel=0.5)
    if result is Result.stagnated:
        with pytest.raises(SolveFailed, match=r"Use a float64 model without autocast .* or more damping"):
            solution.unwrap()


def test_a_residual_that_lies_would_be_caught() -> None:
    """The recursion's own residual says 'done' while the product is biased: the true one must win."""
    space = a_space()
    matrix, b = spectrum_matrix(space, 1e-2), some_rows(space, 2)
    calls = []

    def product(rows: Rows, ids: Tensor | None) -> Rows:
        calls.append(1)
        right = matrix.apply(rows)
        return right.scaled(0.5) if len(calls) == 1 else right  # one wrong product, then honest ones

    operator = Implicit(space, product, matrix.mean_eigenvalue, 1)
    solver = CG(rtol=1e-9, max_steps=2000)
    solution = solver.solve(solver.init(operator, Shift(1e-2)), b)
    solution.unwrap()
    assert float(dense_residual(space, matrix.matrix, Shift(1e-2), solution.value.flat(), b.flat()).max()) < 1e-9


def test_what_is_not_finite_is_told_apart() -> None:
    space, solver = a_space(), CG()
    flat = some_rows(space, 3).flat().clone()
    flat[1, 5] = math.inf
    bad = solver.solve(solver.init(ScaledIdentity(space), Shift(0.1)), space.rows(flat))
    assert (bad.result, bad.failed, bad.steps) == (Result.nonfinite_input, (1,), 0)
    with pytest.raises(NonFinite, match=r"before any solving.*Rows: 1\."):
        bad.unwrap()

    def product(rows: Rows, ids: Tensor | None) -> Rows:
        return rows.scaled(math.nan)

    operator: AbstractOperator = Implicit(space, product, lambda: 1.0, 1)
    broken = solver.solve(solver.init(operator, Shift(0.1)), some_rows(space, 2))
    assert broken.result is Result.nonfinite_output
    with pytest.raises(SolveFailed, match="right-hand side is finite, but the curvature's product is not"):
        broken.unwrap()


def test_an_indefinite_preconditioner_is_named() -> None:
    space, solver = a_space(), CG()
    matrix = spectrum_matrix(space, 1e-2)
    solution = solver.solve(solver.init(matrix, Shift(0.1), ScaledIdentity(space, -1.0)), some_rows(space, 2))
    with pytest.raises(SolveFailed, match="preconditioner is not positive definite"):
        solution.unwrap()


@pytest.mark.parametrize(
    ("kwargs", "match"),
    [
        ({"rtol": 0.0}, r"CG\(rtol=0.0\) must be a number above 0 and below 1; None follows the precision"),
        ({"rtol": 2.0}, "above 0 and below 1"),
        ({"max_steps": 0}, r"CG\(max_steps=0\) must be a whole number of at least 1"),
        ({"patience": 0}, r"CG\(patience=0\) must be a whole number of at least 1"),
        (
            {"incomplete": "keep"},
            r"CG\(incomplete='keep'\) must be 'warn' or 'error'; 'warn' hands back what was reached",
        ),
    ],
)
def test_nonsense_options_are_refused(kwargs, match) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(InvalidInput, match=match):
        CG(**kwargs)


def test_a_decay_of_unknown_blocks_is_refused() -> None:
    space = a_space()
    with pytest.raises(InvalidInput, match="must name every block"):
        CG().init(ScaledIdentity(space), Shift(0.1, {"nowhere": 1.0}))


def test_rounding_is_not_mistaken_for_negative_curvature() -> None:
    space, solver = a_space(), CG(rtol=1e-6, max_steps=300)
    g = some_rows(space, 5, dtype=torch.float32)
    b = some_rows(space, 20, 3, dtype=torch.float32)
    solution = solver.solve(solver.init(Gram(space, g, 5), Shift(0.0)), b)  # singular, and b is not in its range
    assert solution.result in (Result.stagnated, Result.max_steps_reached)


def test_columns_of_different_scale_are_solved_and_not_only_their_steepest() -> None:
    """The first step makes the residual small: it is nearly all along the one direction of the large column."""
    space = a_space()
    values = torch.logspace(-1, 9, space.size, dtype=F64)
    matrix = Matrix(space, torch.diag(values))
    b = space.rows(values.sqrt().expand(2, -1).clone())
    for rtol in (1e-2, 1e-3):
        solver = CG(rtol=rtol, max_steps=2000)
        solution = solver.solve(solver.init(matrix, Shift(1e-2)), b)
        difference = solution.unwrap().flat() - b.flat() / (values + 1e-2)
        size = (b.flat().square() / (values + 1e-2)).sum(1).sqrt()
        error = (difference.square() * (values + 1e-2)).sum(1).sqrt() / size
        assert float(error.max()) <= rtol
        assert solution.error is not None and bool((error <= solution.error).all())
        assert float(solution.error.max()) <= rtol
        assert float(solution.residual.max()) < 1e-3 * rtol  # which alone would not have done


def test_too_few_steps_for_such_columns_are_too_few_whatever_the_residual() -> None:
    space = a_space()
    values = torch.logspace(-1, 9, space.size, dtype=F64)
    b = space.rows(values.sqrt().expand(2, -1).clone())
    solver = CG(rtol=1e-2, max_steps=25)
    solution = solver.solve(solver.init(Matrix(space, torch.diag(values)), Shift(1e-2)), b)
    assert float(solution.residual.max()) < 1e-2
    assert (solution.result, solution.failed) == (Result.max_steps_reached, (0, 1))
    with pytest.warns(IncompleteSolveWarning, match=r"relative error in the norm of C \+ D up to \d"):
        solution.unwrap()


@pytest.mark.parametrize("damping", [0.0, 1e-12])
def test_without_a_damping_to_judge_by_the_last_steps_tell_the_error(damping: float) -> None:
    space, solver = a_space(), CG(rtol=1e-6, max_steps=2000)
    matrix, b = spectrum_matrix(space, 1e-2), some_rows(space, 3)
    solution = solver.solve(solver.init(matrix, Shift(damping)), b)
    value, expected = solution.unwrap().flat(), dense_solve(space, matrix.matrix, Shift(damping), b.flat())
    error = value - expected
    size = ((expected @ matrix.matrix) * expected).sum(1).sqrt()
    assert float((((error @ matrix.matrix) * error).sum(1).sqrt() / size).max()) <= 1e-6


def ages_and_incomes(dtype: torch.dtype) -> tuple[torch.nn.Linear, tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """A classifier, its training set and queries, with columns as they stand in a table that nobody scaled."""
    generator = torch.Generator().manual_seed(0)
    spread, centre = torch.tensor([10.0, 1e4, 1.0]), torch.tensor([40.0, 5e4, 0.0])
    x = (torch.randn(110, 3, generator=generator) * spread + centre).to(dtype)
    y = (torch.randn(110, generator=generator) > 0).long()
    model = torch.nn.Linear(3, 2).to(dtype)
    with torch.no_grad():
        model.weight.copy_(torch.tensor([[0.01, 1e-6, 0.1], [0.0, 1e-5, 0.0]]))
        model.bias.zero_()
    return model, (x[:100], y[:100]), (x[100:], y[100:])


@pytest.mark.parametrize("damping", [1e-3, 1e-1, 1e2])
def test_ages_and_incomes_as_they_stand_in_a_table_are_solved(damping: float) -> None:
    exact, solved = (
        ptif.attribute(*ages_and_incomes(F64), ptif.CrossEntropy(), method=method)
        for method in (ptif.exact(damping=damping), ptif.gauss_newton(damping))
    )
    far = (solved.values - exact.values).norm(dim=1) / exact.values.norm(dim=1)
    assert float(far.max()) < 1e-3
    assert solved.diagnostics.error_max <= 1e-3
    assert "relative error in the norm of C + lambda at most" in str(solved.diagnostics.checks()[1])


def test_ages_and_incomes_that_single_precision_cannot_solve_are_told() -> None:
    with pytest.warns(IncompleteSolveWarning, match="Use a float64 model"):
        scores = ptif.attribute(*ages_and_incomes(torch.float32), ptif.CrossEntropy(), method=ptif.gauss_newton(1e-3))
    assert scores.diagnostics.checks()[1].status == "bad"


def test_a_series_cut_short_with_a_small_residual_is_not_called_solved() -> None:
    method = ptif.methods.lissa(1e-2, steps=400, batch_size=100)
    scores = ptif.attribute(*ages_and_incomes(torch.float32), ptif.CrossEntropy(), method=method)
    assert scores.diagnostics.residual_max < 0.1 < scores.diagnostics.error_max
    solve = scores.diagnostics.checks()[1]
    assert solve.status == "warn" and "curvatures differ so much that a small residual proves little" in solve.text

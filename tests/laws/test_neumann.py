"""The Neumann series is LiSSA: the same recursion, the right fixed point, steps that are measured."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from pytorch_influence_functions.core.errors import IncompleteSolveWarning, InvalidInput, NonFinite, SolveFailed
from pytorch_influence_functions.linalg.gram import Gram
from pytorch_influence_functions.linalg.implicit import Implicit
from pytorch_influence_functions.linalg.rows import Rows
from pytorch_influence_functions.linalg.scaled_identity import ScaledIdentity
from pytorch_influence_functions.linalg.shift import Shift
from pytorch_influence_functions.solvers.base import Result
from pytorch_influence_functions.solvers.neumann import Neumann, Start
from tests.laws.solver_cases import (
    F64,
    a_space,
    dense_residual,
    dense_solve,
    implicit,
    implicit_examples,
    some_rows,
    spectrum_matrix,
    uneven,
    worst,
)
from tests.tolerance import gap, rounding


def recorded(n: int = 40) -> tuple[Implicit, list[Tensor | None]]:
    """A sampled operator that writes down which examples each product used."""
    inner, _ = implicit_examples(a_space(), n)
    seen: list[Tensor | None] = []

    def product(rows: Rows, ids: Tensor | None) -> Rows:
        seen.append(ids)
        return inner.product(rows, ids)

    return Implicit(inner.space, product, inner.mean_eigenvalue, n), seen


@pytest.mark.parametrize("batch", [1, 8])
def test_is_the_papers_recursion_exactly(batch: int) -> None:
    """h <- v + (1 - d) h - H_B h / s, started at v, and h / s at the end: step 1/s, lambda = d s."""
    operator, seen = recorded()
    scale, damp, depth = 25.0, 0.01, 60
    v = some_rows(operator.space, 3)
    solver = Neumann(step=1 / scale, steps=depth, batch_size=batch, tolerance=0.0)
    x = solver.solve(solver.init(operator, Shift(damp * scale)), v).value.flat()
    batches = [ids for ids in seen if ids is not None]
    assert len(batches) == depth and all(len(ids) == batch for ids in batches)
    h = v.flat().clone()
    for ids in batches:
        hv = operator.product(operator.space.rows(h), ids).flat()
        h = v.flat() + (1 - damp) * h - hv / scale
    assert worst(x, h / scale) < 1e-12


@pytest.mark.slow
@pytest.mark.parametrize("shift", [Shift(1e-2), uneven(a_space(), 1e-3)], ids=["uniform", "uneven"])
def test_the_fixed_point_is_the_dense_solve(shift: Shift) -> None:
    operator, dense = implicit_examples(a_space(), 100)
    b = some_rows(operator.space, 4)
    solver = Neumann(steps=20_000, batch_size=100, tolerance=1e-6)
    solution = solver.solve(solver.init(operator, shift), b)
    expected = dense_solve(operator.space, dense.matrix, shift, b.flat())
    assert worst(solution.unwrap().flat(), expected) < 1e-5
    scale = (expected * b.flat()).sum(1, keepdim=True) / b.flat().square().sum(1, keepdim=True)
    assert worst(scale * b.flat(), expected) > 0.3  # a plain gradient would not do
    assert solution.notes["stopped_early"] and solution.steps < 10_000
    true = dense_residual(operator.space, dense.matrix, shift, solution.value.flat(), b.flat())
    torch.testing.assert_close(solution.residual, true, rtol=1e-6, atol=1e-12)


@pytest.mark.slow
def test_the_stopping_rule_keeps_its_promise() -> None:
    """With full products the remaining error is at most the tolerance."""
    operator, dense = implicit_examples(a_space(), 100)
    b, shift = some_rows(operator.space, 4), Shift(1e-2)
    expected = dense_solve(operator.space, dense.matrix, shift, b.flat())
    for tolerance in (1e-1, 1e-2, 1e-4):
        solver = Neumann(steps=50_000, batch_size=100, tolerance=tolerance)
        value = solver.solve(solver.init(operator, shift), b).unwrap()
        assert tolerance / 1e3 < worst(value.flat(), expected) < tolerance


def test_tunes_itself_by_the_rule() -> None:
    operator, dense = implicit_examples(a_space(), 400)
    damping = 0.02
    b = some_rows(operator.space, 4)
    solution = Neumann().solve(Neumann().init(operator, Shift(damping)), b)
    values = torch.linalg.eigvalsh(dense.matrix)
    largest, trace = float(values[-1]), float(values.sum())
    batch = max(16, math.ceil(trace / largest))
    scale = 1.1 * (largest + damping + trace / batch)
    assert solution.notes["batch_size"] == batch
    assert 1 / solution.notes["step"] == pytest.approx(scale, rel=0.02)
    assert solution.notes["depth"] == pytest.approx(math.ceil(3 * scale / damping), rel=0.02)
    expected = dense_solve(operator.space, dense.matrix, Shift(damping), b.flat())
    assert worst(solution.unwrap().flat(), expected) < 0.15
    r = some_rows(operator.space, 60, 77).flat().T
    scores = torch.stack([(solution.value.flat() @ r).flatten(), (expected @ r).flatten()])
    dots = torch.stack([(b.flat() @ r).flatten(), (expected @ r).flatten()])
    assert float(torch.corrcoef(scores)[0, 1]) > 0.99 > 0.95 > float(torch.corrcoef(dots)[0, 1])


def test_an_operator_that_cannot_be_sampled_uses_full_products() -> None:
    space = a_space()
    matrix, b = spectrum_matrix(space, 1e-2), some_rows(space, 3)
    solver = Neumann(steps=20_000, tolerance=1e-5)
    solution = solver.solve(solver.init(matrix, Shift(0.1)), b)
    assert worst(solution.unwrap().flat(), dense_solve(space, matrix.matrix, Shift(0.1), b.flat())) < 1e-4
    gram = Gram(space, some_rows(space, 12), 4)  # not one row per example
    assert Neumann().solve(Neumann().init(gram, Shift(1.0)), b).notes["batch_size"] == 0


@pytest.mark.slow
@pytest.mark.parametrize("start", [Start.B, "b", "solved"])
def test_a_preconditioner_changes_the_work_and_not_the_fixed_point(start: Start | str) -> None:
    operator, dense = implicit_examples(a_space(), 100)
    b, shift = some_rows(operator.space, 4), Shift(1e-3)
    inverse = dense.function(lambda lam: 1 / (lam + 5e-3))
    solver = Neumann(batch_size=100, tolerance=1e-7, steps=2000, start=start)
    solution = solver.solve(solver.init(operator, shift, inverse), b)
    expected = dense_solve(operator.space, dense.matrix, shift, b.flat())
    assert worst(solution.unwrap().flat(), expected) < 1e-5
    plain = Neumann(batch_size=100, tolerance=1e-7, steps=10 * solution.steps)
    assert worst(plain.solve(plain.init(operator, shift), b).value.flat(), expected) > 1e-3


def test_a_preconditioner_on_random_batches_is_tuned_too() -> None:
    operator, dense = implicit_examples(a_space(), 400)
    b, shift = some_rows(operator.space, 4), Shift(1e-2)
    inverse = dense.function(lambda lam: 1 / (lam + 2e-2))
    solution = Neumann().solve(Neumann().init(operator, shift, inverse), b)
    assert solution.notes["batch_size"] == 128
    assert worst(solution.unwrap().flat(), dense_solve(operator.space, dense.matrix, shift, b.flat())) < 0.1


def test_the_series_starts_with_the_first_step_taken() -> None:
    operator, dense = implicit_examples(a_space(), 10)
    b, shift = some_rows(operator.space, 2), Shift(0.1)
    solver = Neumann(step=0.1, steps=1, batch_size=10)
    got = solver.solve(solver.init(operator, shift), b).value.flat()
    first = 0.1 * b.flat()  # from zero
    second = first + 0.1 * (b.flat() - first @ dense.matrix - 0.1 * first)
    assert worst(got, second) < 1e-12


def test_the_seed_alone_decides_the_batches() -> None:
    operator, seen = recorded()
    b = some_rows(operator.space, 2)

    def run(seed: int) -> tuple[Tensor, list[Tensor | None]]:
        seen.clear()
        solver = Neumann(step=0.1, steps=15, batch_size=8, seed=seed)
        return solver.solve(solver.init(operator, Shift(0.5)), b).value.flat(), list(seen)

    before = torch.random.get_rng_state()
    first, batches = run(0)
    assert torch.equal(before, torch.random.get_rng_state())
    torch.manual_seed(123)
    assert gap(run(0)[0], first) < rounding(first) and gap(run(1)[0], first) > 1e-3
    epoch = torch.cat([ids for ids in batches[:5] if ids is not None])
    assert sorted(epoch.tolist()) == list(range(40))  # without replacement until used up


def bent(operator: Implicit, direction: Tensor, depth: float) -> Implicit:
    """The same sampled curvature, less `depth` along one direction: negative there."""

    def product(rows: Rows, ids: Tensor | None) -> Rows:
        along = (rows.flat() @ direction)[:, None] * direction
        return operator.space.rows(operator.product(rows, ids).flat() - depth * along)

    return Implicit(operator.space, product, operator.mean_eigenvalue, operator.examples)


@pytest.mark.slow
@pytest.mark.parametrize("curve", ["semidefinite", "negative"])
def test_with_random_batches_it_stops_once_its_start_is_forgotten(curve: str) -> None:
    """The oracle: the same batches from the exact answer. What is left between the two is what the start still does."""
    inner, seen = recorded(60)
    space, d, step, tolerance = inner.space, 0.25, 1 / 25, 1e-4
    _, dense = implicit_examples(space, 60)
    eigenvalues, vectors = torch.linalg.eigh(dense.matrix)
    weakest = vectors[:, 0]
    depth = 0.0 if curve == "semidefinite" else float(eigenvalues[0]) + 0.15
    operator = bent(inner, weakest, depth)
    matrix = dense.matrix - depth * torch.outer(weakest, weakest)
    b = some_rows(space, 1)
    solver = Neumann(step=step, steps=5000, batch_size=4, tolerance=tolerance)
    solution = solver.solve(solver.init(operator, Shift(d)), b)
    batches = [ids for ids in seen if ids is not None]
    taken = len(batches)
    slowest = d if curve == "semidefinite" else d - 0.15
    due = -math.log(tolerance) / (step * slowest)
    assert solution.notes["stopped_early"] and 0.7 * due < taken < 1.3 * due < 5000
    near, far = torch.linalg.solve(matrix + d * torch.eye(space.size, dtype=F64), b.flat().T).T, step * b.flat()
    for ids in batches:
        near, far = (x + step * (b.flat() - d * x - operator.product(space.rows(x), ids).flat()) for x in (near, far))
    assert gap(solution.value.flat(), far) < rounding(far, condition=1e3)
    assert tolerance / 1e2 < float((far - near).norm() / far.norm()) < tolerance


@pytest.mark.slow
def test_a_row_stops_where_it_would_alone() -> None:
    operator, _ = implicit_examples(a_space(), 60)
    b = operator.space.rows(
        some_rows(operator.space, 4).flat() * torch.tensor([[1.0], [1e-3], [1.0], [1e3]], dtype=F64)
    )
    solver = Neumann(step=0.04, steps=5000, batch_size=4, tolerance=1e-3)
    state = solver.init(operator, Shift(0.25))
    together = solver.solve(state, b).value.flat()
    for q in range(4):
        alone = solver.solve(state, b.take(torch.tensor([q]))).value.flat()
        assert gap(alone[0], together[q]) < rounding(alone, condition=1e3)


def test_no_room_is_taken_where_the_depth_is_too_short_to_stop_early() -> None:
    operator, widths = implicit_examples(a_space(), 60)[0], []

    def product(rows: Rows, ids: Tensor | None) -> Rows:
        widths.append(len(rows))
        return operator.product(rows, ids)

    watched = Implicit(operator.space, product, operator.mean_eigenvalue, 60)
    solver = Neumann(step=0.04, steps=1000, batch_size=4, tolerance=1e-4)  # due after 921 steps
    solution = solver.solve(solver.init(watched, Shift(0.25)), some_rows(operator.space, 2))
    assert set(widths) == {2} and not solution.notes["stopped_early"]


@pytest.mark.slow
def test_repeats_are_averaged() -> None:
    operator, dense = implicit_examples(a_space(), 100)
    b, shift = some_rows(operator.space, 2), Shift(0.05)

    def run(repeats: int, seed: int = 0) -> Tensor:
        solver = Neumann(step=0.3, steps=300, batch_size=8, repeats=repeats, seed=seed, tolerance=0.0)
        return solver.solve(solver.init(operator, shift), b).value.flat()

    assert worst(run(3), (run(1, 0) + run(1, 1) + run(1, 2)) / 3) < 1e-12
    expected = dense_solve(operator.space, dense.matrix, shift, b.flat())
    assert worst(run(9), expected) < 0.6 * worst(run(1), expected)


def test_rows_are_solved_independently_in_any_order() -> None:
    operator, _ = implicit_examples(a_space(), 40)
    b, solver = some_rows(operator.space, 5), Neumann(step=0.1, steps=40, batch_size=8)
    state = solver.init(operator, Shift(0.1))
    together = solver.solve(state, b).value.flat()
    order = torch.tensor([3, 0])
    assert worst(solver.solve(state, b.take(order)).value.flat(), together[order]) < 1e-10


def test_divergence_names_the_step_that_would_have_worked() -> None:
    operator, _ = implicit_examples(a_space(), 400)
    b = some_rows(operator.space, 3)
    solver = Neumann(step=20.0, steps=400, batch_size=16)
    solution = solver.solve(solver.init(operator, Shift(0.01)), b)
    assert solution.result is Result.diverged and solution.steps < 400
    with pytest.raises(SolveFailed, match=r"The step was 20 \(scale 0.05\); with batches of 16, step=0\.\d+"):
        solution.unwrap()
    better = Neumann(step=solution.notes["step_that_works"], steps=400, batch_size=16)
    better.solve(better.init(operator, Shift(0.01)), b).unwrap()


def test_divergence_to_infinity_is_divergence() -> None:
    space = a_space()
    solver = Neumann(step=1e60, steps=50)
    b = some_rows(space, 2)
    assert solver.solve(solver.init(ScaledIdentity(space), Shift(0.01)), b).result is Result.diverged


@pytest.mark.parametrize("options", [Neumann(), Neumann(step=0.5, steps=3000)], ids=["tuned", "given"])
def test_negative_curvature_below_minus_lambda_is_named(options: Neumann) -> None:
    space = a_space()
    matrix = spectrum_matrix(space, -0.2)
    solution = options.solve(options.init(implicit(matrix), Shift(0.05)), some_rows(space, 2))
    assert solution.result is Result.negative_curvature
    with pytest.raises(SolveFailed, match=r"smallest eigenvalue of C is about -0.2, .*Absolute\(0.2"):
        solution.unwrap()
    # Above it the same Hessian is fine.
    enough = Neumann(steps=20_000)
    enough.solve(enough.init(implicit(matrix), Shift(0.3)), some_rows(space, 2)).unwrap()


def test_a_series_cut_too_short_says_so_when_asked() -> None:
    operator, _ = implicit_examples(a_space(), 40)
    solver = Neumann(step=0.1, steps=2, batch_size=40, rtol=0.1)
    solution = solver.solve(solver.init(operator, Shift(0.01)), some_rows(operator.space, 2))
    assert float(solution.residual.min()) > 0.1 and solution.failed == (0, 1)
    with pytest.warns(IncompleteSolveWarning, match=r"Raise max_steps \(or steps\)"):
        assert solution.unwrap() is solution.value
    strict = replace(solver, incomplete="error")
    with pytest.raises(SolveFailed, match=r"Raise max_steps \(or steps\)"):
        strict.solve(strict.init(operator, Shift(0.01)), some_rows(operator.space, 2)).unwrap()


def test_worse_than_zero_is_never_success() -> None:
    space = a_space()
    b = space.rows(torch.cat([torch.ones(1, space.size, dtype=F64), torch.zeros(1, space.size, dtype=F64)]))
    solver = Neumann(step=2.1, steps=1)  # x = -0.25 b where b / 1.01 was wanted
    solution = solver.solve(solver.init(ScaledIdentity(space), Shift(0.01)), b)
    assert (solution.result, solution.failed) == (Result.unsettled, (0,))
    assert solution.residual[1] == 0


def test_bad_input_is_refused_in_words() -> None:
    space = a_space()
    flat = some_rows(space, 3).flat().clone()
    flat[2, 0] = math.nan
    bad = Neumann().solve(Neumann().init(ScaledIdentity(space), Shift(0.1)), space.rows(flat))
    with pytest.raises(NonFinite, match=r"Rows: 2\."):
        bad.unwrap()
    with pytest.raises(InvalidInput, match="ScaledIdentity is not a mean over examples"):
        Neumann(batch_size=8).init(ScaledIdentity(space), Shift(0.1))
    with pytest.raises(InvalidInput, match="takes its depth from the damping, which is 0 here"):
        Neumann().init(ScaledIdentity(space), Shift(0.0))


@pytest.mark.parametrize(
    ("kwargs", "match"),
    [
        ({"step": 0.0}, r"Neumann\(step=0.0\) must be a finite number above 0"),
        ({"step": math.inf}, "a finite number above 0"),
        ({"steps": 0}, r"Neumann\(steps=0\)"),
        ({"batch_size": -1}, r"Neumann\(batch_size=-1\)"),
        ({"repeats": 0}, r"Neumann\(repeats=0\)"),
        ({"tolerance": -1.0}, "at least 0; 0 runs every step"),
        ({"start": "nowhere"}, r"Neumann\(start='nowhere'\) must be 'b'"),
    ],
)
def test_nonsense_options_are_refused(kwargs, match) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(InvalidInput, match=match):
        Neumann(**kwargs)

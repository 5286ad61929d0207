"""Operators equal their dense matrices; Lanczos and Hutchinson equal eigh and trace."""

from __future__ import annotations

import math

import pytest
import torch

from pytorch_influence_functions.core.errors import InvalidInput, NonFinite, TooLarge
from pytorch_influence_functions.curvature import Budget
from pytorch_influence_functions.curvature.from_rows import check_dense
from pytorch_influence_functions.linalg.dense import Eigen, Matrix
from pytorch_influence_functions.linalg.gram import Gram
from pytorch_influence_functions.linalg.implicit import Implicit
from pytorch_influence_functions.linalg.lanczos import estimate_extremes
from pytorch_influence_functions.linalg.scaled_identity import ScaledIdentity
from pytorch_influence_functions.linalg.trace import hutchinson_trace
from tests.laws.solver_cases import (
    F64,
    a_space,
    dense_gram,
    implicit,
    implicit_examples,
    outer_rows,
    some_rows,
    spectrum_matrix,
    uneven,
    worst,
)


def test_gram_is_its_dense_matrix() -> None:
    space = a_space()
    gram = Gram(space, outer_rows(space, 12, terms=2), 12)
    dense = dense_gram(gram)
    b = some_rows(space, 5, 1)
    assert worst(gram.apply(b).flat(), b.flat() @ dense) < 1e-12
    assert gram.mean_eigenvalue() == pytest.approx(float(dense.trace()) / space.size, rel=1e-12)
    g = gram.rows.flat()
    torch.testing.assert_close(gram.gram(), g @ g.T, rtol=1e-12, atol=1e-12)
    assert gram.gram() is gram.gram()
    ids = torch.tensor([3, 7, 1])
    assert worst(gram.apply(b, ids).flat(), b.flat() @ g[ids].T @ g[ids] / 3) < 1e-12


def test_gram_by_group_sums_to_the_whole() -> None:
    space = a_space()
    gram = Gram(space, outer_rows(space, 6), 6)
    parts = gram.gram_by({name: i for i, name in enumerate(space.blocks)})
    assert len(parts) == 2
    torch.testing.assert_close(parts[0] + parts[1], gram.gram(), rtol=1e-12, atol=1e-12)
    first = next(iter(space.blocks))
    g = gram.rows.blocks[first].dense().flatten(1)
    torch.testing.assert_close(parts[0], g @ g.T, rtol=1e-12, atol=1e-12)


def test_combination_in_pieces_is_the_matrix_product(monkeypatch: pytest.MonkeyPatch) -> None:
    space = a_space()
    rows, c = outer_rows(space, 11, terms=2), torch.randn(4, 11, dtype=F64)
    monkeypatch.setattr("pytorch_influence_functions.linalg.chunks.CHUNK_NUMBERS", 60)
    assert worst(rows.combine(c).flat(), c @ rows.flat()) < 1e-12


def test_rows_that_are_not_examples_cannot_be_sampled() -> None:
    space = a_space()
    gram = Gram(space, some_rows(space, 12), 4)
    assert gram.examples == 0
    with pytest.raises(InvalidInput, match="not one per example"):
        gram.apply(some_rows(space, 1), torch.tensor([0]))


@pytest.mark.parametrize("kind", ["matrix", "identity", "eigen"])
def test_functions_of_a_spectral_operator_compose(kind: str) -> None:
    space = a_space()
    matrix = spectrum_matrix(space, 1e-2)
    operator = {"matrix": matrix, "identity": ScaledIdentity(space, 3.0), "eigen": matrix.eigen()}[kind]
    b = some_rows(space, 3)
    root = operator.function(torch.sqrt)
    assert worst(root.apply(root.apply(b)).flat(), operator.apply(b).flat()) < 1e-10
    inverse = operator.function(lambda lam: 1 / (lam + 0.1))
    back = operator.apply(inverse.apply(b)).flat() + 0.1 * inverse.apply(b).flat()
    assert worst(back, b.flat()) < 1e-10
    low, high = operator.extremes()
    assert low <= operator.mean_eigenvalue() <= high


@pytest.mark.parametrize("kind", ["matrix", "identity", "eigen"])
def test_shifted_adds_one_number_per_block(kind: str) -> None:
    space = a_space()
    matrix = spectrum_matrix(space, 1e-2)
    operator = {"matrix": matrix, "identity": ScaledIdentity(space, 3.0), "eigen": matrix.eigen()}[kind]
    shift, b = uneven(space, 0.0), some_rows(space, 3)
    expected = operator.apply(b).flat() + shift.apply(b).flat()
    assert worst(operator.shifted(shift.decay).apply(b).flat(), expected) < 1e-12


def test_eigen_is_computed_once_per_decay() -> None:
    space = a_space()
    matrix = spectrum_matrix(space)
    assert matrix.eigen() is matrix.eigen()
    assert isinstance(matrix.shifted(uneven(space).decay), Eigen)
    assert matrix.shifted(uneven(space).decay) is matrix.shifted(uneven(space).decay)


def test_identity_with_scale_one_is_the_gradient_itself() -> None:
    space = a_space()
    b = outer_rows(space, 2)
    assert ScaledIdentity(space).apply(b) is b
    assert ScaledIdentity(space).mean_eigenvalue() == 1.0


def test_implicit_asks_for_the_trace_once() -> None:
    space, calls = a_space(), []

    def mean() -> float:
        calls.append(1)
        return 0.5

    operator = Implicit(space, lambda rows, ids: rows, mean, 10)
    assert (operator.mean_eigenvalue(), operator.mean_eigenvalue(), len(calls)) == (0.5, 0.5, 1)


@pytest.mark.parametrize("low", [1e-6, -0.5])
def test_lanczos_finds_both_ends(low: float) -> None:
    space = a_space()
    matrix = spectrum_matrix(space, low)
    values = torch.linalg.eigvalsh(matrix.matrix)
    found = estimate_extremes(implicit(matrix), 39, dtype=F64)
    assert found.largest == pytest.approx(float(values[-1]), rel=1e-9)
    assert found.smallest == pytest.approx(float(values[0]), abs=1e-9)
    few = estimate_extremes(implicit(matrix), 12, dtype=F64)
    assert few.largest <= float(values[-1]) + 1e-12
    assert few.smallest >= float(values[0]) - 1e-12
    assert few.largest > 0.9 * float(values[-1])


def test_lanczos_stops_in_an_invariant_space_without_ghosts() -> None:
    space = a_space()
    assert estimate_extremes(ScaledIdentity(space, 2.5), 20, dtype=F64) == pytest.approx((2.5, 2.5))
    g = some_rows(space, 3)
    found = estimate_extremes(Gram(space, g, 1), 39, dtype=F64)
    assert found.largest == pytest.approx(float(torch.linalg.eigvalsh(g.flat() @ g.flat().T)[-1]), rel=1e-10)
    assert found.smallest == pytest.approx(0.0, abs=1e-10)


def test_estimates_never_touch_the_global_generator() -> None:
    operator, _ = implicit_examples(a_space(), 20)
    before = torch.random.get_rng_state()
    first = estimate_extremes(operator, 5, 3, dtype=F64), hutchinson_trace(operator, 4, 3, dtype=F64)
    assert torch.equal(before, torch.random.get_rng_state())
    torch.manual_seed(99)
    assert first == (estimate_extremes(operator, 5, 3, dtype=F64), hutchinson_trace(operator, 4, 3, dtype=F64))
    assert first[1] != hutchinson_trace(operator, 4, 4, dtype=F64)


def test_hutchinson_is_the_trace() -> None:
    space = a_space()
    matrix = spectrum_matrix(space, 1e-2)
    trace = float(matrix.matrix.trace())
    off = matrix.matrix - matrix.matrix.diagonal().diag()
    deviation = math.sqrt(2 * float(off.square().sum()) / 400)
    assert abs(hutchinson_trace(matrix, 400, dtype=F64) - trace) < 4 * deviation
    diagonal = Matrix(space, matrix.matrix.diagonal().diag())
    assert hutchinson_trace(diagonal, 1, dtype=F64) == pytest.approx(trace, rel=1e-12)


def test_bad_operators_are_refused_in_words() -> None:
    space = a_space()
    with pytest.raises(InvalidInput, match=r"shape \(3, 3\); the space has 39 parameters"):
        Matrix(space, torch.eye(3))
    with pytest.raises(InvalidInput, match="at least 1"):
        Gram(space, some_rows(space, 2), 0)
    with pytest.raises(NonFinite, match="holds NaN"):
        Matrix(space, torch.full((39, 39), math.nan)).eigen()
    with pytest.raises(TooLarge, match=r"over 100,000 parameters would take 373 GiB and the bound is 2 GiB"):
        check_dense(100_000, Budget(2 << 30))

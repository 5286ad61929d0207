"""One Lanczos recurrence for extremes, density and eigenpairs; every operator's own answer about its eigenvalues."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from pytorch_influence_functions.core.errors import NonFinite
from pytorch_influence_functions.linalg.block_diagonal import BlockDiagonal, subspace
from pytorch_influence_functions.linalg.chunks import chunks
from pytorch_influence_functions.linalg.dense import Matrix
from pytorch_influence_functions.linalg.diagonal import DiagonalOperator
from pytorch_influence_functions.linalg.gram import Gram
from pytorch_influence_functions.linalg.implicit import Implicit
from pytorch_influence_functions.linalg.kronecker import Kronecker
from pytorch_influence_functions.linalg.kronecker_block import KroneckerBlock
from pytorch_influence_functions.linalg.lanczos import (
    BlockLanczos,
    estimate_density,
    estimate_extremes,
    leading_eigenpairs,
    power_iteration,
)
from pytorch_influence_functions.linalg.low_rank import LowRank
from pytorch_influence_functions.linalg.scaled_identity import ScaledIdentity
from tests.laws.solver_cases import F64, a_space, implicit, some_rows, spectrum_matrix

CPU = torch.device("cpu")


def signs(probes: int, size: int, seed: int) -> Tensor:
    """The probes that `estimate_density` draws."""
    generator = torch.Generator().manual_seed(seed)
    return (2 * torch.randint(0, 2, (probes, size), generator=generator, dtype=torch.int8) - 1).to(F64)


# --------------------------------------------------------------------------- the recurrence


@pytest.mark.parametrize("width", [1, 3, 7])
def test_the_basis_is_orthonormal_and_the_projection_is_that_of_the_operator(width: int) -> None:
    matrix = spectrum_matrix(a_space(), -0.3)
    lanczos = BlockLanczos.with_room(implicit(matrix), 21, F64, CPU)
    generator = torch.Generator().manual_seed(1)
    lanczos.run(lanczos.orthonormalise(torch.randn(width, 39, generator=generator, dtype=F64)))
    v = lanczos.basis[: lanczos.used]
    assert lanczos.used == 21
    torch.testing.assert_close(v @ v.T, torch.eye(21, dtype=F64), rtol=0, atol=1e-13)
    torch.testing.assert_close(lanczos.projection, v @ matrix.matrix @ v.T, rtol=0, atol=1e-13)


def test_a_product_that_is_not_finite_is_named() -> None:
    space = a_space()
    broken = Implicit(space, lambda rows, ids: rows.scaled(float("nan")), lambda: 1.0, 10)
    for ask in (
        lambda: estimate_extremes(broken, dtype=F64),
        lambda: estimate_density(broken, dtype=F64),
        lambda: leading_eigenpairs(broken, 2, None, 2, 0, F64, CPU),
    ):
        with pytest.raises(NonFinite, match="product holds NaN or infinity; look for them in weights"):
            ask()


# --------------------------------------------------------------------------- density


@pytest.mark.parametrize("power", [0, 1, 2, 3, 4, 5])
def test_block_quadrature_is_exact_for_polynomials(power: int) -> None:
    """z^T C^k z for every probe z, to degree 2 steps - 1 = 5, by the dense matrix."""
    matrix = spectrum_matrix(a_space(), -0.5)
    z = signs(4, 39, seed=2)
    density = estimate_density(implicit(matrix), steps=3, probes=4, seed=2, dtype=F64)
    expected = ((z @ torch.linalg.matrix_power(matrix.matrix, power)) * z).sum(1)
    torch.testing.assert_close((density.values**power * density.weights).sum(1), expected, rtol=1e-11, atol=1e-11)
    trace, error = density.sum(lambda x: x**power)
    assert trace == pytest.approx(float(expected.mean()), rel=1e-11)
    assert error == pytest.approx(float(expected.std()) / 2, rel=1e-8, abs=1e-10)


def test_quadrature_with_room_for_everything_is_exact_for_any_function() -> None:
    """More vectors than parameters: a basis of the whole space, so z^T f(C) z to rounding, repeated eigenvalues too."""
    space = a_space()
    matrix = spectrum_matrix(space, 1e-3)
    matrix.matrix[:] = (
        matrix.function(lambda values: (4 * values).ceil()).apply(space.rows(torch.eye(39, dtype=F64))).flat()
    )
    matrix = Matrix(space, (matrix.matrix + matrix.matrix.T) / 2)
    z = signs(50, 39, seed=0)
    density = estimate_density(implicit(matrix), steps=30, probes=50, dtype=F64)
    inverse = torch.linalg.inv(matrix.matrix + 0.1 * torch.eye(39, dtype=F64))
    expected = ((z @ inverse) * z).sum(1)
    torch.testing.assert_close((density.weights / (density.values + 0.1)).sum(1), expected, rtol=1e-9, atol=1e-9)
    assert density.values.shape[1] <= 39


# --------------------------------------------------------------------------- power iteration


def test_power_iteration_needs_no_symmetry() -> None:
    generator = torch.Generator().manual_seed(4)
    turn = torch.randn(9, 9, generator=generator, dtype=F64)
    values = torch.tensor([3.0, -1.0, 0.5, 0.4, 0.3, 0.2, 0.1, 0.05, 0.01], dtype=F64)
    matrix = turn @ values.diag() @ torch.linalg.inv(turn)
    start = torch.randn(1, 9, generator=generator, dtype=F64)
    assert power_iteration(lambda x: x @ matrix.T, start, 60) == pytest.approx(3.0, rel=1e-12)
    assert power_iteration(lambda x: 0 * x, start, 5) == 0.0
    assert power_iteration(lambda x: x, torch.zeros(9), 5) == 0.0


# --------------------------------------------------------------------------- what an operator knows


def _operators() -> dict[str, Any]:
    space = a_space()
    matrix = spectrum_matrix(space, -0.2)
    generator = torch.Generator().manual_seed(6)

    def drawn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=F64)

    def side(size: int) -> Tensor:
        return torch.linalg.qr(drawn(size, size))[0]

    blocks = {}
    for name, block in space.blocks.items():
        o, i = block.shape
        blocks[name] = KroneckerBlock(side(o), side(i), drawn(o, i).square())
    vectors = torch.linalg.qr(drawn(39, 5))[0].T
    numbers = {name: float(k + 1) for k, name in enumerate(space.blocks)}
    return {
        "matrix": matrix,
        "eigen": spectrum_matrix(space, -0.2).eigen(),
        "diagonal": DiagonalOperator(space, drawn(39)),
        "identity": ScaledIdentity(space, numbers),
        "Kronecker": Kronecker(space, blocks),
        "low rank": LowRank.of(space, vectors, drawn(5), rest=0.3),
        "low rank, shifted": LowRank.of(space, vectors, drawn(5), rest=0.3).shifted(numbers),
        "fewer rows than parameters": Gram(space, some_rows(space, 7), 7),
        "more rows than parameters": Gram(space, some_rows(space, 60), 20),
    }


@pytest.mark.parametrize("name", _operators())
def test_known_eigenvalues_are_those_of_the_dense_matrix(name: str) -> None:
    operator = _operators()[name]
    dense = operator.apply(operator.space.rows(torch.eye(39, dtype=F64))).flat()
    values = torch.linalg.eigvalsh((dense + dense.T) / 2)
    needs_a_decomposition = isinstance(operator, (Matrix, Gram))
    assert operator.eigenvalues_at_hand is not needs_a_decomposition
    density = operator.known_eigenvalues()
    assert operator.eigenvalues_at_hand, "they have been computed now"
    assert density is not None and density.exact
    repeated = torch.repeat_interleave(density.values[0], density.weights[0].round().long())
    torch.testing.assert_close(repeated.sort().values, values, rtol=1e-9, atol=1e-10)
    assert density.extremes == pytest.approx((float(values[0]), float(values[-1])), abs=1e-10)
    assert density.sum(lambda x: x)[0] == pytest.approx(float(dense.trace()), rel=1e-10)


def test_operators_known_by_products_only_say_so() -> None:
    space = a_space()
    matrix = spectrum_matrix(space)
    parts = {name: ScaledIdentity(subspace(space, [name])) for name in space.blocks}
    for operator in (implicit(matrix), BlockDiagonal(space, parts)):
        assert operator.known_eigenvalues() is None and not operator.eigenvalues_at_hand
    matrix.shifted(dict.fromkeys(space.blocks, 1.0))
    assert not matrix.eigenvalues_at_hand, "a decomposition of C + D is not one of C"


# --------------------------------------------------------------------------- chunks


@pytest.mark.parametrize(("count", "each", "most"), [(0, 3, 10), (1, 100, 10), (7, 3, 10), (9, 3, 9), (5, 0, 10)])
def test_chunks_cover_every_item_once_within_the_bound(count: int, each: int, most: int) -> None:
    parts = chunks(count, each, most)
    assert [i for part in parts for i in range(count)[part]] == list(range(count))
    assert all((p.stop - p.start) * each <= max(most, each) for p in parts)
    assert len(parts) <= -(-count * max(each, 1) // (most - most % max(each, 1) or max(each, 1)))

"""Laws of low-rank and diagonal curvature: values against dense float64, whatever the spectrum looks like."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import pytorch_influence_functions as ptif
from pytorch_influence_functions.core.errors import SolveFailed
from pytorch_influence_functions.curvature import GGN, Arnoldi, EmpiricalFisher, Fisher, Hessian, Nystrom
from pytorch_influence_functions.curvature.diagonal import sum_of_squares
from pytorch_influence_functions.gradients.per_example import Derivatives
from pytorch_influence_functions.linalg.blocks import AbstractBlock, Conv, Dense, Indexed, Outer
from pytorch_influence_functions.linalg.dense import Matrix
from pytorch_influence_functions.linalg.lanczos import Eigenpairs, leading_eigenpairs
from pytorch_influence_functions.linalg.low_rank import LowRank
from pytorch_influence_functions.linalg.nystrom import nystrom_pairs, sketch
from pytorch_influence_functions.linalg.shift import Shift
from pytorch_influence_functions.linalg.space import Space
from pytorch_influence_functions.solvers.cg import CG
from pytorch_influence_functions.solvers.direct import Spectral
from tests.laws.solver_cases import F64, a_space, dense_shift, dense_solve, implicit, some_rows, spectrum_matrix, uneven
from tests.laws.test_influence import SMALL, cross_entropy, mlp, oracle, relative_gap
from tests.laws.zoo import CASES, build
from tests.oracles.autograd import dense_ggn, dense_hessian, example_gradients, influence
from tests.tolerance import gap, rounding

CPU = torch.device("cpu")


def with_spectrum(space: Space, values: Tensor, seed: int = 3) -> Matrix:
    generator = torch.Generator().manual_seed(seed)
    q, _ = torch.linalg.qr(torch.randn(space.size, space.size, generator=generator, dtype=F64))
    dense = (q * values) @ q.T
    return Matrix(space, (dense + dense.T) / 2)


def lanczos(matrix: Matrix, rank: int, steps: int | None = None, width: int = 4, seed: int = 0) -> Eigenpairs:
    return leading_eigenpairs(implicit(matrix), rank, steps, width, seed, F64, CPU)


def truncated(dense: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """The eigenpairs of largest |eigenvalue|: values and rows."""
    values, vectors = torch.linalg.eigh(dense)
    top = values.abs().argsort(descending=True)[:rank]
    return values[top], vectors[:, top].T


def wide_space(p: int) -> Space:
    return Space.of(nn.Linear(p, 1, bias=False).double())


# --------------------------------------------------------------------------- the operator


def dense_of(operator: Any) -> Tensor:
    eye = torch.eye(operator.size, dtype=F64)
    flat: Tensor = operator.apply(operator.space.rows(eye)).flat()
    return flat


@pytest.mark.parametrize("dropped", [False, True])
@pytest.mark.parametrize("rank", [1, 7, 39])
def test_the_operator_is_what_it_says(rank: int, dropped: bool) -> None:
    space = a_space()
    generator = torch.Generator().manual_seed(rank)
    v = torch.linalg.qr(torch.randn(space.size, rank, generator=generator, dtype=F64))[0].T.contiguous()
    values = torch.linspace(-1.0, 3.0, rank, dtype=F64)
    rest = 0.0 if dropped else 0.4
    operator = LowRank.of(space, v, values, rest, dropped)
    across = torch.eye(space.size, dtype=F64) - v.T @ v
    dense = (v.T * values) @ v + rest * across
    assert torch.allclose(dense_of(operator), dense, atol=1e-12)
    means = {k: float(dense.diagonal()[part].mean()) for k, part in space.slices.items()}
    assert operator.block_means() == pytest.approx(means)
    known = [*values.tolist(), *([] if dropped or rank == space.size else [rest])]
    assert operator.extremes() == pytest.approx((min(known), max(known)))
    exp = (v.T * values.exp()) @ v + (0.0 if dropped else torch.tensor(rest, dtype=F64).exp()) * across
    assert torch.allclose(dense_of(operator.function(torch.exp)), exp, atol=1e-12)


@pytest.mark.parametrize("rank", [1, 7, 16, 39])
def test_a_shift_that_differs_between_blocks_is_exact(rank: int) -> None:
    """Also shifted twice, and also where a block has fewer parameters than there are directions."""
    space = a_space()
    v = torch.linalg.qr(some_rows(space, rank).flat().T)[0].T.contiguous()
    operator = LowRank.of(space, v, torch.linspace(0.5, 3.0, rank, dtype=F64), rest=0.2)
    dense = dense_of(operator)
    for step in (0.3, 0.9):
        decay = {k: step * (i + 1) for i, k in enumerate(space.blocks)}
        operator, dense = operator.shifted(decay), dense + dense_shift(space, Shift(0.0, decay))
        assert torch.allclose(dense_of(operator), dense, atol=1e-12)
        inverse = operator.function(lambda lam: 1 / lam)
        assert torch.allclose(dense_of(inverse), torch.linalg.inv(dense), atol=1e-10)
        assert operator.extremes() == pytest.approx(tuple(torch.linalg.eigvalsh(dense)[[0, -1]].tolist()))
        assert operator.mean_eigenvalue() == pytest.approx(float(dense.diagonal().mean()))


def test_a_dropped_complement_is_solved_on_the_directions_alone_and_the_rest_is_reported() -> None:
    space = a_space()
    matrix = spectrum_matrix(space, 1e-3)
    values, v = truncated(matrix.matrix, 5)
    rows = some_rows(space, 3)
    b = rows.flat()
    operator = LowRank.of(space, v.contiguous(), values, dropped=True)
    for shift in (Shift(0.01), uneven(space)):
        solution = Spectral().solve(Spectral().init(operator, shift), rows)
        small = v @ ((v.T * values) @ v + dense_shift(space, shift)) @ v.T
        want = torch.linalg.solve(small, v @ b.T).T @ v
        assert relative_gap(solution.unwrap().flat(), want) < 1e-10
        left = want @ ((v.T * values) @ v + dense_shift(space, shift)) - b
        assert torch.allclose(solution.residual, left.norm(dim=1) / b.norm(dim=1))
        assert solution.residual.min() > 0.5 and solution.notes["approximation"] == "dropped complement"
    kept = LowRank.of(space, v.contiguous(), values)
    for shift in (Shift(0.01), uneven(space)):
        solution = Spectral().solve(Spectral().init(kept, shift), rows)
        assert relative_gap(solution.unwrap().flat(), dense_solve(space, dense_of(kept), shift, b)) < 1e-10
        assert float(solution.residual.max()) < 1e-10


# --------------------------------------------------------------------------- block Lanczos


SPECTRA = {
    "spread": torch.linspace(0.01, 1.0, 39, dtype=F64),
    "decaying": torch.logspace(-8, 0, 39, dtype=F64),
    "both signs": torch.linspace(-1.5, 1.0, 39, dtype=F64),
    "mostly negative": -torch.logspace(-3, 0, 39, dtype=F64),
    "three numbers": torch.tensor([1.0] * 12 + [0.5] * 13 + [-0.25] * 14, dtype=F64),
    "one number": torch.full((39,), 2.0, dtype=F64),
    "rank 3": torch.tensor([0.0] * 36 + [1.0, 1.0, 3.0], dtype=F64),
    "zero": torch.zeros(39, dtype=F64),
}


@pytest.mark.slow
@pytest.mark.parametrize("width", [1, 4])
@pytest.mark.parametrize("rank", [1, 9, 20, 39])
@pytest.mark.parametrize("name", SPECTRA)
def test_lanczos_finds_the_largest_of_either_sign(name: str, rank: int, width: int) -> None:
    space = a_space()
    matrix = with_spectrum(space, SPECTRA[name])
    found = lanczos(matrix, rank, width=width)
    want, _ = truncated(matrix.matrix, rank)
    assert torch.allclose(found.values.abs(), want.abs(), atol=1e-9)
    assert torch.allclose(found.vectors @ found.vectors.T, torch.eye(rank, dtype=F64), atol=1e-10)
    left = found.vectors @ matrix.matrix - found.values[:, None] * found.vectors
    assert float(left.norm(dim=1).max()) < 1e-8, "an eigenvector must be one"
    assert found.products <= space.size


def test_lanczos_finds_copies_of_a_repeated_eigenvalue_without_spanning_everything() -> None:
    """One Krylov space of one vector holds one copy only; the second look finds the others."""
    space = wide_space(400)
    values = torch.cat([torch.linspace(0.0, 0.3, 394, dtype=F64), torch.tensor([1.0] * 4 + [-0.8] * 2, dtype=F64)])
    for width in (1, 2, 8):
        found = lanczos(with_spectrum(space, values), 6, width=width)
        assert found.products < 90
        assert torch.allclose(found.values.sort().values[:2], torch.tensor([-0.8, -0.8], dtype=F64), atol=1e-9)
        assert torch.allclose(found.values.sort().values[2:], torch.ones(4, dtype=F64), atol=1e-9)


@pytest.mark.slow
def test_too_few_steps_are_said_and_their_residuals_true() -> None:
    space = wide_space(200)
    matrix = with_spectrum(space, torch.linspace(0.9, 1.0, 200, dtype=F64))
    found = lanczos(matrix, 5, steps=12)
    assert found.products == 12
    left = found.vectors @ matrix.matrix - found.values[:, None] * found.vectors
    assert torch.allclose(left.norm(dim=1), found.residuals, atol=1e-12) and float(found.residuals.max()) > 1e-3
    model, x, y, *_ = mlp()
    problem = ptif.Problem(model, nn.CrossEntropyLoss(), (x, y))
    fitted = ptif.Influence(Arnoldi(10, GGN(), steps=10, width=10), Spectral(), 0.1).fit(problem)
    (note,) = fitted.members[0].operator.notes  # type: ignore[attr-defined]
    assert "raise steps" in note


# --------------------------------------------------------------------------- influence


def in_parameter_order(space: Space, flat: Tensor) -> Tensor:
    """From the order of a space's flat rows, biases beside their weights, to that of the model's parameters."""
    return torch.cat([v.flatten(1) for v in space.to_parameters(space.rows(flat)).values()], 1)


def spec_oracle(curvature: str, data: Any, damping: float, rank: int, rest: str = "zero") -> Tensor:
    """Scores of the dense curvature truncated to its largest |eigenvalues|."""
    model, x, y, xq, yq = data
    g, gq = example_gradients(model, cross_entropy, x, y), example_gradients(model, cross_entropy, xq, yq)
    dense = (dense_hessian if curvature == "hessian" else dense_ggn)(model, cross_entropy, x, y)
    values, v = truncated(dense, rank)
    across = torch.eye(len(dense), dtype=F64) - v.T @ v
    tail = {"zero": 0.0, "smallest": float(values.abs().min()), "dropped": 0.0}[rest]
    inverse = (v.T / (values + damping)) @ v + (0.0 if rest == "dropped" else across / (tail + damping))
    return gq @ inverse @ g.T / len(g)


@pytest.mark.slow
@pytest.mark.parametrize("rest", ["zero", "smallest", "dropped"])
@pytest.mark.parametrize("curvature", ["hessian", "ggn"])
@pytest.mark.parametrize("rank", [5, 57])
def test_arnoldi_is_the_truncated_dense_formula(rank: int, curvature: str, rest: Any) -> None:
    data = mlp()
    model, x, y, xq, yq = data
    inner = Hessian() if curvature == "hessian" else GGN()
    damping = SMALL
    if curvature == "hessian":
        damping = max(SMALL, 1.5 * -float(torch.linalg.eigvalsh(dense_hessian(model, cross_entropy, x, y)).min()))
    method = ptif.Influence(Arnoldi(rank, inner, complement=rest), Spectral(), damping)
    got = ptif.attribute(model, (x, y), (xq, yq), loss=nn.CrossEntropyLoss(), method=method)
    assert relative_gap(got.values, spec_oracle(curvature, data, damping, rank, rest)) < 1e-8
    if rank == 57:
        want = oracle(curvature, data, damping)
        assert relative_gap(got.values, want) < 1e-8
        assert relative_gap(oracle("identity", data, 0.0), want) > 0.3, "a gradient dot product must not pass"


def test_arnoldi_keeps_what_is_negative_and_refuses_to_invert_it() -> None:
    data = mlp()
    model, x, y, xq, yq = data
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.5 * torch.randn(p.shape, generator=torch.Generator().manual_seed(1), dtype=F64))
    least = float(torch.linalg.eigvalsh(dense_hessian(model, cross_entropy, x, y)).min())
    assert least < -1e-3
    with pytest.raises(SolveFailed, match=r"smallest eigenvalue .* is -"):
        ptif.attribute(
            model, (x, y), (xq, yq), loss=nn.CrossEntropyLoss(), method=ptif.methods.arnoldi(57, damping=1e-6)
        )
    got = ptif.attribute(
        model, (x, y), (xq, yq), loss=nn.CrossEntropyLoss(), method=ptif.methods.arnoldi(20, damping=-1.5 * least)
    )
    assert relative_gap(got.values, spec_oracle("hessian", data, -1.5 * least, 20, "dropped")) < 1e-8
    assert got.diagnostics is not None and got.diagnostics.residual_max > 0.01


@pytest.mark.parametrize("rank", [6, 25, 57])
def test_nystrom_is_its_dense_formula(rank: int) -> None:
    data = mlp()
    model, x, y, xq, yq = data
    c = dense_ggn(model, cross_entropy, x, y)
    o = in_parameter_order(ptif.Problem(model, nn.CrossEntropyLoss(), (x, y)).space, sketch(len(c), rank, 4))
    approximate = c @ o.T @ torch.linalg.pinv(o @ c @ o.T, rtol=1e-12, hermitian=True) @ o @ c
    g, gq = example_gradients(model, cross_entropy, x, y), example_gradients(model, cross_entropy, xq, yq)
    method = ptif.Influence(Nystrom(rank, seed=4), Spectral(), 0.01)
    got = ptif.attribute(model, (x, y), (xq, yq), loss=nn.CrossEntropyLoss(), method=method)
    assert relative_gap(got.values, influence(approximate, 0.01, gq, g)) < 1e-7
    if rank == 57:
        assert relative_gap(got.values, oracle("ggn", data, 0.01)) < 1e-8


def test_nystrom_of_low_rank_is_exact_and_never_exceeds() -> None:
    space = wide_space(80)
    values = torch.cat([torch.zeros(70, dtype=F64), torch.logspace(-2, 0, 10, dtype=F64)])
    matrix = with_spectrum(space, values)
    found = nystrom_pairs(implicit(matrix), 15, 0, F64, CPU)
    assert torch.allclose(found.values[:10], values.flip(0)[:10], rtol=1e-6) and float(found.values[10:].max()) < 1e-10
    rough = nystrom_pairs(implicit(spectrum_matrix(space, 1e-4)), 15, 0, F64, CPU)
    low = spectrum_matrix(space, 1e-4).matrix - (rough.vectors.T * rough.values) @ rough.vectors
    assert float(torch.linalg.eigvalsh(low).min()) > -1e-10
    assert float(nystrom_pairs(implicit(with_spectrum(space, 0 * values)), 3, 0, F64, CPU).values.max()) == 0.0
    with pytest.raises(SolveFailed, match="not positive semidefinite"):
        nystrom_pairs(implicit(with_spectrum(space, -values)), 5, 0, F64, CPU)


@pytest.mark.slow
def test_nystrom_guides_conjugate_gradients_to_the_dense_solve_in_fewer_steps() -> None:
    data = mlp()
    model, x, y, xq, yq = data
    steps = {}
    for name, given in (
        ("alone", None),
        ("zero", Nystrom(25)),
        ("smallest", Nystrom(25, complement="smallest")),
        ("arnoldi", Arnoldi(15, GGN())),
    ):
        method = ptif.Influence(GGN(), CG(1e-9, 400), SMALL, preconditioner=given)
        got = ptif.attribute(model, (x, y), (xq[:2], yq[:2]), loss=nn.CrossEntropyLoss(), method=method)
        assert relative_gap(got.values, oracle("ggn", data, SMALL)[:2]) < 1e-7
        assert got.diagnostics is not None
        steps[name] = got.diagnostics.steps
    assert max(steps["zero"], steps["smallest"], steps["arnoldi"]) < 0.6 * steps["alone"], steps


@pytest.mark.slow
def test_a_low_rank_guide_on_a_decaying_spectrum() -> None:
    space = wide_space(150)
    matrix = spectrum_matrix(space, 1e-8)
    rows, shift = some_rows(space, 3), Shift(1e-5)
    want = dense_solve(space, matrix.matrix, shift, rows.flat())
    pairs = nystrom_pairs(implicit(matrix), 60, 0, F64, CPU)
    guide = Spectral()
    prepared = guide.init(LowRank.of(space, pairs.vectors, pairs.values), shift)
    solver = CG(rounding(F64, condition=1e5), 2000)  # of the shifted matrix: below this, rounding stops the steps
    alone = solver.solve(CG().init(matrix, shift), rows)
    guided = solver.solve(CG().init(matrix, shift, prepared.inverse), rows)
    assert relative_gap(guided.unwrap().flat(), want) < 1e-6
    assert guided.steps < 0.35 * alone.steps


@pytest.mark.slow
@pytest.mark.parametrize(
    "make", [lambda: ptif.methods.arnoldi(12, GGN(), 0.01), lambda: ptif.methods.nystrom(12, 0.01, 1e-6)]
)
def test_float32_batches_and_repetition_do_not_matter(make: Any) -> None:
    model, x, y, xq, yq = mlp()

    def scores(dtype: torch.dtype, batch: int) -> Tensor:
        data = (x.to(dtype), y), (xq.to(dtype), yq)
        values: Tensor = ptif.attribute(
            model.to(dtype), *data, loss=nn.CrossEntropyLoss(), method=make(), batch_size=batch
        ).values
        return values

    exact = scores(F64, 64)
    assert gap(scores(F64, 64), exact) < rounding(exact, condition=1e3)
    assert relative_gap(scores(F64, 7), exact) < 1e-6
    assert relative_gap(scores(torch.float32, 64), exact) < 1e-2


# --------------------------------------------------------------------------- the diagonal


def _blocks() -> list[AbstractBlock]:
    g = torch.Generator().manual_seed(0)

    def r(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g, dtype=F64)

    index = torch.randint(0, 5, (6, 1), generator=g)
    case = next(c for c in CASES if c.name == "conv2d stride")
    model, x, y = build(case)
    rows = ptif.Problem(model, nn.CrossEntropyLoss(), (x, y))
    conv = next(
        b for s in Derivatives.of(rows).stream() for b in s.rows.blocks.values() if isinstance(b, (Conv, Outer))
    )
    several = Indexed(torch.randint(0, 5, (6, 3), generator=g), r(6, 3, 4), 5)
    outers = (Outer(r(6, 1, 3), r(6, 1, 4)), Outer(r(6, 5, 3), r(6, 5, 4)))
    return [*outers, Dense(r(6, 3, 2)), conv, several, Indexed(index, r(6, 1, 4), 5)]


@pytest.mark.parametrize("number", range(6))
def test_a_sum_of_squares_is_one_in_every_form(number: int) -> None:
    block = _blocks()[number]
    assert torch.allclose(sum_of_squares(block), block.dense().reshape(-1, *block.shape).square().sum(0))


@pytest.mark.parametrize("curvature", ["ggn", "empirical"])
def test_diagonal_is_the_dense_diagonal(curvature: str) -> None:
    data = mlp()
    model, x, y, xq, yq = data
    g, gq = example_gradients(model, cross_entropy, x, y), example_gradients(model, cross_entropy, xq, yq)
    dense = dense_ggn(model, cross_entropy, x, y) if curvature == "ggn" else g.T @ g / len(g)
    # The flat order of parameters is not the space's, but a diagonal does not mind.
    want = influence(dense.diagonal().diag(), SMALL, gq, g)
    method = ptif.methods.diagonal(GGN() if curvature == "ggn" else EmpiricalFisher(), SMALL)
    got = ptif.attribute(model, (x, y), (xq, yq), loss=nn.CrossEntropyLoss(), method=method)
    assert relative_gap(got.values, want) < 1e-10
    assert relative_gap(oracle("identity", data, 0.0), want) > 0.3


@pytest.mark.parametrize("name", ["positions", "conv2d stride", "embedding", "tied", "called twice", "lstm"])
def test_the_diagonal_covers_every_layer(name: str) -> None:
    model, x, y = build(next(c for c in CASES if c.name == name))
    dense = dense_ggn(model, cross_entropy, x, y).diagonal()
    problem = ptif.Problem(model, nn.CrossEntropyLoss(), (x, y))
    fitted = ptif.methods.diagonal(damping=1.0).fit(problem)
    space = problem.space
    own = fitted.members[0].operator.values  # type: ignore[attr-defined]
    at, by_name = 0, {}
    for key, p in model.named_parameters():
        by_name[key] = dense[at : at + p.numel()].view(1, *p.shape)
        at += p.numel()
    assert torch.allclose(own, space.from_parameters(by_name).flat()[0], atol=1e-12)


def test_a_sampled_diagonal_is_that_of_its_own_rows() -> None:
    model, x, y, *_ = mlp()
    problem = ptif.Problem(model, nn.CrossEntropyLoss(), (x, y))
    fisher = Fisher(samples=3, seed=5)
    dense = ptif.Influence(fisher, Spectral(), 0.1).fit(problem).members[0].operator.matrix  # type: ignore[attr-defined]
    own = ptif.methods.diagonal(fisher, 0.1).fit(problem).members[0].operator.values  # type: ignore[attr-defined]
    assert torch.allclose(own, dense.diagonal(), atol=1e-12)

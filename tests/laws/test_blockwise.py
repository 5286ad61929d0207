"""Laws of block-wise curvature: every group is the dense float64 solve of its own diagonal block."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import pytorch_influence_functions as ptif
from pytorch_influence_functions.core.errors import IncompleteSolveWarning, InvalidInput, SolveFailed, TooLarge
from pytorch_influence_functions.curvature import GGN, Diagonal, EmpiricalFisher, Fisher, Hessian, Identity, Nystrom
from pytorch_influence_functions.curvature.base import Budget, Form
from pytorch_influence_functions.curvature.kronecker.records import EKFAC
from pytorch_influence_functions.damping import Relative
from pytorch_influence_functions.gradients.per_example import Derivatives
from pytorch_influence_functions.linalg.dense import Matrix
from pytorch_influence_functions.linalg.shift import Shift
from pytorch_influence_functions.solvers import CG, BlockGroup, Cholesky, Woodbury
from pytorch_influence_functions.solvers.blockwise import Blockwise
from pytorch_influence_functions.solvers.direct import Spectral
from tests.laws.solver_cases import F64, a_space, some_rows, spectrum_matrix
from tests.laws.test_influence import SMALL, cross_entropy, mlp, oracle, relative_gap
from tests.laws.zoo import CASES, build
from tests.oracles.autograd import dense_ggn, dense_hessian, example_gradients, influence

PARTS = {"0": slice(0, 36), "2": slice(36, 57)}
"""Coordinates of the two layers of `mlp()`."""


def dense_of(name: str, data: Any) -> Tensor:
    model, x, y, *_ = data
    g = example_gradients(model, cross_entropy, x, y)
    if name == "empirical":
        return g.T @ g / len(g)
    return (dense_hessian if name == "hessian" else dense_ggn)(model, cross_entropy, x, y)


def by_blocks(data: Any, matrices: dict[str, Tensor], dampings: dict[str, float]) -> Tensor:
    """Scores of a block-diagonal curvature, each block solved densely."""
    model, x, y, xq, yq = data
    g, gq = example_gradients(model, cross_entropy, x, y), example_gradients(model, cross_entropy, xq, yq)
    total = torch.zeros(len(gq), len(g), dtype=F64)
    for name, part in PARTS.items():
        total += influence(matrices[name][part, part], dampings[name], gq[:, part], g[:, part])
    return total


def attributed(data: Any, method: ptif.Influence, **changes: Any) -> ptif.Scores:
    model, x, y, xq, yq = data
    return ptif.attribute(model, (x, y), (xq, yq), loss=nn.CrossEntropyLoss(), method=method, **changes)


@pytest.mark.slow
@pytest.mark.parametrize("solver", ["spectral", "cholesky", "woodbury", "cg"])
@pytest.mark.parametrize("name", ["ggn", "empirical", "hessian"])
def test_every_layer_is_the_dense_solve_of_its_block(name: str, solver: str) -> None:
    if (name, solver) == ("hessian", "woodbury"):
        pytest.skip("a Hessian has no rows")
    data = mlp()
    made = {
        "spectral": Spectral(),
        "cholesky": Cholesky(),
        "woodbury": Woodbury(),
    }
    curvature = {
        "ggn": GGN(),
        "empirical": EmpiricalFisher(),
        "hessian": Hessian(),
    }[name]
    dense = dense_of(name, data)
    least = min(float(torch.linalg.eigvalsh(dense[p, p]).min()) for p in PARTS.values())
    damping = max(SMALL, -1.5 * least)
    got = attributed(data, ptif.methods.blockwise(curvature, made.get(solver, CG(1e-11, 400)), damping=damping))
    want = by_blocks(data, dict.fromkeys(PARTS, dense), dict.fromkeys(PARTS, damping))
    assert relative_gap(got.values, want) < 1e-8
    dot = oracle("identity", data, 0.0)
    scale = (dot * want).sum() / (dot * dot).sum()
    assert relative_gap(scale * dot, want) > 0.3, "a gradient dot product must not pass"
    assert got.diagnostics is not None and got.diagnostics.residual_max < 1e-5


def test_one_group_is_the_dense_solve_and_two_are_not() -> None:
    data = mlp()
    want = oracle("ggn", data, SMALL)
    assert (
        relative_gap(attributed(data, ptif.methods.blockwise(groups={"all": "*"}, damping=SMALL)).values, want) < 1e-9
    )
    assert relative_gap(attributed(data, ptif.methods.blockwise(damping=SMALL)).values, want) > 0.05


def test_groups_with_their_own_solver_curvature_and_damping() -> None:
    data = mlp()
    ggn, empirical = dense_of("ggn", data), dense_of("empirical", data)
    own = float(empirical[PARTS["2"], PARTS["2"]].diagonal().mean())
    groups = {
        "body": "0",
        "head": BlockGroup(["2.weight"], Woodbury(), EmpiricalFisher(), Relative(0.2)),
    }
    method = ptif.methods.blockwise(groups=groups, damping=SMALL)
    got = attributed(data, method)
    want = by_blocks(data, {"0": ggn, "2": empirical}, {"0": SMALL, "2": 0.2 * own})
    assert relative_gap(got.values, want) < 1e-8
    assert got.diagnostics is not None
    mean = (36 * SMALL + 21 * 0.2 * own) / 57
    assert got.diagnostics.damping == pytest.approx(mean), "what is reported is what was used"


def test_relative_damping_is_in_units_of_each_block() -> None:
    data = mlp()
    ggn = dense_of("ggn", data)
    own = {k: 0.1 * float(ggn[p, p].diagonal().mean()) for k, p in PARTS.items()}
    got = attributed(data, ptif.methods.blockwise(damping=Relative(0.1, per_block=True)))
    assert relative_gap(got.values, by_blocks(data, dict.fromkeys(PARTS, ggn), own)) < 1e-9
    whole = 0.1 * float(ggn.diagonal().mean())
    got = attributed(data, ptif.methods.blockwise(damping=Relative(0.1)))
    assert relative_gap(got.values, by_blocks(data, dict.fromkeys(PARTS, ggn), dict.fromkeys(PARTS, whole))) < 1e-9
    every = {k: BlockGroup(k, damping=Relative(0.1)) for k in PARTS}
    got = attributed(data, ptif.methods.blockwise(groups=every))
    assert relative_gap(got.values, by_blocks(data, dict.fromkeys(PARTS, ggn), own)) < 1e-9


def test_weight_decay_and_another_damping() -> None:
    data = mlp()
    model, x, y, xq, yq = data
    decay = {"0.weight": 0.02, "0.bias": 0.02}
    problem = ptif.Problem(model, nn.CrossEntropyLoss(), (x, y), weight_decay=decay)
    fitted = ptif.methods.blockwise(damping=0.1).fit(problem)
    ggn = dense_of("ggn", data)
    for damping in (0.1, SMALL):
        got = fitted.with_damping(damping).score((xq, yq))
        want = by_blocks(data, dict.fromkeys(PARTS, ggn), {"0": damping + 0.02, "2": damping})
        assert relative_gap(got.values, want) < 1e-9
    assert relative_gap(fitted.scores_over_damping((xq, yq), [SMALL])[SMALL].values, want) < 1e-9


@pytest.mark.parametrize("curvature", ["ekfac", "nystrom", "diagonal", "identity"])
def test_any_curvature_can_be_restricted(curvature: str) -> None:
    """What is block-diagonal already does not change; a low-rank one of full rank is the block."""
    data = mlp()
    made = {
        "ekfac": EKFAC(GGN()),
        "nystrom": Nystrom(21),
        "diagonal": Diagonal(),
        "identity": Identity(),
    }[curvature]
    got = attributed(data, ptif.methods.blockwise(made, damping=0.05)).values
    if curvature == "nystrom":
        exact = BlockGroup("0", curvature=GGN())
        got = attributed(data, ptif.methods.blockwise(made, groups={"a": exact, "b": "2"}, damping=0.05)).values
        want = by_blocks(data, dict.fromkeys(PARTS, dense_of("ggn", data)), dict.fromkeys(PARTS, 0.05))
    else:
        want = attributed(data, ptif.Influence(made, Spectral(), 0.05)).values
    assert relative_gap(got, want) < 1e-8


def test_stochastic_and_random_curvature_see_the_same_draws() -> None:
    data = mlp()
    model, x, y, *_ = data
    problem = ptif.Problem(model, nn.CrossEntropyLoss(), (x, y))
    derivatives = Derivatives.of(problem)
    whole = Fisher(samples=2, seed=3).of(derivatives, Form.MATRIX, Budget())
    parts = Blockwise().operator(Fisher(samples=2, seed=3), derivatives, Budget()).parts
    assert isinstance(whole, Matrix)
    for name, part in problem.space.slices.items():
        found = parts[name]
        assert isinstance(found, Matrix) and torch.allclose(found.matrix, whole.matrix[part, part], atol=1e-12)


@pytest.mark.slow
@pytest.mark.parametrize("case", [c for c in CASES if c.name in ("tied", "called twice", "lstm", "group norm", "mlp")])
def test_blocks_of_every_kind_of_model_are_those_of_the_whole_matrix(case: Any) -> None:
    model, x, y = build(case)
    problem = ptif.Problem(model, nn.CrossEntropyLoss(), (x, y))
    derivatives = Derivatives.of(problem)
    space = derivatives.space
    for curvature, form in (
        (GGN(), Form.MATRIX),
        (Hessian(), Form.MATRIX),
        (GGN(), Form.IMPLICIT),
    ):
        whole = curvature.of(derivatives, Form.MATRIX, Budget())
        assert isinstance(whole, Matrix)
        solver = Spectral() if form is Form.MATRIX else CG()
        operator = Blockwise(solver).operator(curvature, derivatives, Budget())
        groups = Blockwise(solver).members(space)
        want = torch.zeros_like(whole.matrix)
        for names in groups.values():
            index = torch.cat([torch.arange(space.slices[k].start, space.slices[k].stop) for k in names])
            want[index[:, None], index] = whole.matrix[index[:, None], index]
        rows = some_rows(space, 2)
        assert relative_gap(operator.apply(rows).flat(), rows.flat() @ want) < 1e-9
        means = {k: float(want.diagonal()[part].mean()) for k, part in space.slices.items()}
        if form is Form.MATRIX:
            assert operator.block_means() == pytest.approx(means, abs=1e-12)
        assert sorted(k for names in groups.values() for k in names) == sorted(space.blocks)


def test_restricted_rows_are_the_rows_restricted() -> None:
    model, x, y = build(next(c for c in CASES if c.name == "attention"))
    derivatives = Derivatives.of(ptif.Problem(model, nn.CrossEntropyLoss(), (x, y)))
    whole = next(derivatives.stream()).rows
    for name in derivatives.space.blocks:
        part = next(derivatives.restricted([name]).stream()).rows
        assert list(part.blocks) == [name]
        assert torch.allclose(part.blocks[name].dense(), whole.blocks[name].dense())


def test_order_of_groups_batches_and_dtype_do_not_matter() -> None:
    data = mlp()
    model, x, y, xq, yq = data
    exact = attributed(data, ptif.methods.blockwise(damping=0.01)).values
    swapped = ptif.methods.blockwise(groups={"b": "2*", "a": "0*"}, damping=0.01)
    assert relative_gap(attributed(data, swapped).values, exact) < 1e-12
    assert relative_gap(attributed(data, ptif.methods.blockwise(damping=0.01), batch_size=7).values, exact) < 1e-10
    single = (model.float(), x.float(), y, xq.float(), yq)
    assert relative_gap(attributed(single, ptif.methods.blockwise(damping=0.01)).values, exact) < 1e-2


def test_a_group_that_fails_is_named() -> None:
    data = mlp()
    with pytest.raises(SolveFailed, match=r"^In group '[02]': The smallest eigenvalue .* is 0 within rounding"):
        attributed(data, ptif.methods.blockwise(damping=0.0))
    tired = {"a": BlockGroup("0", CG(1e-12, max_steps=2, incomplete="error")), "b": "2"}
    with pytest.raises(SolveFailed, match=r"It happened in group 'a'"):
        attributed(data, ptif.methods.blockwise(groups=tired, damping=SMALL))
    tired = {"a": BlockGroup("0", CG(1e-12, max_steps=2)), "b": "2"}
    with pytest.warns(IncompleteSolveWarning, match=r"It happened in group 'a'"):
        scores = attributed(data, ptif.methods.blockwise(groups=tired, damping=SMALL))
    assert scores.diagnostics.checks()[1].status == "bad"
    with pytest.raises(TooLarge, match=r"the largest '0' of 36 parameters"):
        attributed(data, ptif.Influence(GGN(), Blockwise(), 0.1, memory=8 * 5 * (36**2 + 21**2) - 1))
    attributed(data, ptif.Influence(GGN(), Blockwise(), 0.1, memory=8 * 5 * (36**2 + 21**2)))


def test_it_needs_blocks_and_says_so() -> None:
    space = a_space()
    with pytest.raises(InvalidInput, match="needs the diagonal blocks of a curvature and got Matrix"):
        Blockwise().init(spectrum_matrix(space), Shift(0.1))


def test_a_group_of_unequal_blocks_is_recorded_with_their_mean_damping_by_size() -> None:
    """What a group's record says is lambda is the mean over its parameters, not over its blocks."""
    model, x, y, *_ = mlp()
    derivatives = Derivatives.of(ptif.Problem(model, nn.CrossEntropyLoss(), (x, y)))
    space, solver = derivatives.space, Blockwise(groups={"all": "*"})
    own = {name: 0.1 * (k + 1) for k, name in enumerate(space.blocks)}
    shift = Shift(0.5, {}, own)
    state = solver.init(solver.operator(GGN(), derivatives, Budget()), shift)
    solution = solver.solve(state, space.rows(torch.randn(2, space.size).double()))
    each = torch.cat([torch.full((block.numel,), own[name]) for name, block in space.blocks.items()])
    assert solution.notes["groups"]["all"]["damping"] == pytest.approx(float(each.mean()))
    assert float(each.mean()) != pytest.approx(sum(own.values()) / len(own), rel=0.05)

"""K-FAC, EK-FAC and Shampoo against explicit float64 statistics, closed forms and the Gauss-Newton matrix."""

from __future__ import annotations

import gc
from itertools import pairwise
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import pytorch_influence_functions as ptif
from pytorch_influence_functions.core import temporary_folder
from pytorch_influence_functions.core.errors import InvalidInput, NonFinite, NotLikelihood, SolveFailed, TooLarge
from pytorch_influence_functions.core.indexing import spread_sample
from pytorch_influence_functions.curvature import EKFAC, GGN, KFAC, EmpiricalFisher, Fisher, Shampoo
from pytorch_influence_functions.curvature.base import Budget, Form
from pytorch_influence_functions.curvature.kronecker import fit as fitting_module
from pytorch_influence_functions.curvature.kronecker.moments import Sharing
from pytorch_influence_functions.damping import Relative
from pytorch_influence_functions.gradients.per_example import Derivatives
from pytorch_influence_functions.linalg import eigh as eigen
from pytorch_influence_functions.linalg.blocks import Conv, Dense, Indexed, Outer
from pytorch_influence_functions.linalg.kronecker import Kronecker
from pytorch_influence_functions.linalg.rows import Rows
from pytorch_influence_functions.problem.data import Source
from pytorch_influence_functions.solvers import CG, Cholesky, Factored, Spectral, Truncation, Woodbury
from tests.laws.test_influence import cross_entropy, mlp, relative_gap
from tests.laws.zoo import CASES, build
from tests.oracles.autograd import dense_ggn, example_gradients, influence
from tests.tolerance import gap, rounding

pytestmark = pytest.mark.filterwarnings("ignore:Using padding='same'")

FAMILY = [KFAC, EKFAC, Shampoo]
FITTED = {"deterministic": "ignore"}


def fitted(curvature: Any, derivatives: Derivatives, budget: Budget | None = None) -> Kronecker:
    operator = curvature.of(derivatives, Form.SPECTRAL, budget or Budget())
    assert isinstance(operator, Kronecker)
    return operator


def derivatives_of(model: nn.Module, x: Tensor, y: Tensor, objective: Any = None, **more: Any) -> Derivatives:
    return Derivatives.of(ptif.Problem(model, objective or ptif.CrossEntropy(), (x, y), **FITTED, **more))


def written_out(operator: Kronecker) -> Tensor:
    like = next(iter(operator.blocks.values())).values
    return operator.apply(operator.space.rows(torch.eye(operator.size, dtype=like.dtype))).flat()


def ggn(derivatives: Derivatives) -> Tensor:
    g = torch.cat([r.flat() for r in GGN().stream(derivatives)])
    return g.T @ g / len(derivatives.problem)


def block_gap(operator: Kronecker, exact: Tensor) -> float:
    """|C - GGN| over the diagonal blocks, relatively."""
    found = written_out(operator)
    parts = operator.space.slices.values()
    gap = sum(float((found[s, s] - exact[s, s]).square().sum()) for s in parts)
    return float((gap / sum(float(exact[s, s].square().sum()) for s in parts)) ** 0.5)


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES, ids=[c.name for c in CASES])
def test_every_parameter_of_every_layer_takes_part(case: Any) -> None:
    model, x, y = build(case)
    derivatives = derivatives_of(model, x, y)
    exact = ggn(derivatives)
    for curvature in (EKFAC(GGN()), Shampoo(GGN())):
        operator = fitted(curvature, derivatives)
        # In an orthonormal basis the measured eigenvalues add up to the trace, block by block.
        for name, part in operator.space.slices.items():
            assert operator.block_means()[name] == pytest.approx(float(exact.diagonal()[part].mean()), rel=1e-9)
        for block in operator.blocks.values():
            for basis in (block.left, block.right):
                if basis is not None:
                    torch.testing.assert_close(basis.T @ basis, torch.eye(len(basis), dtype=basis.dtype))


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES, ids=[c.name for c in CASES])
def test_eigenvalues_are_second_moments_in_the_basis(case: Any) -> None:
    model, x, y = build(case)
    derivatives = derivatives_of(model, x, y)
    operator = fitted(EKFAC(GGN()), derivatives)
    rows = list(GGN().stream(derivatives))
    for name, block in operator.blocks.items():
        shape = block.values.shape
        turned = []
        for r in rows:
            g = r.blocks[name].dense().reshape(-1, *shape)
            g = g if block.left is None else torch.einsum("oa,noi->nai", block.left, g)
            turned.append(g if block.right is None else torch.einsum("noi,ib->nob", g, block.right))
        want = torch.cat(turned).square().sum(0) / len(x)
        torch.testing.assert_close(block.values, want, rtol=1e-9, atol=1e-13)


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES, ids=[c.name for c in CASES])
def test_measured_eigenvalues_are_closer_to_the_gauss_newton_matrix(case: Any) -> None:
    model, x, y = build(case)
    derivatives = derivatives_of(model, x, y)
    exact = ggn(derivatives)
    kfac, ekfac = (block_gap(fitted(c(GGN()), derivatives), exact) for c in (KFAC, EKFAC))
    assert ekfac <= kfac * (1 + 1e-9)


def linear_net(*widths: int) -> nn.Module:
    torch.manual_seed(3)
    layers = [nn.Linear(a, b, bias=False) for a, b in pairwise(widths)]
    return nn.Sequential(*layers).double()


@pytest.mark.parametrize("curvature", [KFAC, EKFAC])
def test_exact_for_deep_linear_networks_with_squared_error(curvature: Any) -> None:
    model, x, y = linear_net(4, 5, 3, 2), torch.randn(20, 4).double(), torch.randn(20, 2).double()
    derivatives = derivatives_of(model, x, y, ptif.SquaredError())
    assert block_gap(fitted(curvature(GGN()), derivatives), ggn(derivatives)) < 1e-10


@pytest.mark.parametrize("curvature", FAMILY)
def test_exact_for_a_single_example(curvature: Any) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 4, bias=False), nn.Tanh(), nn.Linear(4, 2, bias=False)).double()
    x, y = torch.randn(1, 5).double(), torch.randint(0, 2, (1,))
    derivatives = derivatives_of(model, x, y)
    assert block_gap(fitted(curvature(GGN()), derivatives), ggn(derivatives)) < 1e-10


def test_ekfac_solves_one_linear_layer_exactly() -> None:
    torch.manual_seed(1)
    model = nn.Linear(4, 3).double()
    scale = torch.tensor([4.0, 1.0, 0.3, 0.1]).double()
    x, xq = torch.randn(30, 4).double() * scale, torch.randn(5, 4).double() * scale
    y, yq = torch.randn(30, 3).double(), torch.randn(5, 3).double()

    def squared(outputs: Tensor, targets: Tensor) -> Tensor:
        return 0.5 * (outputs - targets).square().sum(1)

    problem = ptif.Problem(model, ptif.SquaredError(), (x, y))
    got = ptif.ekfac(damping=1e-3).fit(problem).score((xq, yq)).values
    g, gq = example_gradients(model, squared, x, y), example_gradients(model, squared, xq, yq)
    want = influence(dense_ggn(model, squared, x, y), 1e-3, gq, g)
    assert relative_gap(got, want) < 1e-8
    assert relative_gap(ptif.methods.grad_dot().fit(problem).score((xq, yq)).values, want) > 0.5


@pytest.mark.parametrize("curvature", FAMILY)
def test_scores_equal_the_dense_solve_with_the_same_matrix(curvature: Any) -> None:
    data = model, x, y, xq, yq = mlp()
    problem = ptif.Problem(model, ptif.CrossEntropy(), (x, y), weight_decay=0.003)
    attribution = ptif.Influence(curvature(GGN()), damping=1e-3).fit(problem)
    operator = attribution.members[0].operator
    assert isinstance(operator, Kronecker)
    g, gq = example_gradients(model, cross_entropy, x, y), example_gradients(model, cross_entropy, xq, yq)
    order = torch.cat([_columns(problem, k) for k in problem.space.blocks])
    matrix = torch.zeros_like(written_out(operator))
    matrix[order[:, None], order[None]] = written_out(operator)
    want = influence(matrix, 1e-3 + 0.003, gq, g)
    assert relative_gap(attribution.score((xq, yq)).values, want) < 1e-8
    assert relative_gap(ptif.methods.grad_dot().fit(problem).score((xq, yq)).values, want) > 0.5
    assert len(data) == 5


def _columns(problem: Any, block: str) -> Tensor:
    """Where a block's coordinates lie in the concatenation of flattened parameters."""
    at, where = 0, {}
    for name, p in problem.model.named_parameters():
        where[name] = torch.arange(at, at + p.numel()).reshape(p.shape)
        at += p.numel()
    spec = problem.space.blocks[block]
    parts = [where[p].flatten(1) if where[p].dim() > 1 else where[p][:, None] for p in spec.parameters]
    return torch.cat(parts, 1).flatten()


def test_functions_and_shifts_act_on_the_eigenvalues() -> None:
    model, x, y, *_ = mlp()
    operator = fitted(EKFAC(GGN()), derivatives_of(model, x, y))
    dense = written_out(operator)
    values, vectors = torch.linalg.eigh(dense)
    root = (vectors * values.clamp_min(0).sqrt()) @ vectors.T
    # The root of an eigenvalue that is zero is the root of its rounding.
    assert gap(written_out(operator.function(torch.sqrt)), root) < rounding(torch.float64) ** 0.5
    decay = {k: 0.1 * (i + 1) for i, k in enumerate(operator.space.blocks)}
    want = dense + torch.cat([torch.full((operator.space.numel(k),), d) for k, d in decay.items()]).double().diag()
    torch.testing.assert_close(written_out(operator.shifted(decay)), want)
    assert operator.extremes() == pytest.approx((float(values[0]), float(values[-1])), abs=1e-12)
    density = operator.known_eigenvalues()
    assert sorted(density.values.flatten().tolist()) == pytest.approx(sorted(values.tolist()), abs=1e-10)


def test_damping_per_block_equals_the_dense_solve() -> None:
    model, x, y, xq, yq = mlp()
    problem = ptif.Problem(model, ptif.CrossEntropy(), (x, y), weight_decay=0.01)
    spec = ptif.Influence(GGN(), Spectral(), Relative(0.2, per_block=True))
    want = spec.fit(problem).score((xq, yq)).values
    for solver in (Cholesky(), Woodbury(), CG(rtol=1e-10)):
        got = ptif.Influence(GGN(), solver, Relative(0.2, per_block=True)).fit(problem).score((xq, yq))
        assert relative_gap(got.values, want) < 1e-7, solver
    overall = ptif.Influence(GGN(), Spectral(), Relative(0.2)).fit(problem).score((xq, yq)).values
    assert relative_gap(overall, want) > 1e-2


def test_factored_damping_equals_its_dense_formula_and_keeps_rows_factored() -> None:
    model, x, y, xq, yq = mlp()
    problem = ptif.Problem(model, ptif.CrossEntropy(), (x, y))
    attribution = ptif.Influence(KFAC(GGN()), Factored(), 0.01).fit(problem)
    member = attribution.members[0]
    rows = member.derivatives.loss_rows(torch.arange(4), (xq, yq)).rows
    solved = member.solve(rows).unwrap()
    assert isinstance(solved, Rows)
    want = []
    for name, block in member.operator.blocks.items():  # type: ignore[attr-defined]
        assert isinstance(solved.blocks[name], Outer)
        s = (block.left * block.sides[0]) @ block.left.T
        a = (block.right * block.sides[1]) @ block.right.T
        torch.testing.assert_close(torch.outer(block.sides[0], block.sides[1]), block.values)
        pi = float((a.trace() / len(a)) / (s.trace() / len(s))) ** 0.5
        s, a = s + 0.1 / pi * torch.eye(len(s)).double(), a + 0.1 * pi * torch.eye(len(a)).double()
        g = rows.blocks[name].dense()
        want.append((torch.linalg.inv(s) @ g @ torch.linalg.inv(a)).flatten(1))
    torch.testing.assert_close(solved.flat(), torch.cat(want, 1))
    scores = attribution.score((xq, yq))
    g = torch.cat([slab.rows.flat() for slab in member.derivatives.stream()])
    torch.testing.assert_close(scores.values, solved.flat() @ g.T / len(x))
    solve = next(c for c in scores.diagnostics.checks() if c.name == "solve")
    assert solve.status == "warn"
    assert "factored damping" in solve.text


def test_factored_damping_takes_every_form_of_rows() -> None:
    torch.manual_seed(0)
    tokens, ids = Tokens().double(), torch.randint(0, 9, (8, 5))
    model, x, y = conv_net()
    for problem, queries in (
        (ptif.Problem(model, ptif.CrossEntropy(), (x, y)), (x[:2], y[:2])),
        (ptif.Problem(tokens, ptif.TokenCrossEntropy(), (ids, ids.roll(-1, 1))), (ids[:2], ids[:2].roll(-1, 1))),
    ):
        attribution = ptif.Influence(KFAC(), Factored(), 1e-8).fit(problem)
        member = attribution.members[0]
        rows = next(iter(member.derivatives.stream(Source.of(queries)))).rows
        dense = member.solve(rows.dense()).unwrap().flat()
        torch.testing.assert_close(member.solve(rows).unwrap().flat(), dense, rtol=1e-7, atol=1e-9)


def test_factored_damping_refuses_what_has_no_factors() -> None:
    model, x, y, *_ = mlp()
    problem = ptif.Problem(model, ptif.CrossEntropy(), (x, y))
    with pytest.raises(InvalidInput, match=r"use KFAC\(\)"):
        ptif.Influence(EKFAC(), Factored()).fit(problem)
    with pytest.raises(SolveFailed, match="needs a positive damping"):
        ptif.Influence(KFAC(), Factored(), 0.0).fit(problem)


def test_self_influence_needs_no_turning_back() -> None:
    model, x, y, *_ = mlp()
    problem = ptif.Problem(model, ptif.CrossEntropy(), (x, y))
    attribution = ptif.ekfac(0.01, GGN()).fit(problem)
    want = attribution.score((x, y)).values.diagonal()
    torch.testing.assert_close(attribution.self_influence(), want)
    assert float(attribution.self_influence().min()) > 0


def test_low_rank_queries_are_certified_in_the_diagnostics() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(12, 16), nn.Tanh(), nn.Linear(16, 3)).double()
    x, y = torch.randn(40, 12).double(), torch.randint(0, 3, (40,))
    problem, queries = ptif.Problem(model, ptif.CrossEntropy(), (x, y)), (x[:5] * 1.1, y[:5])
    exact = ptif.ekfac(0.01).fit(problem).score(queries)
    spec = ptif.Influence(EKFAC(), Spectral(), 0.01, truncation=Truncation(rank=2))
    found = spec.fit(problem).score(queries)
    note = next(n for n in found.diagnostics.notes if "low rank" in n)
    bound = float(note.split("more than ")[1].split(" ")[0])
    gap = float((found.values - exact.values).abs().max())
    assert 0 < gap <= bound * 1.01
    assert "truncation=Truncation" in found.diagnostics.method


# --------------------------------------------------------------------------- whose gradients


@pytest.mark.slow
def test_many_sampled_labels_approach_the_exact_fisher() -> None:
    model, x, y, *_ = mlp(n=40)
    derivatives = derivatives_of(model, x, y)
    exact = fitted(EKFAC(GGN()), derivatives)
    gaps = []
    for samples in (4, 400):
        found = fitted(EKFAC(Fisher(samples=samples)), derivatives)
        gaps.append(float((written_out(found) - written_out(exact)).norm() / written_out(exact).norm()))
    assert gaps[1] < 0.1
    assert gaps[1] < 0.3 * gaps[0]


def test_eigenvalues_come_from_labels_drawn_anew() -> None:
    """With one draw for both, the eigenvalues in the leading directions of the basis would be too large."""
    model, x, y, *_ = mlp(n=12)
    derivatives = derivatives_of(model, x, y)
    exact = ggn(derivatives)
    excess = []
    for seed in range(30):
        operator = fitted(EKFAC(Fisher(samples=1, seed=seed)), derivatives)
        block, part = operator.blocks["0"], operator.space.slices["0"]
        vector = torch.einsum("o,i->oi", block.left[:, -1], block.right[:, -1]).flatten()  # type: ignore[index]
        true = float(vector @ exact[part, part] @ vector)
        excess.append(float(block.values[-1, -1]) / true - 1)
    assert abs(sum(excess) / len(excess)) < 0.25


def test_given_labels_make_an_empirical_fisher() -> None:
    model, x, y, *_ = mlp()
    derivatives = derivatives_of(model, x, y)
    operator = fitted(EKFAC(EmpiricalFisher()), derivatives)
    g = torch.cat([slab.rows.flat() for slab in derivatives.stream()])
    assert operator.mean_eigenvalue() == pytest.approx(float(g.square().sum()) / len(g) / g.shape[1], rel=1e-10)


def test_losses_of_every_kind_are_fitted() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3)).double()
    x = torch.randn(10, 4).double()
    kinds = [
        (ptif.CrossEntropy(), torch.randint(0, 3, (10,))),
        (ptif.SquaredError(), torch.randn(10, 3).double()),
        (ptif.Bernoulli(), torch.randint(0, 2, (10, 3)).double()),
    ]
    for objective, y in kinds:
        derivatives = derivatives_of(model, x, y, objective)
        operator = fitted(EKFAC(), derivatives)
        assert operator.mean_eigenvalue() == pytest.approx(float(ggn(derivatives).trace()) / operator.size, rel=1e-9)


class Tokens(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table, self.mix, self.head = nn.Embedding(9, 4), nn.Linear(4, 4), nn.Linear(4, 9)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.mix(self.table(x)).cumsum(1)))


@pytest.mark.slow
def test_language_models_are_fitted_on_sampled_tokens() -> None:
    torch.manual_seed(0)
    model, x = Tokens().double(), torch.randint(0, 9, (12, 5))
    derivatives = derivatives_of(model, x, x.roll(-1, 1), ptif.TokenCrossEntropy())
    assert {type(b) for b in next(iter(derivatives.stream())).rows.blocks.values()} == {Indexed, Outer}
    operator = fitted(EKFAC(Fisher(samples=300)), derivatives)
    exact = ggn(derivatives)
    for name, part in operator.space.slices.items():
        assert operator.block_means()[name] == pytest.approx(float(exact.diagonal()[part].mean()), rel=0.1)


def test_reduce_equals_expand_without_sharing_and_is_exact_for_a_constant_input() -> None:
    model, x, y, *_ = mlp()
    derivatives = derivatives_of(model, x, y)
    a, b = (fitted(KFAC(GGN(), s), derivatives) for s in (Sharing.EXPAND, Sharing.REDUCE))
    torch.testing.assert_close(written_out(a), written_out(b))
    # One example whose positions all read the same input: the gradient is (sum_t g_t) a^T.
    torch.manual_seed(0)
    shared = nn.Sequential(nn.Linear(4, 3, bias=False), nn.Flatten(), nn.Linear(15, 2, bias=False)).double()
    x = torch.randn(1, 1, 4).double().expand(1, 5, 4).clone()
    derivatives = derivatives_of(shared, x, torch.tensor([1]))
    exact = ggn(derivatives)
    reduce, expand = (fitted(KFAC(GGN(), s), derivatives) for s in (Sharing.REDUCE, Sharing.EXPAND))
    assert block_gap(reduce, exact) < 1e-10
    assert block_gap(expand, exact) > 1e-2


# --------------------------------------------------------------------------- how it is fitted


def conv_net() -> tuple[nn.Module, Tensor, Tensor]:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(2, 5, 3, padding=1),
        nn.GroupNorm(1, 5),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(2),
        nn.Flatten(),
        nn.Linear(20, 3),
    ).double()
    return model, torch.randn(14, 2, 6, 6).double(), torch.randint(0, 3, (14,))


@pytest.mark.parametrize("fisher", [GGN(), Fisher(samples=2), EmpiricalFisher()], ids=repr)
def test_independent_of_batch_size_and_of_what_fits_in_memory(fisher: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    model, x, y = conv_net()
    one = fitted(EKFAC(fisher), derivatives_of(model, x, y, batch_size=14))
    three = fitted(EKFAC(fisher), derivatives_of(model, x, y, batch_size=3))
    monkeypatch.setattr(fitting_module, "KEPT_SHARE", 0.0)
    again = fitted(EKFAC(fisher), derivatives_of(model, x, y, batch_size=5))
    torch.testing.assert_close(written_out(three), written_out(one), rtol=1e-8, atol=1e-12)
    torch.testing.assert_close(written_out(again), written_out(one), rtol=1e-8, atol=1e-12)


def test_float32_is_close_to_float64() -> None:
    model, x, y = conv_net()
    exact = written_out(fitted(EKFAC(GGN()), derivatives_of(model, x, y)))
    found = fitted(EKFAC(GGN()), derivatives_of(model.float(), x.float(), y))
    rows = found.space.rows(torch.eye(found.size))
    torch.testing.assert_close(found.apply(rows).flat().double(), exact, rtol=0, atol=1e-4 * float(exact.abs().max()))


def test_few_examples_are_spread_and_counted_right() -> None:
    model, x, y, *_ = mlp(n=60)
    some = fitted(EKFAC(GGN(), examples=7), derivatives_of(model, x, y))
    picked = spread_sample(60, 7)
    only = fitted(EKFAC(GGN()), derivatives_of(model, x[picked], y[picked]))
    torch.testing.assert_close(written_out(some), written_out(only))


def test_skipped_positions_keep_the_scale(monkeypatch: pytest.MonkeyPatch) -> None:
    from pytorch_influence_functions.curvature.kronecker import moments as factors

    model, x, y = conv_net()
    derivatives = derivatives_of(model, x, y)
    every = fitted(KFAC(GGN()), derivatives)
    monkeypatch.setattr(factors, "_USES_PER_SIDE", 8)
    some = fitted(KFAC(GGN()), derivatives)
    assert float((written_out(some) - written_out(every)).norm()) > 0
    assert some.block_means()["0"] == pytest.approx(every.block_means()["0"], rel=0.3)


def test_a_side_above_the_limit_keeps_its_coordinates() -> None:
    model, x, y = conv_net()
    derivatives = derivatives_of(model, x, y)
    operator = fitted(EKFAC(GGN(), largest=6), derivatives)
    assert operator.blocks["0"].right is None
    assert operator.blocks["0"].left is not None
    assert operator.mean_eigenvalue() == pytest.approx(float(ggn(derivatives).trace()) / operator.size, rel=1e-9)


def test_large_moments_are_added_up_by_panels() -> None:
    torch.manual_seed(0)
    model = nn.Linear(300, 2).double()
    x, y = torch.randn(9, 300).double(), torch.randint(0, 2, (9,))
    operator = fitted(KFAC(GGN()), derivatives_of(model, x, y))
    right = operator.blocks["(root)"].right
    wide = torch.cat([x, torch.ones(9, 1).double()], 1)
    assert right is not None
    turned = right.T @ (wide.T @ wide / 9) @ right
    torch.testing.assert_close(turned, turned.diagonal().diag(), rtol=0, atol=1e-9)


def test_forms_of_rows_meet_the_basis_in_either_order() -> None:
    """Turning factors first, or the matrix they make, is the same; so is a block written out."""
    model, x, y = conv_net()
    derivatives = derivatives_of(model, x, y)
    operator = fitted(EKFAC(GGN()), derivatives)
    rows = next(iter(derivatives.stream())).rows
    assert isinstance(rows.blocks["0"], Conv)
    assert isinstance(rows.blocks["1.weight"], Dense)
    torch.testing.assert_close(operator.apply(rows).flat(), operator.apply(rows.dense()).flat())


# --------------------------------------------------------------------------- on disk


def test_finished_blocks_are_found_again_and_the_rest_fitted(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    model, x, y = conv_net()
    derivatives = derivatives_of(model, x, y)
    curvature = EKFAC(GGN(), folder=tmp_path)
    whole = written_out(fitted(curvature, derivatives))
    files = sorted(tmp_path.rglob("*.safetensors"))
    assert len(files) == len(derivatives.space.blocks)
    passes: list[Any] = []
    original = fitting_module.Fit._fit
    monkeypatch.setattr(fitting_module.Fit, "_fit", lambda self, b, s: passes.append(sorted(b)) or original(self, b, s))
    assert gap(written_out(fitted(curvature, derivatives)), whole) < rounding(whole)
    assert passes == []
    files[0].unlink()
    files[1].write_bytes(b"cut short")
    torch.testing.assert_close(written_out(fitted(curvature, derivatives)), whole)
    assert [len(p) for p in passes] == [2]


@pytest.mark.parametrize(("classes", "fisher"), [(17, GGN()), (18, Fisher(samples=1))])
def test_up_to_sixteen_independent_outputs_are_enumerated(classes: int, fisher: Any) -> None:
    """Probabilities add up to one, so that 17 classes are 16 outputs."""
    torch.manual_seed(0)
    model, x, y = nn.Linear(3, classes).double(), torch.randn(40, 3).double(), torch.arange(40) % classes
    default, named = (written_out(fitted(c, derivatives_of(model, x, y))) for c in (EKFAC(), EKFAC(fisher)))
    assert gap(default, named) < rounding(named)


def test_other_weights_data_or_settings_are_other_factors(tmp_path: Any) -> None:
    model, x, y = conv_net()
    places = set()

    def fit(model: nn.Module, x: Tensor, **settings: Any) -> None:
        fitted(EKFAC(folder=tmp_path, **settings), derivatives_of(model, x, y))
        places.update(p.name for p in tmp_path.iterdir())

    fit(model, x, fisher=GGN())
    fit(model, x, fisher=Fisher(samples=1))
    changed = x.clone()
    changed[3, 0, 0, 0] += 1e-9
    fit(model, changed, fisher=GGN())
    with torch.no_grad():
        model[0].weight[0, 0, 0, 0] += 1e-9  # type: ignore[index,operator]
    fit(model, x, fisher=GGN())
    assert len(places) == 4


def test_an_interrupted_fit_leaves_whole_files_only(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    model, x, y = conv_net()
    derivatives = derivatives_of(model, x, y)
    curvature = EKFAC(GGN(), folder=tmp_path)
    # Room for one block at a time, and an interruption after the first.
    monkeypatch.setattr(fitting_module.Fit, "_groups", lambda self, names, look: [[n] for n in names])
    original = fitting_module.Fit._fit
    done: list[Any] = []

    def interrupted(self: Any, blocks: Any, shelf: Any) -> Any:
        if done:
            raise KeyboardInterrupt
        done.append(list(blocks))
        return original(self, blocks, shelf)

    monkeypatch.setattr(fitting_module.Fit, "_fit", interrupted)
    with pytest.raises(KeyboardInterrupt):
        fitted(curvature, derivatives)
    assert len(list(tmp_path.rglob("*.safetensors"))) == 1
    assert not list(tmp_path.rglob("*.tmp"))
    rest: list[Any] = []
    monkeypatch.setattr(fitting_module.Fit, "_fit", lambda self, b, s: rest.extend(b) or original(self, b, s))
    found = fitted(curvature, derivatives)
    assert sorted(rest) == sorted(set(derivatives.space.blocks) - set(done[0]))
    torch.testing.assert_close(written_out(found), written_out(fitted(EKFAC(GGN()), derivatives)))


@pytest.mark.slow
def test_factors_larger_than_memory_are_fitted_in_turn_and_stay_on_disk(tmp_path: Any) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Linear(30, 30) for _ in range(4)), nn.Tanh(), nn.Linear(30, 3)).double()
    x, y = torch.randn(20, 30).double(), torch.randint(0, 3, (20,))
    derivatives = derivatives_of(model, x, y)
    whole = written_out(fitted(EKFAC(GGN()), derivatives))
    tight = Budget(100_000)
    temporary = fitted(EKFAC(GGN()), derivatives, tight)
    torch.testing.assert_close(written_out(temporary), whole)
    assert any("lie in a temporary folder (give folder=path to keep them" in note for note in temporary.notes)
    place = temporary.blocks.cache.place.path  # type: ignore[attr-defined]
    assert place.exists()
    del temporary
    gc.collect()
    assert not place.exists()
    found = fitted(EKFAC(GGN(), folder=tmp_path), derivatives, tight)
    assert not isinstance(found.blocks, dict)
    torch.testing.assert_close(written_out(found), whole)
    with pytest.raises(TooLarge, match="factors of one layer, '0', would"):
        fitted(EKFAC(GGN(), folder=tmp_path / "b"), derivatives, Budget(10_000))


def test_a_layer_too_large_is_refused_before_the_data_are_read() -> None:
    class Counting(torch.utils.data.Dataset[Any]):
        read = 0

        def __len__(self) -> int:
            return 500

        def __getitem__(self, i: int) -> Any:
            Counting.read += 1
            return torch.ones(30), i % 3

    model = nn.Sequential(nn.Linear(30, 30), nn.Tanh(), nn.Linear(30, 3))
    problem = ptif.Problem(model, ptif.CrossEntropy(), Counting())
    with pytest.raises(TooLarge, match="factors of one layer, '0', would"):
        ptif.Influence(EKFAC(), memory=10_000).fit(problem)
    assert Counting.read < 100  # some are read twice, to see whether they stay the same


def test_a_disk_too_small_for_the_factors_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Linear(30, 30) for _ in range(4)), nn.Tanh(), nn.Linear(30, 3)).double()
    derivatives = derivatives_of(model, torch.randn(20, 30).double(), torch.randint(0, 3, (20,)))
    monkeypatch.setattr(temporary_folder.shutil, "disk_usage", lambda path: SimpleNamespace(free=1000))
    with pytest.raises(TooLarge, match="give folder=path on a larger disk"):
        fitted(EKFAC(GGN()), derivatives, Budget(100_000))


def test_a_folder_that_cannot_be_made_is_refused(tmp_path: Any) -> None:
    (tmp_path / "file").write_text("")
    model, x, y = conv_net()
    with pytest.raises(InvalidInput, match="cannot be written to"):
        fitted(EKFAC(GGN(), folder=tmp_path / "file"), derivatives_of(model, x, y))


# --------------------------------------------------------------------------- what goes wrong


def test_a_decomposition_that_does_not_hold_is_never_used(monkeypatch: pytest.MonkeyPatch) -> None:
    matrix = torch.randn(6, 6).double()
    matrix = matrix @ matrix.T
    garbage = lambda m: (torch.ones(6).double(), torch.full((6, 6), 0.3).double())  # noqa: E731

    def fails(m: Tensor) -> Any:
        raise RuntimeError("did not converge")

    for first in (garbage, fails):
        monkeypatch.setitem(eigen._ALGORITHMS, "torch.linalg.eigh", first)
        values, vectors = eigen.eigh(matrix)
        torch.testing.assert_close((vectors * values) @ vectors.T, matrix)
    monkeypatch.setitem(eigen._ALGORITHMS, "numpy.linalg.eigh", garbage)
    values, vectors = eigen.eigh(matrix)
    torch.testing.assert_close((vectors * values) @ vectors.T, matrix)
    monkeypatch.setitem(eigen._ALGORITHMS, "torch.linalg.svd", fails)
    with pytest.raises(SolveFailed, match="failed by every algorithm"):
        eigen.eigh(matrix, "the layer")
    with pytest.raises(NonFinite, match="The curvature of the layer holds NaN"):
        eigen.eigh(matrix * torch.nan, "the layer")


def test_singular_factors_are_solved_by_damping_and_refused_without() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 2)).double()
    x, y = torch.randn(3, 8).double(), torch.randint(0, 2, (3,))
    problem = ptif.Problem(model, ptif.CrossEntropy(), (x, y))
    assert bool(torch.isfinite(ptif.ekfac().fit(problem).score((x, y)).values).all())
    with pytest.raises(SolveFailed, match="singular, not positive definite; use a positive damping"):
        ptif.ekfac(damping=0.0).fit(problem).score((x, y))


def test_a_layer_that_no_example_moves_is_said_and_does_no_harm() -> None:
    torch.manual_seed(0)

    class Dead(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.used, self.unused = nn.Linear(4, 3), nn.Linear(4, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.used(x) + 0.0 * self.unused(x)

    model, x, y = Dead().double(), torch.randn(10, 4).double(), torch.randint(0, 3, (10,))
    attribution = ptif.ekfac().fit(ptif.Problem(model, ptif.CrossEntropy(), (x, y)))
    scores = attribution.score((x[:2], y[:2]))
    assert any("'unused'" in note and "no training example moves" in note for note in scores.diagnostics.notes)
    alone = ptif.ekfac().fit(ptif.Problem(model, ptif.CrossEntropy(), (x, y), parameters="used")).score((x[:2], y[:2]))
    torch.testing.assert_close(scores.values, alone.values)


def test_fewer_examples_than_a_side_is_long_is_said() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(40, 3), nn.Tanh(), nn.Linear(3, 2)).double()
    x, y = torch.randn(4, 40).double(), torch.randint(0, 2, (4,))
    xq, yq = x[:1], y[:1]
    notes = ptif.ekfac().fit(ptif.Problem(model, ptif.CrossEntropy(), (x, y))).score((xq, yq)).diagnostics.notes
    assert any("fewer gradients than" in note and "'0'" in note for note in notes)


def test_a_loss_that_is_no_likelihood_is_refused_and_told_the_way_out() -> None:
    model, x, y, *_ = mlp()
    derivatives = derivatives_of(
        model, x, y, lambda outputs, targets: F.multi_margin_loss(outputs, targets, reduction="none")
    )
    with pytest.raises(NotLikelihood, match=r"fisher=ptif.curvature.EmpiricalFisher\(\)"):
        fitted(EKFAC(), derivatives)
    assert fitted(EKFAC(EmpiricalFisher()), derivatives).mean_eigenvalue() > 0


@pytest.mark.parametrize("bad", [{"fisher": "exact"}, {"examples": 0}, {"largest": 0}, {"examples": 2.5}], ids=repr)
def test_bad_settings_are_refused_when_written(bad: Any) -> None:
    for family in FAMILY:
        with pytest.raises((InvalidInput, TypeError)):
            family(**bad)


def test_a_mean_over_checkpoints_adds_statistics_up() -> None:
    model, x, y, *_ = mlp()
    derivatives = derivatives_of(model, x, y)
    own = {k: v.clone() for k, v in model.state_dict().items()}
    other = {k: v * 1.3 for k, v in own.items()}
    curvature = EKFAC(GGN())
    both = curvature.mean_of([(None, derivatives), (other, derivatives)], Form.SPECTRAL, Budget())
    first = fitted(curvature, derivatives)
    model.load_state_dict(other)
    second = fitted(curvature, derivatives)
    model.load_state_dict(own)
    want = (first.mean_eigenvalue() + second.mean_eigenvalue()) / 2
    assert both.mean_eigenvalue() == pytest.approx(want, rel=1e-10)
    assert all(torch.equal(v, own[k]) for k, v in model.state_dict().items())


def test_files_hold_what_the_format_says(tmp_path: Any) -> None:
    model, x, y = conv_net()
    fitted(EKFAC(GGN(), folder=tmp_path), derivatives_of(model, x, y))
    kinds = [load_file(p) for p in tmp_path.rglob("*.safetensors")]
    assert all(set(k) <= {"left", "right", "values"} and k["values"].dtype == torch.float64 for k in kinds)
    save_file(kinds[0], tmp_path / "copy.safetensors")


def test_a_long_side_summed_in_float32_is_decomposed_as_well_in_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    """Reference: the decomposition in float64. A wrong one is noticed and done again."""
    generator = torch.Generator().manual_seed(0)
    d = eigen.SINGLE_FROM
    x = torch.randn(2 * d, d, generator=generator) * torch.logspace(0, -3, d)
    matrix = x.T @ x / d
    want = torch.linalg.eigvalsh(matrix.double())
    calls: list[torch.dtype] = []
    decompose = torch.linalg.eigh

    def watched(a: Tensor) -> Any:
        calls.append(a.dtype)
        return decompose(a)

    monkeypatch.setattr(torch.linalg, "eigh", watched)
    values, vectors = eigen.eigh(matrix, single=True)
    assert calls == [torch.float32] == [vectors.dtype] and values.dtype == torch.float64
    torch.testing.assert_close(values, want, rtol=0, atol=1e-5 * float(want.max()))
    vectors = vectors.double()
    rebuilt = vectors @ torch.diag(values) @ vectors.T
    torch.testing.assert_close(rebuilt, matrix.double(), rtol=0, atol=1e-5 * float(want.max()))
    for finer in (matrix.double(), matrix[: d - 1, : d - 1]):
        calls.clear()
        eigen.eigh(finer, single=True)
        assert torch.float32 not in calls
    monkeypatch.setattr(torch.linalg, "eigh", lambda a: (decompose(a)[0] + 0.01, decompose(a)[1]))
    again = eigen.eigh(matrix, single=True)[0]
    torch.testing.assert_close(again, want, rtol=0, atol=1e-9 * float(want.max()))

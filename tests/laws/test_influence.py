"""Laws of the whole pipeline: values against dense float64, closed forms and real refits."""

from __future__ import annotations

import copy
from functools import lru_cache
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

import pytorch_influence_functions as ptif
from pytorch_influence_functions.core.errors import SolveFailed, TooLarge
from pytorch_influence_functions.curvature import GGN, EmpiricalFisher, Fisher, Hessian
from pytorch_influence_functions.damping import Relative
from pytorch_influence_functions.linalg.operator import AbstractOperator
from pytorch_influence_functions.linalg.rows import Route
from pytorch_influence_functions.scaling import Leverage
from pytorch_influence_functions.solvers import CG, Cholesky, Neumann, Spectral, Woodbury, auto
from tests.laws.zoo import CASES, build
from tests.oracles.autograd import dense_ggn, dense_hessian, example_gradients, influence
from tests.tolerance import gap, rounding

SMALL = 1e-3
"""A damping at which curvature decides: a gradient dot product is far from every answer here."""


def cross_entropy(outputs: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(outputs, targets, reduction="none")


def mlp(n: int = 60, q: int = 4, seed: int = 0) -> tuple[nn.Module, Tensor, Tensor, Tensor, Tensor]:
    """A model at the minimum of its loss, examples and queries: each caller gets a copy and the same random state."""
    random_state, *parts = trained_mlp(n, q, seed, torch.get_default_dtype())
    torch.set_rng_state(random_state)
    model, x, y, xq, yq = copy.deepcopy(parts)
    return model, x, y, xq, yq


@lru_cache
def trained_mlp(n: int, q: int, seed: int, dtype: torch.dtype) -> tuple[Any, ...]:
    """What `mlp` copies, trained once; its draws depend on the default dtype."""
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 3)).double()
    x, y = torch.randn(n + q, 5).double() * torch.tensor([3.0, 1.0, 1.0, 0.5, 0.2]), torch.randint(0, 3, (n + q,))
    optimizer = torch.optim.LBFGS(model.parameters(), max_iter=200)

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = F.cross_entropy(model(x[:n]), y[:n]) + 0.005 * sum(p.square().sum() for p in model.parameters())
        loss.backward()
        return loss

    optimizer.step(closure)
    optimizer.zero_grad()
    return torch.get_rng_state(), model, x[:n], y[:n], x[n:], y[n:]


def relative_gap(a: Tensor, b: Tensor) -> float:
    return float((a.double() - b.double()).norm() / b.double().norm())


def oracle(curvature: str, data: Any, damping: float) -> Tensor:
    model, x, y, xq, yq = data
    g, gq = example_gradients(model, cross_entropy, x, y), example_gradients(model, cross_entropy, xq, yq)
    matrix = {
        "hessian": lambda: dense_hessian(model, cross_entropy, x, y),
        "ggn": lambda: dense_ggn(model, cross_entropy, x, y),
        "empirical": lambda: g.T @ g / len(g),
        "identity": lambda: torch.eye(g.shape[1], dtype=g.dtype),
    }[curvature]()
    return influence(matrix, damping, gq, g)


def hessian_damping(data: Any) -> float:
    model, x, y, *_ = data
    return max(SMALL, 1.5 * -float(torch.linalg.eigvalsh(dense_hessian(model, cross_entropy, x, y)).min()))


METHODS = {
    "identity": ("identity", lambda lam: ptif.methods.grad_dot(), 1e-12),
    "hessian spectral": (
        "hessian",
        lambda lam: ptif.Influence(Hessian(), Spectral(), lam),
        1e-10,
    ),
    "hessian cholesky": (
        "hessian",
        lambda lam: ptif.Influence(Hessian(), Cholesky(), lam),
        1e-10,
    ),
    "hessian cg": (
        "hessian",
        lambda lam: ptif.Influence(Hessian(), CG(1e-11, 400), lam),
        1e-7,
    ),
    "ggn lissa": (
        "ggn",
        lambda lam: ptif.Influence(GGN(), Neumann(batch_size=60, tolerance=1e-4), lam),
        2e-2,
    ),
    "ggn spectral": ("ggn", lambda lam: ptif.Influence(GGN(), Spectral(), lam), 1e-10),
    "ggn dual": ("ggn", lambda lam: ptif.Influence(GGN(), Woodbury(), lam), 1e-8),
    "ggn cg": ("ggn", lambda lam: ptif.Influence(GGN(), CG(1e-11, 400), lam), 1e-7),
    "fisher": ("ggn", lambda lam: ptif.Influence(Fisher(), Spectral(), lam), 1e-10),
    "ggn cg preconditioned": (
        "ggn",
        lambda lam: ptif.Influence(GGN(), CG(1e-11, 400), lam, preconditioner=EmpiricalFisher()),
        1e-7,
    ),
    "empirical spectral": (
        "empirical",
        lambda lam: ptif.Influence(EmpiricalFisher(), Spectral(), lam),
        1e-10,
    ),
    "empirical dual": ("empirical", lambda lam: ptif.dual(damping=lam), 1e-8),
    "empirical cg": (
        "empirical",
        lambda lam: ptif.Influence(EmpiricalFisher(), CG(1e-11, 400), lam),
        1e-7,
    ),
    "auto": ("ggn", lambda lam: ptif.Influence(damping=lam), 1e-10),
}


@pytest.mark.parametrize("name", METHODS)
def test_every_method_equals_the_dense_solve(name: str) -> None:
    data = mlp()
    model, x, y, xq, yq = data
    curvature, make, tolerance = METHODS[name]
    damping = {"identity": 0.0, "hessian": hessian_damping(data)}.get(curvature, 0.05 if "lissa" in name else SMALL)
    want = oracle(curvature, data, damping)
    got = ptif.attribute(model, (x, y), (xq, yq), loss=nn.CrossEntropyLoss(), method=make(damping))
    assert relative_gap(got.values, want) < tolerance
    if curvature != "identity":
        dot = oracle("identity", data, 0.0)
        scale = (dot * want).sum() / (dot * dot).sum()
        assert relative_gap(scale * dot, want) > 0.3, "a gradient dot product must not pass for this curvature"


def test_ridge_leave_one_out_is_influence_over_one_minus_leverage() -> None:
    """Sherman-Morrison: removing example i from ridge regression, in closed form."""
    torch.manual_seed(0)
    n, p, decay = 25, 6, 0.3
    x, w = torch.randn(n, p).double(), torch.randn(p, 1).double()
    y = x @ w + torch.randn(n, 1).double()
    xq, yq = torch.randn(4, p).double(), torch.randn(4, 1).double()

    def fitted(keep: Tensor) -> Tensor:
        a = x[keep].T @ x[keep] / n + decay * torch.eye(p).double()
        return torch.linalg.solve(a, x[keep].T @ y[keep] / n)

    everything = fitted(torch.arange(n))
    model = nn.Linear(p, 1, bias=False).double()
    with torch.no_grad():
        model.weight.copy_(everything.T)
    keeps = [torch.tensor([j for j in range(n) if j != i]) for i in range(n)]
    # A linear measure: the prediction itself, for which the leave-one-out formula is exact.
    change = torch.stack([(xq @ (fitted(k) - everything))[:, 0] for k in keeps], 1)
    problem = ptif.Problem(model, ptif.SquaredError(), (x, y), weight_decay=decay)
    measure = ptif.FromFunction(lambda out, t: out[:, 0], lower_is_better=False, reduction="none")
    for solver in (Spectral(), Woodbury()):
        spec = ptif.Influence(GGN(), solver, 1e-12, scaling=Leverage())
        got = spec.fit(problem).score((xq, yq), measure=measure)
        assert relative_gap(got.values, change) < (1e-6 if isinstance(solver, Woodbury) else 1e-9)
        first_order = ptif.Influence(GGN(), solver, 1e-12).fit(problem).score((xq, yq), measure=measure)
        assert relative_gap(first_order.values, change) > 0.05


def _logistic(x: Tensor, y: Tensor, weights: Tensor, decay: float, start: Tensor | None = None) -> Tensor:
    """Newton's method to machine precision on mean cross entropy with fixed denominators, [C, P]."""
    classes, p = 3, x.shape[1]
    w = torch.zeros(classes, p).double() if start is None else start.clone()
    for _ in range(30):
        prob = (x @ w.T).softmax(1)
        gradient = ((prob - F.one_hot(y, classes)) * weights[:, None]).T @ x / len(x) + decay * w
        block = torch.diag_embed(prob) - prob[:, :, None] * prob[:, None, :]
        h = torch.einsum("n,nab,ni,nj->aibj", weights, block, x, x).reshape(classes * p, -1) / len(x)
        h = h + decay * torch.eye(classes * p).double()
        step = torch.linalg.solve(h, gradient.flatten()).view_as(w)
        w = w - step
        if float(step.abs().max()) < 1e-13:
            break
    return w


def test_logistic_regression_against_real_refits() -> None:
    torch.manual_seed(1)
    n, p, decay = 200, 5, 0.02
    x = torch.randn(n + 5, p).double()
    y = (x @ torch.randn(p, 3).double() + 0.7 * torch.randn(n + 5, 3)).argmax(1)
    x, xq, y, yq = x[:n], x[n:], y[:n], y[n:]
    full = _logistic(x, y, torch.ones(n).double(), decay)
    before = cross_entropy(xq @ full.T, yq)
    actual = []
    for i in range(n):
        weights = torch.ones(n).double()
        weights[i] = 0.0
        actual.append(cross_entropy(xq @ _logistic(x, y, weights, decay, full).T, yq) - before)
    truth = torch.stack(actual, 1)
    model = nn.Linear(p, 3, bias=False).double()
    with torch.no_grad():
        model.weight.copy_(full)
    problem = ptif.Problem(model, nn.CrossEntropyLoss(), (x, y), weight_decay=decay)
    raw = ptif.exact(damping=1e-10).fit(problem).score((xq, yq)).values
    corrected = ptif.methods.one_step_newton(damping=1e-10).fit(problem).score((xq, yq)).values

    def agreement(a: Tensor) -> tuple[float, float]:
        a, t = a.flatten().double().numpy(), truth.flatten().numpy()
        return float(np.corrcoef(a, t)[0, 1]), float(np.polyfit(a, t, 1)[0])

    r_raw, slope_raw = agreement(raw)
    r, slope = agreement(corrected)
    assert r_raw > 0.99 and slope_raw > 1.02, "first order underestimates"
    assert r > 0.99 and abs(slope - 1) < 0.02
    assert int(raw[0].argmax()) == int(truth[0].argmax()), "positive is helpful: its removal raises the loss most"


@pytest.mark.slow
def test_weight_decay_is_curvature_and_per_example_decay_is_a_constant_per_query() -> None:
    data = mlp()
    model, x, y, xq, yq = data
    matrix = dense_ggn(model, cross_entropy, x, y)
    g, gq = example_gradients(model, cross_entropy, x, y), example_gradients(model, cross_entropy, xq, yq)
    decay = 0.05
    for solver in (Spectral(), Woodbury(), CG(1e-11, 400)):
        for per_example in (False, True):
            theta = torch.cat([p.detach().flatten() for p in model.parameters()])
            rows = g + decay * theta if per_example else g
            want = influence(matrix, SMALL + decay, gq, rows)
            got = ptif.attribute(
                model,
                (x, y),
                (xq, yq),
                loss=nn.CrossEntropyLoss(),
                weight_decay=ptif.WeightDecay(decay, per_example=per_example),
                method=ptif.Influence(GGN(), solver, SMALL),
            )
            assert relative_gap(got.values, want) < 1e-8


@pytest.mark.parametrize("solver", [Spectral(), Woodbury(), CG(1e-11, 400)])
def test_decay_that_differs_by_parameter(solver: Any) -> None:
    model, x, y, xq, yq = mlp()
    decay = {"0.weight": 0.2, "2.weight": 0.01}
    matrix = dense_ggn(model, cross_entropy, x, y)
    diagonal = torch.cat([torch.full((p.numel(),), decay.get(k, 0.0)) for k, p in model.named_parameters()]).double()
    g, gq = example_gradients(model, cross_entropy, x, y), example_gradients(model, cross_entropy, xq, yq)
    want = influence(matrix + diagonal.diag(), SMALL, gq, g)
    problem = ptif.Problem(model, nn.CrossEntropyLoss(), (x, y), weight_decay=decay)
    got = ptif.Influence(GGN(), solver, SMALL).fit(problem).score((xq, yq))
    assert relative_gap(got.values, want) < 1e-7


@pytest.mark.parametrize("route", [r for r in Route])
@pytest.mark.parametrize("method", [ptif.methods.grad_dot(), ptif.Influence(GGN(), Cholesky(), SMALL)])
def test_scores_do_not_depend_on_the_route(route: Route, method: ptif.Influence) -> None:
    model, x, y, xq, yq = mlp()
    want = oracle(
        "identity" if method == ptif.methods.grad_dot() else "ggn",
        (model, x, y, xq, yq),
        0.0 if method == ptif.methods.grad_dot() else SMALL,
    )
    forced = ptif.Influence(method.curvature, method.solver, method.damping, route=route)
    got = forced.fit(ptif.Problem(model, ptif.CrossEntropy(), (x, y))).score((xq, yq))
    assert relative_gap(got.values, want) < 1e-8
    by_name = ptif.attribute(model, (x, y), (xq, yq), loss=nn.CrossEntropyLoss(), method=method, route=route.value)
    assert gap(by_name.values, got.values) < rounding(got.values, condition=1e3)


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", ["conv2d stride", "batch norm 2d", "tied", "lstm", "attention", "encoder layer", "called twice"]
)
@pytest.mark.parametrize("curvature", ["ggn", "hessian"])
def test_matrix_free_products_equal_dense_curvature(name: str, curvature: str) -> None:
    model, x, y = build(next(c for c in CASES if c.name == name))
    make = {"ggn": GGN(), "hessian": Hessian()}[curvature]
    with sdpa_kernel(SDPBackend.MATH):
        dense = {"ggn": dense_ggn, "hessian": dense_hessian}[curvature](model, cross_entropy, x, y)
    from pytorch_influence_functions.curvature.base import Budget, Form
    from pytorch_influence_functions.gradients.per_example import Derivatives

    derivatives = Derivatives.of(ptif.Problem(model, ptif.CrossEntropy(), (x, y), batch_size=4))
    space = derivatives.space
    operator = make.of(derivatives, Form.IMPLICIT, Budget())
    v = torch.randn(3, space.size, dtype=torch.float64)
    product = operator.apply(space.rows(v)).flat()
    by_matrix = make.of(derivatives, Form.MATRIX, Budget()).apply(space.rows(v)).flat()
    assert relative_gap(product, by_matrix) < 1e-9
    one = operator.apply(space.rows(v[:1])).flat()
    assert relative_gap(one, product[:1]) < 1e-9
    moved = space.to_parameters(space.rows(v))
    names = [k for k, _ in model.named_parameters()]
    flat = torch.cat([moved[k].flatten(1) for k in names], 1)
    want = space.to_parameters(space.rows(product))
    assert relative_gap(torch.cat([want[k].flatten(1) for k in names], 1), flat @ dense) < 1e-9


@pytest.mark.slow
@pytest.mark.parametrize("batch_size", [1, 7])
@pytest.mark.parametrize(
    "method",
    [
        ptif.dual(damping=SMALL),
        ptif.Influence(GGN(), CG(1e-9, 400), 0.1),
        ptif.Influence(Fisher(samples=2), Spectral(), SMALL),
    ],
)
def test_batch_size_does_not_matter(batch_size: int, method: ptif.Influence) -> None:
    model, x, y, xq, yq = mlp(n=16)
    want = ptif.attribute(model, (x, y), (xq, yq), loss=nn.CrossEntropyLoss(), method=method, batch_size=64)
    got = ptif.attribute(model, (x, y), (xq, yq), loss=nn.CrossEntropyLoss(), method=method, batch_size=batch_size)
    assert relative_gap(got.values, want.values) < 1e-7


def test_a_shuffling_loader_changes_nothing() -> None:
    model, x, y, xq, yq = mlp()
    train = torch.utils.data.TensorDataset(x, y)
    loader = torch.utils.data.DataLoader(train, batch_size=7, shuffle=True, drop_last=True)
    want = ptif.attribute(model, (x, y), (xq, yq), loss=nn.CrossEntropyLoss())
    got = ptif.attribute(model, loader, (xq, yq), loss=nn.CrossEntropyLoss())
    assert relative_gap(got.values, want.values) < 1e-9
    order = torch.randperm(len(x))
    shuffled = ptif.attribute(
        model, torch.utils.data.Subset(train, order.tolist()), (xq, yq), loss=nn.CrossEntropyLoss()
    )
    assert relative_gap(shuffled.values, want.values[:, order]) < 1e-9


@pytest.mark.parametrize(
    "loss",
    [
        nn.CrossEntropyLoss(),
        nn.CrossEntropyLoss(reduction="sum"),
        nn.CrossEntropyLoss(reduction="none"),
        F.cross_entropy,
        lambda out, y: F.cross_entropy(out, y, reduction="sum"),
        lambda out, y: F.cross_entropy(out, y, reduction="none"),
    ],
)
def test_the_reduction_of_the_loss_does_not_matter(loss: Any) -> None:
    data = mlp()
    model, x, y, xq, yq = data
    method = ptif.Influence(EmpiricalFisher(), Woodbury(), SMALL)
    got = ptif.attribute(model, (x, y), (xq, yq), loss=loss, method=method)
    assert relative_gap(got.values, oracle("empirical", data, SMALL)) < 1e-8


@pytest.mark.slow
def test_self_influence_is_the_diagonal() -> None:
    data = mlp()
    model, x, y, *_ = data
    for name in ("ggn spectral", "ggn dual", "ggn cg", "empirical dual", "empirical spectral"):
        curvature, make, _ = METHODS[name]
        want = oracle(curvature, (model, x, y, x, y), 0.05).diagonal()
        got = make(0.05).fit(ptif.Problem(model, ptif.CrossEntropy(), (x, y))).self_influence()
        assert relative_gap(got, want) < 1e-7 and float(got.min()) >= 0


@pytest.mark.slow
def test_redamping_equals_fitting_again_and_path_sweeps() -> None:
    data = mlp()
    model, x, y, xq, yq = data
    problem = ptif.Problem(model, ptif.CrossEntropy(), (x, y))
    for solver in (Spectral(), Woodbury(), CG(1e-11, 400)):
        fitted = ptif.Influence(GGN(), solver, 1.0).fit(problem)
        for lam, scores in fitted.scores_over_damping((xq, yq), [1.0, 0.1, 0.01]).items():
            assert relative_gap(scores.values, oracle("ggn", data, lam)) < 1e-7
            assert scores.diagnostics.damping == pytest.approx(lam)


def test_checkpoints_are_averaged_and_the_weights_come_back() -> None:
    model, x, y, xq, yq = mlp()
    first = {k: v.clone() for k, v in model.state_dict().items()}
    second = {k: v + 0.1 * torch.randn_like(v) for k, v in first.items()}
    singles = []
    for state in (first, second):
        model.load_state_dict(state)
        singles.append(ptif.attribute(model, (x, y), (xq, yq), loss=nn.CrossEntropyLoss(), damping=SMALL).values)
    model.load_state_dict(first)
    both = ptif.attribute(
        model, (x, y), (xq, yq), loss=nn.CrossEntropyLoss(), damping=SMALL, checkpoints=[first, second]
    )
    assert relative_gap(both.values, (singles[0] + singles[1]) / 2) < 1e-9
    assert all(torch.equal(v, first[k]) for k, v in model.state_dict().items())


def test_top_keeps_the_extremes() -> None:
    model, x, y, xq, yq = mlp()
    full = ptif.attribute(model, (x, y), (xq, yq), loss=nn.CrossEntropyLoss())
    top = ptif.attribute(model, (x, y), (xq, yq), loss=nn.CrossEntropyLoss(), top=3, batch_size=7)
    for q in range(len(xq)):
        assert [i for i, _ in top.helpful(q, 3)] == [i for i, _ in full.helpful(q, 3)]
        assert [i for i, _ in top.harmful(q, 3)] == [i for i, _ in full.harmful(q, 3)]


def test_the_sign_follows_the_measure() -> None:
    """Helpful is what makes the answer better, whether the measure is a loss or a margin."""
    model, x, y, xq, yq = mlp()
    loss = ptif.attribute(model, (x, y), (xq, yq), loss=nn.CrossEntropyLoss())
    margin = ptif.attribute(model, (x, y), (xq, yq), loss=nn.CrossEntropyLoss(), measure=ptif.Margin())
    assert loss.lower_is_better and not margin.lower_is_better
    # For one query the margin is a monotone function of its loss, so the order is the same and the sign opposite.
    assert [i for i, _ in loss.helpful(0, 5)] == [i for i, _ in margin.helpful(0, 5)]
    assert loss.helpful(0, 1)[0][1] > 0 > margin.helpful(0, 1)[0][1]


def test_the_forecast_names_the_method_and_nothing_is_run() -> None:
    model, x, y, xq, yq = mlp()
    made = ptif.forecast(model, (x, y), (xq, yq), loss=nn.CrossEntropyLoss())
    assert "GGN" in made.method and "dense" in made.why and made.seconds > 0 and made.memory_bytes > 0
    assert "forward+backward" in str(made)


def test_auto_says_why_and_changes_with_size() -> None:
    torch.manual_seed(0)
    wide = nn.Sequential(nn.Linear(5, 600), nn.Tanh(), nn.Linear(600, 3))
    x, y = torch.randn(40, 5), torch.randint(0, 3, (40,))
    scores = ptif.attribute(wide, (x, y), (x[:2], y[:2]), loss=nn.CrossEntropyLoss())
    assert "Woodbury" in scores.diagnostics.method and "40 examples x 2 independent outputs" in scores.diagnostics.why
    small = ptif.attribute(nn.Linear(5, 3), (x, y), (x[:2], y[:2]), loss=nn.CrossEntropyLoss())
    assert "Spectral" in small.diagnostics.method


def test_more_queries_than_parameters() -> None:
    torch.manual_seed(0)
    model = nn.Linear(2, 2).double()
    x, y = torch.randn(30, 2).double(), torch.randint(0, 2, (30,))
    g = example_gradients(model, cross_entropy, x, y)
    want = influence(dense_ggn(model, cross_entropy, x, y), SMALL, g, g)
    got = ptif.attribute(
        model,
        (x, y),
        (x, y),
        loss=nn.CrossEntropyLoss(),
        method=ptif.Influence(GGN(), CG(1e-11), SMALL),
    )
    assert relative_gap(got.values, want) < 1e-8


def test_negative_curvature_is_named() -> None:
    model, x, y, xq, yq = mlp(seed=3)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p))
    with pytest.raises(SolveFailed, match="GGN\\(\\) instead of Hessian\\(\\)"):
        ptif.attribute(model, (x, y), (xq, yq), loss=nn.CrossEntropyLoss(), method=ptif.methods.koh_liang(1e-6))


@pytest.mark.slow
def test_a_small_memory_bound_changes_nothing_but_the_number_of_passes() -> None:
    data = mlp()
    model, x, y, xq, yq = data
    from pytorch_influence_functions.curvature.base import Budget

    tight = ptif.Influence(GGN(), CG(1e-11, 400), 0.1, memory=Budget(60 * 8 * 8 * 2))
    got = tight.fit(ptif.Problem(model, ptif.CrossEntropy(), (x, y))).score((xq, yq))
    assert relative_gap(got.values, oracle("ggn", data, 0.1)) < 1e-8
    with pytest.raises(TooLarge, match="GiB and the bound is"):
        ptif.Influence(GGN(), Spectral(), SMALL, memory=Budget(1000)).fit(
            ptif.Problem(model, ptif.CrossEntropy(), (x, y))
        )


def _only_iterative(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if the exact solution were out of reach."""
    monkeypatch.setattr(auto, "_AFFORDABLE", 0.0)
    monkeypatch.setattr(auto, "_AFFORDABLE_PASSES", 0)


@pytest.mark.slow
def test_auto_guides_conjugate_gradients_and_redamping_keeps_the_guide(monkeypatch: pytest.MonkeyPatch) -> None:
    _only_iterative(monkeypatch)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(20, 110), nn.Tanh(), nn.Linear(110, 10)).double()
    x, y = torch.randn(620, 20).double(), torch.randint(0, 10, (620,))
    problem = ptif.Problem(model, ptif.CrossEntropy(), (x, y), batch_size=200)
    fitted = ptif.Influence(GGN(), damping=Relative(0.3)).fit(problem)
    assert "CG" in fitted.method and "preconditioner=Fisher(samples=1" in fitted.method and "guides it" in fitted.why
    want = ptif.Influence(GGN(), CG(1e-5), Relative(0.3)).fit(problem).score((x[:2], y[:2]))
    got = fitted.score((x[:2], y[:2]))
    assert relative_gap(got.values, want.values) < 5e-3
    alone = ptif.Influence(GGN(), CG(1e-3), Relative(0.3)).fit(problem).score((x[:2], y[:2]))
    assert got.diagnostics.steps < 0.8 * alone.diagnostics.steps
    operator = fitted.members[0].preconditioner.operator  # type: ignore[union-attr]
    again = fitted.with_damping(1e-3)
    assert again.members[0].preconditioner.operator is operator  # type: ignore[union-attr]
    assert again.score((x[:1], y[:1])).diagnostics.residual_max <= 1e-3


def test_auto_drops_a_guide_that_does_not_pay(monkeypatch: pytest.MonkeyPatch) -> None:
    from pytorch_influence_functions.influence import fitted_member as member

    _only_iterative(monkeypatch)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(20, 110), nn.Tanh(), nn.Linear(110, 10)).double()
    x, y = torch.randn(620, 20).double(), torch.randint(0, 10, (620,))
    problem = ptif.Problem(model, ptif.CrossEntropy(), (x, y), batch_size=200)
    # A guide that swaps directions about: as wrong as a positive definite one can be.
    monkeypatch.setattr(member.Preconditioner, "inverse", lambda self, shift: _Misleading(self.operator.space))
    fitted = ptif.Influence(GGN(), damping=Relative(0.3)).fit(problem)
    assert "preconditioner" not in fitted.method and "does not help" in fitted.why
    assert fitted.score((x[:1], y[:1])).diagnostics.residual_max <= 1e-3


class _Misleading(AbstractOperator):
    def __init__(self, space: Any) -> None:
        self.space = space

    def apply(self, rows: Any) -> Any:
        scale = torch.logspace(-4, 4, self.size, dtype=rows.dtype)
        return self.space.rows(rows.flat() * scale)


def test_an_old_method_name_works_and_says_what_it_is_called_now() -> None:
    model, x, y = mlp()[:3]
    fitted = ptif.dual(damping=0.1).fit(ptif.Problem(model, ptif.CrossEntropy(), (x, y)))
    with pytest.warns(DeprecationWarning, match=r"^\.self_scores\(\) is now \.self_influence\(\)\.$"):
        own = fitted.self_scores()  # type: ignore[attr-defined]
    assert gap(own, fitted.self_influence()) < rounding(own, condition=1e3)
    with pytest.raises(AttributeError, match="Attribution has no attribute 'no_such_thing'"):
        fitted.no_such_thing  # noqa: B018

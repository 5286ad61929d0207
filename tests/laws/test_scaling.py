"""Checkpoint weights, TracIn, cosine, RelatIF and representer points against their formulas in float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import pytorch_influence_functions as ptif
from pytorch_influence_functions.core.errors import InvalidInput
from pytorch_influence_functions.curvature import GGN, Identity
from pytorch_influence_functions.methods import RepresenterPoints
from pytorch_influence_functions.solvers import CG, Spectral, Woodbury
from tests.laws.test_influence import cross_entropy, mlp, relative_gap
from tests.oracles.autograd import dense_ggn, example_gradients


def gradients(model: nn.Module, data: Any) -> tuple[Tensor, Tensor]:
    _, x, y, xq, yq = data
    return example_gradients(model, cross_entropy, x, y), example_gradients(model, cross_entropy, xq, yq)


def states(model: nn.Module, count: int = 3) -> list[dict[str, Tensor]]:
    own = {k: v.clone() for k, v in model.state_dict().items()}
    return [{k: v * (1 + 0.3 * c) for k, v in own.items()} for c in range(count)]


def at(model: nn.Module, state: dict[str, Tensor], data: Any) -> tuple[Tensor, Tensor]:
    own = {k: v.clone() for k, v in model.state_dict().items()}
    model.load_state_dict(state)
    found = gradients(model, data)
    model.load_state_dict(own)
    return found


def test_tracin_is_the_weighted_sum_over_checkpoints() -> None:
    data = model, x, y, xq, yq = mlp()
    checkpoints = states(model)
    problem = ptif.Problem(model, ptif.CrossEntropy(), (x, y), checkpoints=checkpoints)
    method = ptif.tracin([0.1, 0.05, 0.01], steps=[10, 20, 40])
    pairs = [at(model, state, data) for state in checkpoints]
    want = sum(w * gq @ g.T / len(g) for w, (g, gq) in zip([1.0, 1.0, 0.4], pairs, strict=True))
    attribution = method.fit(problem)
    assert relative_gap(attribution.score((xq, yq)).values, want) < 1e-10
    own = sum(w * g.square().sum(1) / len(g) for w, (g, _) in zip([1.0, 1.0, 0.4], pairs, strict=True))
    torch.testing.assert_close(attribution.self_influence(), own)
    assert "weights=(1.0, 1.0, 0.4)" in attribution.method
    mean = ptif.methods.grad_dot().fit(problem).score((xq, yq)).values
    assert relative_gap(mean, want) > 0.1


def test_tracin_predicts_a_removal_during_a_short_run() -> None:
    """Ten small full-batch steps with and without an example: the sum over all ten checkpoints, to first order."""
    torch.manual_seed(0)
    x, y = torch.randn(12, 3).double(), torch.randint(0, 2, (12,))
    xq, yq = torch.randn(3, 3).double(), torch.randint(0, 2, (3,))
    eta = 1e-3

    def train(weight: Tensor) -> tuple[nn.Linear, list[dict[str, Tensor]]]:
        torch.manual_seed(1)
        model, seen = nn.Linear(3, 2).double(), []
        for _ in range(10):
            seen.append({k: v.clone() for k, v in model.state_dict().items()})
            loss = (weight * F.cross_entropy(model(x), y, reduction="none")).sum() / 12
            grads = torch.autograd.grad(loss, list(model.parameters()))
            with torch.no_grad():
                for p, g in zip(model.parameters(), grads, strict=True):
                    p -= eta * g
        return model, seen

    model, checkpoints = train(torch.ones(12).double())
    problem = ptif.Problem(model, ptif.CrossEntropy(), (x, y), checkpoints=checkpoints)
    scores = ptif.tracin([eta] * 10).fit(problem).score((xq, yq)).values
    with torch.no_grad():
        before = F.cross_entropy(model(xq), yq, reduction="none")
        for i in (0, 5, 11):
            weight = torch.ones(12).double()
            weight[i] = 0.0
            change = F.cross_entropy(_trained(train, weight)(xq), yq, reduction="none") - before
            torch.testing.assert_close(scores[:, i], change, rtol=2e-2, atol=1e-9)


def _trained(train: Any, weight: Tensor) -> nn.Module:
    with torch.enable_grad():
        model: nn.Module = train(weight)[0]
    return model


def test_weights_multiply_top_lists_too() -> None:
    model, x, y, xq, yq = mlp()
    problem = ptif.Problem(model, ptif.CrossEntropy(), (x, y))
    double = ptif.Influence(GGN(), Spectral(), 0.01, weights=(2.0,)).fit(problem)
    once = ptif.Influence(GGN(), Spectral(), 0.01).fit(problem)
    torch.testing.assert_close(double.score((xq, yq), top=3).values, 2 * once.score((xq, yq), top=3).values)


@pytest.mark.parametrize(
    ("weights", "words"),
    [
        ((1.0, 2.0), "no checkpoints"),
        ((), "finite numbers"),
        ((0.0,), "all zero"),
    ],
)
def test_weights_that_do_not_fit_are_refused(weights: Any, words: str) -> None:
    model, x, y, *_ = mlp()
    with pytest.raises(InvalidInput, match=words):
        ptif.Influence(Identity(), Spectral(), 0.0, weights=weights).fit(
            ptif.Problem(model, ptif.CrossEntropy(), (x, y))
        )


def test_tracin_refuses_rates_and_steps_that_do_not_pair_up() -> None:
    with pytest.raises(InvalidInput, match="one each per checkpoint"):
        ptif.tracin([0.1, 0.2], steps=[1])
    with pytest.raises(InvalidInput, match=r"tracin\(learning_rates=0.0\) must be a finite number above 0"):
        ptif.tracin([0.1, 0.0])
    with pytest.raises(InvalidInput, match=r"tracin\(steps=0\) must be a whole number"):
        ptif.tracin([0.1], steps=0)


def test_gradient_cosines_equal_their_definition() -> None:
    data = model, x, y, xq, yq = mlp()
    g, gq = gradients(model, data)
    want = F.normalize(gq, dim=1) @ F.normalize(g, dim=1).T / len(g)
    scores = ptif.methods.grad_cos().fit(ptif.Problem(model, ptif.CrossEntropy(), (x, y))).score((xq, yq))
    assert relative_gap(scores.values, want) < 1e-10
    assert any("cosine" in note for note in scores.diagnostics.notes)


@pytest.mark.slow
@pytest.mark.parametrize("solver", [Spectral(), Woodbury(), CG(rtol=1e-11)], ids=repr)
@pytest.mark.parametrize("parameters", [False, True])
def test_relatif_equals_the_dense_formula(solver: Any, parameters: bool) -> None:
    data = model, x, y, xq, yq = mlp()
    g, gq = gradients(model, data)
    inverse = torch.linalg.inv(dense_ggn(model, cross_entropy, x, y) + 1e-2 * torch.eye(g.shape[1]).double())
    solved = g @ inverse
    size = solved.norm(dim=1) if parameters else (solved * g).sum(1).sqrt()
    want = gq @ inverse @ g.T / len(g) / size
    method = ptif.methods.relatif(ptif.Influence(GGN(), solver, 1e-2), parameters=parameters)
    scores = method.fit(ptif.Problem(model, ptif.CrossEntropy(), (x, y))).score((xq, yq))
    assert relative_gap(scores.values, want) < 1e-7
    assert relative_gap(gq @ g.T / len(g) / g.norm(dim=1), want) > 0.3
    assert any("RelatIF" in note for note in scores.diagnostics.notes)


def test_relatif_of_the_stored_dual_and_of_ekfac() -> None:
    model, x, y, xq, yq = mlp()
    problem = ptif.Problem(model, ptif.CrossEntropy(), (x, y))
    for method in (ptif.dual(damping=1e-2), ptif.ekfac(1e-2)):
        plain = method.fit(problem)
        want = plain.score((xq, yq)).values / (len(x) * plain.self_influence()).sqrt()
        torch.testing.assert_close(ptif.methods.relatif(method).fit(problem).score((xq, yq)).values, want)


def test_an_example_without_gradient_has_the_score_zero() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4, bias=False), nn.ReLU(), nn.Linear(4, 2, bias=False)).double()
    x, y = torch.randn(9, 3).double(), torch.randint(0, 2, (9,))
    x[4] = 0.0
    problem = ptif.Problem(model, ptif.CrossEntropy(), (x, y))
    for method in (ptif.methods.grad_cos(), ptif.methods.relatif(ptif.ekfac())):
        values = method.fit(problem).score((x[:2], y[:2])).values
        assert bool(torch.isfinite(values).all())
        assert float(values[:, 4].abs().max()) == 0.0


# --------------------------------------------------------------------------- representer points


def converged_head(decay: float = 0.05) -> tuple[nn.Module, Tensor, Tensor, Tensor, Tensor]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 3)).double()
    x, y = torch.randn(44, 5).double(), torch.randint(0, 3, (44,))
    head = list(model[2].parameters())
    optimizer = torch.optim.LBFGS(head, max_iter=500, tolerance_grad=1e-13, tolerance_change=0.0)

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = F.cross_entropy(model(x[:40]), y[:40]) + 0.5 * decay * sum(p.square().sum() for p in head)
        loss.backward()
        return loss

    for _ in range(4):
        optimizer.step(closure)
    optimizer.zero_grad()
    return model, x[:40], y[:40], x[40:], y[40:]


def test_representer_points_add_up_to_the_logit() -> None:
    model, x, y, xq, yq = converged_head()
    problem = ptif.Problem(model, ptif.CrossEntropy(), (x, y), weight_decay=0.05)
    scores = RepresenterPoints().fit(problem).score((xq, yq), measure=ptif.Logit())
    logit = model(xq).gather(1, yq[:, None])[:, 0].detach()
    torch.testing.assert_close(-scores.values.sum(1), logit, rtol=1e-7, atol=1e-9)


def test_representer_points_equal_their_formula() -> None:
    model, x, y, xq, yq = converged_head()
    problem = ptif.Problem(model, ptif.CrossEntropy(), (x, y), weight_decay=0.05)
    got = RepresenterPoints().fit(problem).score((xq, yq)).values
    with torch.no_grad():
        f, fq = (torch.cat([model[:2](z), torch.ones(len(z), 1)], 1) for z in (x, xq))
        d, dq = (model(z).softmax(1) - F.one_hot(t, 3) for z, t in ((x, y), (xq, yq)))
    torch.testing.assert_close(got, (dq @ d.T) * (fq @ f.T) / (0.05 * len(x)))


def test_representer_points_leave_out_a_bias_without_decay_and_average_checkpoints() -> None:
    model, x, y, xq, yq = converged_head()
    decay = {"2.weight": 0.05}
    one = ptif.Problem(model, ptif.CrossEntropy(), (x, y), weight_decay=decay)
    two = one.with_(checkpoints=[{k: v.clone() for k, v in model.state_dict().items()}] * 2)
    a, b = (RepresenterPoints().fit(p).score((xq, yq)).values for p in (one, two))
    torch.testing.assert_close(a, b)
    with torch.no_grad():
        d, dq = (model(z).softmax(1) - F.one_hot(t, 3) for z, t in ((x, y), (xq, yq)))
        torch.testing.assert_close(a, (dq @ d.T) * (model[:2](xq) @ model[:2](x).T) / (0.05 * len(x)))


def test_representer_points_refuse_what_has_no_representer_theorem() -> None:
    model, x, y, *_ = mlp()
    with pytest.raises(InvalidInput, match="its strength is 0; give the strength"):
        RepresenterPoints().fit(ptif.Problem(model, ptif.CrossEntropy(), (x, y)))
    bent = nn.Sequential(model, nn.Tanh())
    with pytest.raises(InvalidInput, match="no last layer"):
        RepresenterPoints().fit(ptif.Problem(bent, ptif.CrossEntropy(), (x, y), weight_decay=0.1))

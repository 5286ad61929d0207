"""`FromCurve`: leave-one-out read off one decomposition equals leaving out for real, where that is closed form."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import pytorch_influence_functions as ptif
from pytorch_influence_functions.core.errors import InvalidInput
from pytorch_influence_functions.curvature import GGN, EmpiricalFisher, Hessian
from pytorch_influence_functions.damping import FromCurve
from pytorch_influence_functions.damping.rules import Absolute
from pytorch_influence_functions.solvers import CG, Spectral, Woodbury

F64 = torch.float64
N, D = 30, 4
LAMBDAS = [1e-3, 1e-2, 0.1, 1.0, 10.0]


def _data() -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(3)
    x = torch.randn(N, D, generator=g, dtype=F64) * torch.tensor([2.0, 1.0, 0.5, 0.1], dtype=F64)
    return x, x @ torch.randn(D, 2, generator=g, dtype=F64) + torch.randn(N, 2, generator=g, dtype=F64)


def _linear(weights: Tensor) -> nn.Linear:
    model = nn.Linear(D, weights.shape[0], bias=False).double()
    with torch.no_grad():
        model.weight.copy_(weights)
    return model


def _ridge(x: Tensor, y: Tensor, keep: Tensor, penalty: float) -> Tensor:
    """argmin 1/N sum_kept 1/2 |y - W x|^2 + penalty / 2 |W|^2, [outputs, D]; N counts the one left out too."""
    gram = x[keep].T @ x[keep] / N + penalty * torch.eye(D, dtype=F64)
    return torch.linalg.solve(gram, x[keep].T @ y[keep] / N).T


def _refits(x: Tensor, y: Tensor, penalty: float) -> float:
    """The mean leave-one-out loss by N real fits."""
    total = 0.0
    for i in range(N):
        w = _ridge(x, y, torch.arange(N) != i, penalty)
        total += 0.5 * float((y[i] - w @ x[i]).square().sum()) / N
    return total


def _fit(model: nn.Module, data: Any, solver: Any, decay: Any = 0.0, curvature: Any = None, damping: Any = 0.1) -> Any:
    problem = ptif.Problem(model, ptif.SquaredError(), data, weight_decay=decay, batch_size=7)
    return ptif.Influence(curvature or GGN(), solver, damping).fit(problem)


def _scale() -> float:
    """SquaredError's losses in units of 1/2 |y - f|^2: one factor on loss and curvature alike."""
    loss = ptif.SquaredError().losses(torch.ones(1, 2, dtype=F64), (None, torch.zeros(1, 2, dtype=F64)))
    return float(loss)


@pytest.mark.parametrize("solver", [Woodbury(), Spectral()])
@pytest.mark.parametrize("decay", [0.0, 0.05])
def test_ridge_is_press_from_any_weights(solver: Any, decay: float) -> None:
    x, y = _data()
    anywhere = torch.randn(2, D, generator=torch.Generator().manual_seed(9), dtype=F64)
    c = _scale()
    path = _fit(_linear(anywhere), (x, y), solver, decay).damping_curve(lambdas=LAMBDAS)
    wanted = [c * _refits(x, y, (lam + decay) / c) for lam in LAMBDAS]
    torch.testing.assert_close(torch.tensor(path.losses), torch.tensor(wanted, dtype=torch.float32), rtol=1e-6, atol=0)
    assert max(abs(a / b - 1) for a, b in zip(path.losses, wanted, strict=True)) < 1e-9
    assert path.chosen == LAMBDAS[min(range(len(LAMBDAS)), key=wanted.__getitem__)]
    assert 0 < LAMBDAS.index(path.chosen) < len(LAMBDAS) - 1 and not path.at_edge


@pytest.mark.parametrize("solver", [Woodbury(), Spectral()])
def test_held_out_data_recover_the_lambda_a_ridge_was_trained_with(solver: Any) -> None:
    x, y = _data()
    c, lam = _scale(), 0.1
    trained = _linear(_ridge(x, y, torch.ones(N, dtype=torch.bool), lam / c))
    fitted = _fit(trained, (x, y), solver)
    # Held-out data whose loss is exactly the true leave-one-out loss: one point, moved along its own residual.
    wanted = c * _refits(x, y, lam / c)
    point = trained(x[:1]).detach()
    point[0, 0] += math.sqrt(wanted / (c / 2) / 1.0) if c == 1.0 else math.sqrt(wanted / (c / 2))
    path = fitted.damping_curve(held_out=(x[:1], point), lambdas=[0.5 * lam, lam, 2 * lam])
    assert path.held_out == pytest.approx(wanted, rel=1e-12)
    assert path.losses[1] == pytest.approx(wanted, rel=1e-9)
    assert path.chosen == pytest.approx(lam, rel=1e-7)
    assert path.losses[0] > path.losses[1] > path.losses[2] > path.training


def test_removal_is_one_newton_step_by_hand() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 3)).double()
    x, y = torch.randn(8, 3, dtype=F64), torch.arange(8) % 3
    problem = ptif.Problem(model, ptif.CrossEntropy(), (x, y), batch_size=3)
    held = (torch.randn(20, 3, dtype=F64), torch.arange(20) % 3)
    found = {}
    for solver in (Woodbury(), Spectral()):
        fitted = ptif.Influence(GGN(), solver, 0.1).fit(problem)
        # On the way to the choice nothing but the mean over examples is kept, so compare that.
        found[solver] = _removal(fitted, held)
    flat = torch.cat([p.reshape(-1) for p in model.parameters()]).detach()
    names = [k for k, _ in model.named_parameters()]

    def outputs(theta: Tensor) -> Tensor:
        parts, at = {}, 0
        for k, p in model.named_parameters():
            parts[k] = theta[at : at + p.numel()].view_as(p)
            at += p.numel()
        return torch.func.functional_call(model, parts, (x,))

    assert names
    jac, f = torch.func.jacrev(outputs)(flat), outputs(flat)
    p = f.softmax(1)
    hess = torch.diag_embed(p) - p[:, :, None] * p[:, None, :]
    c = torch.einsum("nap,nab,nbq->pq", jac, hess, jac) / 8
    for k, lam in enumerate(LAMBDAS):
        total = 0.0
        for i in range(8):
            without = c - jac[i].T @ hess[i] @ jac[i] / 8 + lam * torch.eye(len(c), dtype=F64)
            step = torch.linalg.solve(without, jac[i].T @ (p[i] - torch.eye(3, dtype=F64)[y[i]])) / 8
            total += float(nn.functional.cross_entropy(f[i] + jac[i] @ step, y[i])) / 8
        for losses in found.values():
            assert losses[k] == pytest.approx(total, rel=1e-8)


def _removal(fitted: Any, held: Any) -> list[float]:
    """The calibration curve, whatever the held-out loss."""
    from pytorch_influence_functions.damping import curve as module

    member = fitted.members[0]
    losses, _ = module._predict_losses(module._resolvent(member.operator), member.derivatives, False, LAMBDAS, None)
    return losses.tolist()


@pytest.mark.parametrize("refit", [False, True])
def test_the_empirical_fisher_leaves_gradients_out(refit: bool) -> None:
    from pytorch_influence_functions.damping import curve as module

    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 3)).double()
    x, y = torch.randn(8, 3, dtype=F64), torch.arange(8) % 3
    problem = ptif.Problem(model, ptif.CrossEntropy(), (x, y), batch_size=3)
    flat = torch.cat([q.reshape(-1) for q in model.parameters()]).detach()
    losses = nn.functional.cross_entropy(model(x), y, reduction="none")
    g = torch.stack(
        [
            torch.cat([q.reshape(-1) for q in torch.autograd.grad(loss, list(model.parameters()), retain_graph=True)])
            for loss in losses
        ]
    )
    for solver in (Woodbury(), Spectral()):
        member = ptif.Influence(EmpiricalFisher(), solver, 0.1).fit(problem).members[0]
        found, training = module._predict_losses(
            module._resolvent(member.operator),
            member.derivatives,
            True,
            LAMBDAS,
            module._refit(member.operator, member.derivatives) if refit else None,
        )
        assert training == pytest.approx(float(losses.mean().detach()), rel=1e-12)
        for lam, value in zip(LAMBDAS, found.tolist(), strict=True):
            total = 0.0
            for i in range(8):
                keep = torch.arange(8) != i
                c = g[keep].T @ g[keep] / 8 + lam * torch.eye(len(flat), dtype=F64)
                if refit:  # 1/8 sum_kept 1/2 (g (w - theta) + 1)^2 + lam / 2 |w|^2
                    w = torch.linalg.solve(c, g[keep].T @ (g[keep] @ flat - 1) / 8)
                    d = float(g[i] @ (w - flat))
                    total += (float(losses[i].detach()) + d + d * d / 2) / 8
                else:
                    total += (float(losses[i].detach()) + float(g[i] @ torch.linalg.solve(c, g[i])) / 8) / 8
            assert value == pytest.approx(total, rel=1e-8)


def test_as_a_damping_it_is_the_chosen_number() -> None:
    x, y = _data()
    model = _linear(torch.zeros(2, D, dtype=F64))
    rule = FromCurve(lambdas=LAMBDAS)
    fitted = _fit(model, (x, y), Woodbury(), damping=rule)
    path = fitted.damping_curve(lambdas=LAMBDAS)
    assert fitted.members[0].shift.damping == path.chosen
    same = _fit(model, (x, y), Woodbury(), damping=path.chosen)
    torch.testing.assert_close(fitted.score((x, y)).values, same.score((x, y)).values)
    assert same.with_damping(rule).members[0].shift.damping == path.chosen
    assert rule.resolved(fitted.members[0]) == Absolute(path.chosen)
    assert "FromCurve(lambdas=(" in fitted.method
    assert "lambda" in str(path) and len(str(path).splitlines()) == 2 + len(LAMBDAS)


def test_batches_order_and_dtype_do_not_matter() -> None:
    x, y = _data()
    model = _linear(torch.ones(2, D, dtype=F64))
    one = _fit(model, (x, y), Woodbury()).damping_curve()
    order = torch.randperm(N, generator=torch.Generator().manual_seed(0))
    problem = ptif.Problem(model, ptif.SquaredError(), (x[order], y[order]), batch_size=30)
    two = ptif.Influence(GGN(), Woodbury(), 0.1).fit(problem).damping_curve()
    assert one.losses == pytest.approx(two.losses, rel=1e-9) and one.chosen == pytest.approx(two.chosen)
    three = _fit(_linear(torch.ones(2, D)).float(), (x.float(), y.float()), Woodbury()).damping_curve()
    assert one.losses == pytest.approx(three.losses, rel=1e-3)


def test_the_edge_is_said(caplog: pytest.LogCaptureFixture) -> None:
    x, y = _data()
    fitted = _fit(_linear(torch.zeros(2, D, dtype=F64)), (x, y), Woodbury())
    path = fitted.damping_curve(lambdas=[10.0, 100.0])
    assert path.at_edge and "edge" in str(path)
    with caplog.at_level("WARNING"):
        fitted.with_damping(FromCurve(lambdas=[10.0, 100.0]))
    assert "at the edge" in caplog.text


def test_bad_input_is_refused_in_words() -> None:
    x, y = _data()
    model = _linear(torch.zeros(2, D, dtype=F64))
    with pytest.raises(InvalidInput, match="needs at least two different values"):
        FromCurve(lambdas=[0.1])
    with pytest.raises(InvalidInput, match="finite and positive"):
        FromCurve(lambdas=[0.0, 0.1])
    with pytest.raises(InvalidInput, match="takes several damping values"):
        FromCurve(lambdas="many")
    with pytest.raises(InvalidInput, match="one eigendecomposition, which Implicit does not have"):
        _fit(model, (x, y), CG(), damping=FromCurve())
    with pytest.raises(InvalidInput, match=r"Hessian.. does not hold example by example"):
        _fit(model, (x, y), Spectral(), curvature=Hessian(), damping=FromCurve())
    with pytest.raises(InvalidInput, match=r"WeightDecay.per_example=True"):
        _fit(
            model,
            (x, y),
            Woodbury(),
            ptif.WeightDecay(0.1, per_example=True),
            damping=FromCurve(),
        )
    with pytest.raises(InvalidInput, match="looks at the model and its data"):
        FromCurve().of(_fit(model, (x, y), Woodbury()).members[0].operator)
    # The training data themselves: no lambda predicts a loss as low as theirs.
    with pytest.raises(InvalidInput, match="below the leave-one-out loss that any of the lambdas"):
        _fit(model, (x, y), Woodbury(), damping=FromCurve(held_out=(x, y)))
    with pytest.raises(InvalidInput, match="above the leave-one-out loss that any of the lambdas"):
        _fit(model, (x, y), Woodbury(), damping=FromCurve(held_out=(x, y + 1e6)))
    fitted = _fit(model, (x, y), Woodbury())
    with pytest.raises(InvalidInput, match="checkpoint=1 must be 0"):
        fitted.damping_curve(checkpoint=1)


def test_uneven_weight_decay_is_solved_densely_and_refused_in_the_dual() -> None:
    torch.manual_seed(0)
    model = nn.Linear(D, 2, bias=False).double()
    deep = nn.Sequential(nn.Linear(D, 3, bias=False), nn.Linear(3, 2, bias=False)).double()
    x, y = _data()
    decay = ptif.WeightDecay({"0.weight": 0.1, "1.weight": 0.2})
    with pytest.raises(InvalidInput, match="one weight decay for all blocks"):
        _fit(deep, (x, y), Woodbury(), decay, damping=FromCurve())
    path = _fit(deep, (x, y), Spectral(), decay).damping_curve()
    assert all(math.isfinite(v) for v in path.losses)
    assert _fit(model, (x, y), Spectral()).damping_curve().losses[0] > 0

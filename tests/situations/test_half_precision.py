"""My weights are bfloat16 or float16; I want bfloat16 for speed; or my damping is below what float32 resolves."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import pytorch_influence_functions as ptif
from pytorch_influence_functions.core.errors import InvalidInput
from pytorch_influence_functions.curvature.exact import GGN, EmpiricalFisher, Hessian
from pytorch_influence_functions.linalg.gram import Gram
from pytorch_influence_functions.problem.working_precision import in_working_precision
from tests.tolerance import gap

N, Q = 60, 4
HALF = (torch.bfloat16, torch.float16)
Method = Callable[[], Any]
METHODS: dict[str, Method] = {
    "auto": lambda: None,
    "dual": ptif.dual,
    "dual of GGN": lambda: ptif.dual(GGN()),
    "gauss_newton": lambda: ptif.methods.gauss_newton(),
    "exact": lambda: ptif.exact(),
    "ekfac": ptif.ekfac,
    "grad_dot": lambda: ptif.methods.grad_dot(),
}


def trained(dtype: torch.dtype = torch.float32) -> tuple[nn.Module, Tensor, Tensor]:
    """A network with a buffer and a tied weight, its weights rounded to bfloat16 or float16 so that both are exact."""
    torch.manual_seed(0)
    x = torch.randn(N, 12).bfloat16().float()
    y = (x @ torch.randn(12, 3)).argmax(1)
    net = nn.Sequential(nn.Linear(12, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 3))
    step = torch.optim.Adam(net.parameters(), 2e-2)
    for _ in range(40):
        step.zero_grad()
        nn.functional.cross_entropy(net(x), y).backward()
        step.step()
    net.eval().zero_grad(set_to_none=True)
    return net.to(torch.bfloat16).to(dtype), x, y


def rank_correlation(a: Tensor, b: Tensor) -> float:
    ranks = [t.argsort(1).argsort(1).double() for t in (a, b)]
    centred = [r - r.mean(1, keepdim=True) for r in ranks]
    return float((centred[0] * centred[1]).sum() / (centred[0].norm() * centred[1].norm()))


@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize("name", METHODS)
def test_weights_in_half_precision_give_the_scores_of_the_same_weights_in_float32(
    name: str, dtype: torch.dtype
) -> None:
    net, x, y = trained()
    loss = nn.CrossEntropyLoss()
    expected = ptif.attribute(net, (x, y), (x[:Q], y[:Q]), loss=loss, method=METHODS[name]())
    half = trained()[0].to(dtype)
    before = {k: v.clone() for k, v in half.state_dict().items()}
    narrow = x.to(dtype)
    scores = ptif.attribute(half, (narrow, y), (narrow[:Q], y[:Q]), loss=loss, method=METHODS[name]())
    allowed = 1e-4 if dtype is torch.bfloat16 else 5e-3  # float16 rounds the smallest weights
    assert gap(scores.values, expected.values) < allowed
    assert scores.values.dtype is torch.float32
    for key, value in half.state_dict().items():
        assert value.dtype is before[key].dtype and torch.equal(value, before[key]), key
    assert "forward" not in vars(half) and all(p.requires_grad and p.grad is None for p in half.parameters())


def test_the_loss_is_found_and_checkpoints_in_half_precision_are_loaded() -> None:
    half, x, y = trained(torch.bfloat16)
    x = x.bfloat16()
    state = {k: v.clone() for k, v in half.state_dict().items()}
    own = ptif.attribute(half, (x, y), (x[:Q], y[:Q]))
    twice = ptif.attribute(half, (x, y), (x[:Q], y[:Q]), checkpoints=[state, state])
    assert gap(twice.values, own.values) < 1e-5
    assert ptif.attribute(half, (x, y), (x[:Q], y[:Q]), loss=nn.CrossEntropyLoss()).values.shape == (Q, N)


class ByName(nn.Module):
    """A forward pass that asks for bfloat16 by name."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(12, 3).bfloat16()

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.layer(x.bfloat16())
        return out


@pytest.mark.parametrize("name", METHODS)
def test_a_forward_pass_that_asks_for_half_precision_is_computed_as_it_is(name: str) -> None:
    torch.manual_seed(0)
    model = ByName()
    _, x, y = trained()
    scores = ptif.attribute(model, (x, y), (x[:Q], y[:Q]), method=METHODS[name](), loss=nn.CrossEntropyLoss())
    wide = nn.Linear(12, 3)
    wide.load_state_dict({k: v.float() for k, v in model.layer.state_dict().items()})
    expected = ptif.attribute(wide, (x, y), (x[:Q], y[:Q]), method=METHODS[name](), loss=nn.CrossEntropyLoss())
    assert rank_correlation(scores.values, expected.values) > 0.97


def test_tied_weights_stay_tied_and_frozen_ones_are_widened_too() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table, self.head = nn.Embedding(9, 4), nn.Linear(4, 9, bias=False)
            self.head.weight = self.table.weight
            self.frozen = nn.Linear(4, 4)
            self.frozen.requires_grad_(False)

        def forward(self, ids: Tensor) -> Tensor:
            return self.head(self.frozen(self.table(ids)).tanh())

    torch.manual_seed(0)
    model = Tied().bfloat16()
    ids = torch.arange(20) % 9
    problem = ptif.Problem(model, nn.CrossEntropyLoss(), (ids, ids.flip(0)))
    wide: Any = in_working_precision(problem).model
    assert wide.head.weight is wide.table.weight and wide.frozen.weight.dtype is torch.float32
    assert model.table.weight.dtype is torch.bfloat16
    assert ptif.dual().fit(problem).score((ids[:2], ids[:2])).values.shape == (2, 20)


# --------------------------------------------------------------------------- precision="bf16"


@pytest.mark.parametrize("name", ["dual", "dual of GGN", "gauss_newton", "ekfac", "grad_dot"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_bfloat16_passes_rank_as_float32_does(name: str, dtype: torch.dtype) -> None:
    net, x, y = trained(dtype)
    loss, method = nn.CrossEntropyLoss(), METHODS[name]()
    given = x.to(dtype)
    exact = ptif.attribute(net, (given, y), (given[:Q], y[:Q]), loss=loss, method=method)
    fast = ptif.attribute(net, (given, y), (given[:Q], y[:Q]), loss=loss, method=method, precision="bf16")
    assert fast.values.dtype is torch.float32 and "precision='bf16'" in fast.diagnostics.method
    assert 0 < gap(fast.values, exact.values) < 0.2
    assert rank_correlation(fast.values, exact.values) > 0.97
    assert next(net.parameters()).dtype is dtype and "forward" not in vars(net)


def test_bfloat16_is_seen_by_every_layer() -> None:
    net, x, y = trained()
    types: list[torch.dtype] = []
    handle = net[0].register_forward_hook(lambda _m, _i, out: types.append(out.dtype))
    ptif.methods.grad_dot().fit(ptif.Problem(net, nn.CrossEntropyLoss(), (x, y))).score((x[:Q], y[:Q]))
    assert set(types) == {torch.float32}
    types.clear()
    ptif.attribute(net, (x, y), (x[:Q], y[:Q]), method="grad_dot", precision="bf16", loss=nn.CrossEntropyLoss())
    handle.remove()
    assert set(types) == {torch.bfloat16}


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: ptif.Influence(precision="int8"), r"precision='int8' is not offered; write precision='bf16'"),
        (lambda: ptif.Influence(Hessian(), precision="bf16"), r"leaves two digits, .*Hessian\(\) takes second deriv"),
    ],
)
def test_what_bfloat16_cannot_do_is_refused(make: Method, message: str) -> None:
    with pytest.raises(InvalidInput, match=message):
        make()


def test_a_method_without_a_precision_says_so() -> None:
    net, x, y = trained()
    with pytest.raises(InvalidInput, match=r"Random takes no precision=; leave it out"):
        ptif.attribute(net, (x, y), (x[:Q], y[:Q]), method=ptif.methods.Random(), precision="bf16")


# --------------------------------------------------------------------------- a damping below float32


@pytest.mark.parametrize("damping", [1e-5, 1e-7, 1e-9])
@pytest.mark.parametrize("curvature", [EmpiricalFisher(), GGN()], ids=repr)
def test_a_damping_below_rounding_is_solved_in_float64(curvature: Any, damping: float) -> None:
    """The dense solution of the same float32 gradients is the oracle."""
    net, x, y = trained()
    problem = ptif.Problem(net, nn.CrossEntropyLoss(), (x, y))
    fitted = ptif.dual(curvature, damping).fit(problem)
    scores = fitted.score((x[:Q], y[:Q]))
    expected = ptif.exact(curvature, damping).fit(problem).score((x[:Q], y[:Q]))
    assert gap(scores.values, expected.values) < 2e-2
    refined = any("in float64" in note for note in scores.diagnostics.notes)
    assert refined if damping < 1e-8 else not refined or damping < 1e-6


def test_a_default_damping_above_rounding_changes_nothing() -> None:
    net, x, y = trained()
    fitted = ptif.dual().fit(ptif.Problem(net, nn.CrossEntropyLoss(), (x, y)))
    operator = fitted.members[0].operator
    assert isinstance(operator, Gram) and operator.precision is torch.float32 and operator.notes == ()

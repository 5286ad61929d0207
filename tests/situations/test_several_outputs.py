"""My model returns several things: two heads, a tuple, a dictionary, an output object, logits at several depths."""

from __future__ import annotations

import re
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributions import Categorical, Independent, MixtureSameFamily, Normal

import pytorch_influence_functions as ptif
from pytorch_influence_functions.core.errors import InvalidInput
from pytorch_influence_functions.curvature import EmpiricalFisher, Hessian
from pytorch_influence_functions.damping import Absolute
from pytorch_influence_functions.objectives.outputs import OutputLayouts
from tests.oracles.autograd import gradients_of, hessian_of, influence
from tests.tolerance import gap, rounding

N, Q = 14, 3
_FIXED = torch.Generator().manual_seed(3)
X = torch.randn(N, 4, generator=_FIXED, dtype=torch.float64)
KIND = torch.arange(N) % 3
SIZE = torch.randn(N, generator=_FIXED, dtype=torch.float64)
TARGETS = {"kind": KIND, "size": SIZE}


@dataclass
class Output:
    """As the output objects of model libraries: fields, some of them empty."""

    logits: Tensor
    hidden: Tensor | None = None
    past: Any = None
    name: str = "two heads"


@dataclass
class OrderedOutput(OrderedDict[str, Any]):
    """A mapping and a dataclass at once, as transformers has them."""

    logits: Any = None
    hidden: Any = None

    def __post_init__(self) -> None:
        for key in ("logits", "hidden"):
            if getattr(self, key) is not None:
                super().__setitem__(key, getattr(self, key))


class Pair(NamedTuple):
    kind: Tensor
    size: Tensor


class Cache:
    """An object that is no output: attention keys of every layer."""

    def __init__(self, keys: Tensor) -> None:
        self.layers = [keys]


class Heads(nn.Module):
    """A trunk with two heads; what it returns is up to `form`."""

    def __init__(self, form: Callable[[Heads, Tensor, Tensor, Tensor], Any]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.trunk, self.kind, self.size = nn.Linear(4, 5), nn.Linear(5, 3), nn.Linear(5, 1)
        self.scale = nn.Parameter(torch.tensor(0.7))
        self.form = form
        self.double()

    def forward(self, x: Tensor) -> Any:
        hidden = self.trunk(x).tanh()
        return self.form(self, hidden, self.kind(hidden), self.size(hidden)[:, 0])


def both(kind: Tensor, size: Tensor, y: Any) -> Tensor:
    """A mean over the batch of both heads' losses, as a training loop has it."""
    return F.cross_entropy(kind, y["kind"]) + 0.3 * F.smooth_l1_loss(size, y["size"], beta=0.1)


def with_scale(out: Any, y: Any) -> Tensor:
    return F.cross_entropy(out["scale"].exp() * out["kind"], y["kind"])


def of_distribution(out: Any, y: Any) -> Tensor:
    near = out["all"].log_prob(torch.zeros(5, dtype=torch.float64)) + Categorical(logits=out["kind"]).log_prob(
        y["kind"]
    )
    return -(near + out["size"].log_prob(y["size"])).mean()


def _wide(h: Tensor) -> Independent:
    return Independent(Normal(h, 1 + h**2), 1)


class Form(NamedTuple):
    returned: Callable[[Heads, Tensor, Tensor, Tensor], Any]
    loss: Callable[[Any, Any], Tensor]


FORMS = {
    "dict": Form(lambda m, h, a, b: {"kind": a, "size": b}, lambda out, y: both(out["kind"], out["size"], y)),
    "tuple": Form(lambda m, h, a, b: (a, b), lambda out, y: both(*out, y)),
    "named tuple": Form(lambda m, h, a, b: Pair(a, b), lambda out, y: both(out.kind, out.size, y)),
    "nested": Form(lambda m, h, a, b: ([a], {"b": (b, None)}), lambda out, y: both(out[0][0], out[1]["b"][0], y)),
    "dataclass": Form(
        lambda m, h, a, b: Output(a, h), lambda out, y: both(out.logits, out.hidden[:, 0] ** 2, y) + 0 * len(out.name)
    ),
    "output object, its logits": Form(
        lambda m, h, a, b: Output(a, h, Cache(h)),
        lambda f, y: F.cross_entropy(f, y["kind"], reduction="none").sqrt().mean(),
    ),
    "ordered output": Form(
        lambda m, h, a, b: OrderedOutput(a, h), lambda out, y: both(out.logits, out["hidden"].sum(1), y)
    ),
    "depths": Form(
        lambda m, h, a, b: [a, 2 * a, a + b[:, None]],
        lambda out, y: sum((w * F.cross_entropy(f, y["kind"]) for w, f in zip((1, 0.5, 0.2), out, strict=True))),
    ),
    "learned scale": Form(lambda m, h, a, b: {"kind": a, "scale": m.scale}, with_scale),
    "learned scale, per example": Form(
        lambda m, h, a, b: {"kind": a, "scale": m.scale},
        lambda out, y: F.cross_entropy(out["scale"].exp() * out["kind"], y["kind"], reduction="none"),
    ),
    "scale of one": Form(lambda m, h, a, b: {"scale": m.scale[None], "kind": a}, with_scale),
    "distribution": Form(
        lambda m, h, a, b: {"kind": a, "size": Normal(b, m.scale.exp()), "all": _wide(h)}, of_distribution
    ),
    "whole numbers": Form(
        lambda m, h, a, b: {"route": a.argmax(1), "fits": b > 0, "kind": a},
        lambda out, y: (
            (F.cross_entropy(out["kind"], y["kind"], reduction="none") * (1 + out["route"])).mean()
            + (out["fits"].to(torch.float64) * out["kind"][:, 0]).mean()
        ),
    ),
    "complex": Form(
        lambda m, h, a, b: {"spectrum": torch.fft.rfft(h), "kind": a},
        lambda out, y: F.cross_entropy(out["kind"], y["kind"]) + out["spectrum"].abs().square().mean(),
    ),
    "per example": Form(
        lambda m, h, a, b: {"kind": a, "size": b},
        lambda out, y: F.cross_entropy(out["kind"], y["kind"], reduction="none") + (out["size"] - y["size"]).abs(),
    ),
}


def data(n: int = N) -> list[tuple[Tensor, Any]]:
    return [(X[i], {"kind": KIND[i], "size": SIZE[i]}) for i in range(n)]


def example_losses(model: Heads, form: Form) -> list[Tensor]:
    """Every example's loss from a forward pass of its own."""
    losses = []
    for i in range(N):
        out, y = model(X[i : i + 1]), {key: value[i : i + 1] for key, value in TARGETS.items()}
        try:
            loss = form.loss(out, y)
        except Exception:
            loss = form.loss(out.logits, y)
        losses.append(loss.sum())
    return losses


def score(model: nn.Module, loss: Any, method: Any, damping: float | None = None, **options: Any) -> Tensor:
    damped = None if damping is None else Absolute(damping)
    return ptif.attribute(model, data(), data(Q), loss=loss, method=method, damping=damped, **options).values


@pytest.mark.parametrize("name", FORMS)
def test_my_own_loss_of_all_outputs_has_the_gradients_of_one_example_autograd(name: str) -> None:
    model = Heads(FORMS[name].returned)
    rows = gradients_of(list(model.parameters()), example_losses(model, FORMS[name]))
    scores = score(model, FORMS[name].loss, "grad_dot", batch_size=5)
    assert gap(scores, rows[:Q] @ rows.T / N) < rounding(torch.float64)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["dict", "dataclass", "depths", "learned scale", "distribution"])
def test_curvature_of_several_outputs_is_that_of_the_whole_loss(name: str) -> None:
    model = Heads(FORMS[name].returned)
    parameters, losses = list(model.parameters()), example_losses(model, FORMS[name])
    rows = gradients_of(parameters, losses)
    fisher = rows.T @ rows / N
    dual = score(model, FORMS[name].loss, ptif.dual(EmpiricalFisher()), 0.1)
    assert gap(dual, influence(fisher, 0.1, rows[:Q], rows)) < rounding(torch.float64, 1e3)
    hessian = hessian_of(parameters, torch.stack(losses).mean())
    for method in (ptif.exact(Hessian()), ptif.Influence(Hessian(), ptif.solvers.CG(rtol=1e-10, max_steps=400))):
        scores = score(model, FORMS[name].loss, method, 3.0)
        assert gap(scores, influence(hessian, 3.0, rows[:Q], rows)) < rounding(torch.float64, 1e4)


@pytest.mark.parametrize("name", ["dict", "learned scale"])
def test_routes_of_gradients_agree(name: str) -> None:
    model = Heads(FORMS[name].returned)
    rows = gradients_of(list(model.parameters()), example_losses(model, FORMS[name]))
    for route in ("vmap", "loop"):
        scores = score(model, FORMS[name].loss, "grad_dot", route=route)
        assert gap(scores, rows[:Q] @ rows.T / N) < rounding(torch.float64), route


@pytest.mark.parametrize(
    "returned",
    [
        lambda m, h, a, b: OrderedDict(out=a, aux=2 * a),
        lambda m, h, a, b: {"hidden": h, "logits": a},
        lambda m, h, a, b: Output(a, h, Cache(h)),
        lambda m, h, a, b: OrderedOutput(a, h),
        lambda m, h, a, b: (a, None),
        lambda m, h, a, b: {"scores": a, "route": a.argmax(1)},
    ],
    ids=["out", "logits", "dataclass", "ordered output", "tuple with None", "only one of real numbers"],
)
def test_a_known_loss_takes_the_logits(returned: Any) -> None:
    model, plain = Heads(returned), Heads(lambda m, h, a, b: a)
    for loss in (nn.CrossEntropyLoss(), nn.MultiMarginLoss(), F.multi_margin_loss, None):
        scores = [
            ptif.attribute(m, (X, KIND), (X[:Q], KIND[:Q]), loss=loss, method="grad_dot").values for m in (model, plain)
        ]
        assert gap(*scores) < rounding(torch.float64)


def of_first(out: Any, y: Tensor) -> Tensor:
    return F.cross_entropy(out[0], y)


HEADS: dict[str, tuple[Any, str, Any]] = {
    "a tuple of": (lambda m, h, a, b: (a, h), r"out\[0\]", of_first),
    "a dict of kind": (
        lambda m, h, a, b: {"kind": a, "size": b},
        r"out\['kind'\]",
        lambda out, y: F.cross_entropy(out["kind"], y),
    ),
    "a Pair of kind": (lambda m, h, a, b: Pair(a, b), r"out\[0\]", of_first),
}


@pytest.mark.parametrize("loss", [nn.CrossEntropyLoss(), nn.MultiMarginLoss(), None])
@pytest.mark.parametrize("name", HEADS)
def test_a_known_loss_of_several_outputs_is_refused_with_both_readings(name: str, loss: Any) -> None:
    returned, first, _ = HEADS[name]
    message = rf"returned {name}.* \({N if loss is None else 3}, 3\).* alone or of each .*loss_fn\({first}, y\) for the"
    with pytest.raises(InvalidInput, match=message):
        ptif.attribute(Heads(returned), (X, KIND), (X[:Q], KIND[:Q]), loss=loss)


@pytest.mark.parametrize("name", HEADS)
def test_what_the_refusal_says_to_write_is_right(name: str) -> None:
    returned, _, loss = HEADS[name]
    model, plain = Heads(returned), Heads(lambda m, h, a, b: a)
    scores = ptif.attribute(model, (X, KIND), (X[:Q], KIND[:Q]), loss=loss, method="dual", damping=0.1).values
    known = ptif.attribute(plain, (X, KIND), (X[:Q], KIND[:Q]), loss=nn.CrossEntropyLoss(), method="dual", damping=0.1)
    assert gap(scores, known.values) < rounding(torch.float64, 1e3)


@pytest.mark.slow
def test_a_measure_may_look_at_all_outputs_or_at_the_logits() -> None:
    model = Heads(FORMS["dataclass"].returned)
    rows = gradients_of(list(model.parameters()), example_losses(model, FORMS["dataclass"]))
    measured = [model(X[i : i + 1]) for i in range(Q)]
    logp = [out.logits[0].log_softmax(0)[y] for out, y in zip(measured, KIND, strict=False)]
    margins = [value - torch.log1p(-value.exp()) for value in logp]
    train = FORMS["dataclass"].loss
    questions: list[tuple[Any, list[Tensor]]] = [
        (lambda out, y: out.hidden.square().sum(), [out.hidden.square().sum() for out in measured]),
        (lambda f, y: f.softmax(1)[:, 0], [out.logits.softmax(1)[0, 0] for out in measured]),
    ]
    for measure, values in questions:
        expected = gradients_of(list(model.parameters()), values) @ rows.T / N
        for route in (None, "vmap", "loop"):
            scores = score(model, train, "grad_dot", measure=measure, route=route)
            assert gap(scores, expected) < rounding(torch.float64)
    labelled = ptif.attribute(model, data(), (X[:Q], KIND[:Q]), loss=train, method="grad_dot", measure=ptif.Margin())
    assert gap(labelled.values, gradients_of(list(model.parameters()), margins) @ rows.T / N) < rounding(torch.float64)


def test_a_scalar_that_depends_on_the_batch_is_refused() -> None:
    """The load balance of a batch, as mixtures of experts add it to their loss."""
    model = Heads(lambda m, h, a, b: {"kind": a, "balance": h.mean(0).square().sum()})
    with pytest.raises(InvalidInput, match="output for one example changes by"):
        score(model, lambda out, y: F.cross_entropy(out["kind"], y["kind"]) + out["balance"], "grad_dot")


def test_two_shapes_with_as_many_numbers_are_refused() -> None:
    layouts = OutputLayouts()
    layouts.flatten({"a": torch.zeros(4, 2, 3)}, 4)
    with pytest.raises(InvalidInput, match=r"6 numbers per example in different shapes .*\(2, 3\) and \(3, 2\)"):
        layouts.flatten({"a": torch.zeros(4, 3, 2)}, 4)


class Coder(nn.Module):
    """An autoencoder that returns its code too."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.code, self.back = nn.Linear(4, 3).double(), nn.Linear(3, 4).double()

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        code = self.code(x).tanh()
        return self.back(code), code


class Mixture(nn.Module):
    """Two normals, whose parameters are held by distributions inside the one that is returned."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.of, self.at = nn.Linear(4, 2).double(), nn.Linear(4, 2).double()

    def forward(self, x: Tensor) -> MixtureSameFamily:
        return MixtureSameFamily(Categorical(logits=self.of(x)), Normal(self.at(x), torch.ones_like(self.at(x))))


OWN: dict[str, tuple[nn.Module, Any, Tensor, str]] = {
    "a mixture": (
        Mixture(),
        lambda out, y: -out.log_prob(y).mean(),
        SIZE,
        r"a MixtureSameFamily of .*\(.*, 2\)",
    ),
    "an autoencoder's code beside its output": (
        Coder(),
        lambda out, y: F.mse_loss(out[0], y) + 0.1 * out[1].abs().mean(),
        X,
        r"a tuple of \(.*, 4\) and \(.*, 3\)",
    ),
}


@pytest.mark.parametrize("name", OWN)
@pytest.mark.parametrize("measure", [ptif.Margin(), ptif.Logit(), ptif.objectives.Output(0)], ids=repr)
def test_a_measure_of_one_tensor_says_what_to_measure_instead(name: str, measure: Any) -> None:
    model, loss, targets, returned = OWN[name]
    train, queries = (X, targets), (X[:Q], targets[:Q])
    says = rf"returned {returned}, and {re.escape(repr(measure))} is of one tensor; measure the loss \(measure=None"
    with pytest.raises(InvalidInput, match=says):
        ptif.attribute(model, train, queries, loss, method="dual", measure=measure)
    with pytest.raises(InvalidInput, match=says):
        ptif.attribute(model, train, queries, loss, method=ptif.trak(4, measure=measure))
    method = ptif.trak(4, measure=None)
    asked = ptif.attribute(model, train, queries, loss, method=method, measure=None).values
    own = ptif.attribute(model, train, queries, loss, method=method, measure=ptif.FromFunction(loss)).values
    assert gap(own, asked) < rounding(torch.float64)


@pytest.mark.parametrize("loss", [None, nn.MSELoss()], ids=["no loss", "a loss of one tensor"])
def test_a_distribution_without_a_loss_of_its_own(loss: Any) -> None:
    says = r"MixtureSameFamily of .* write its negative log-likelihood, loss=lambda out, y: -out.log_prob\(y\)"
    with pytest.raises(InvalidInput, match=says):
        ptif.attribute(Mixture(), (X, SIZE), (X[:Q], SIZE[:Q]), loss)


@pytest.mark.parametrize("targets", [torch.ones(N, 2), KIND], ids=["several labels", "more grades than outputs"])
def test_a_margin_of_what_are_no_classes(targets: Tensor) -> None:
    def loss(out: Tensor, y: Tensor) -> Tensor:
        above = y.double() if y.dim() == 2 else (y[:, None] > torch.arange(2)).double()
        return F.binary_cross_entropy_with_logits(out, above)

    model = nn.Linear(4, 2).double()
    with pytest.raises(InvalidInput, match=r"; .* measure the loss \(measure=None, of TRAK trak\(measure=None\)\)"):
        ptif.attribute(model, (X, targets), (X[:Q], targets[:Q]), loss, method=ptif.trak(4))
    ptif.attribute(model, (X, targets), (X[:Q], targets[:Q]), loss, method=ptif.trak(4, measure=None))

"""My loss has weights of its own that were trained along: ArcFace, a centre loss, weights of several tasks."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import pytorch_influence_functions as ptif
from pytorch_influence_functions.core.errors import InvalidInput, UnknownName
from pytorch_influence_functions.curvature import EmpiricalFisher, Hessian
from pytorch_influence_functions.damping import Absolute
from pytorch_influence_functions.problem.ingredients import describe_model
from pytorch_influence_functions.problem.model_and_loss import ModelAndLoss
from tests.oracles.autograd import gradients_of, hessian_of, influence
from tests.tolerance import gap, rounding

N, Q, C, D = 18, 4, 3, 4
X = torch.randn(N, 5, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
Y = torch.arange(N) % C


class ArcFace(nn.Module):
    """Cosines to a centre of each class, the angle to the true one widened."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(C, D))

    def forward(self, features: Tensor, y: Tensor) -> Tensor:
        cosine = F.normalize(features) @ F.normalize(self.weight).T
        wide = torch.cos(torch.arccos(cosine.clamp(-0.99999, 0.99999)) + 0.2)
        return F.cross_entropy(2 * torch.where(F.one_hot(y, C).bool(), wide, cosine), y)


class CentreLoss(nn.Module):
    """Cross entropy by a layer of its own, and the distance to a centre; one number per example."""

    def __init__(self) -> None:
        super().__init__()
        self.head, self.centres = nn.Linear(D, C), nn.Embedding(C, D)
        self.margin = nn.Parameter(torch.ones(()), requires_grad=False)

    def forward(self, features: Tensor, y: Tensor) -> Tensor:
        near = (features - self.centres(y)).square().sum(1)
        return F.cross_entropy(self.head(features), y, reduction="none") + 0.1 * self.margin * near


class TaskWeights(nn.Module):
    """The noise of every task is learned (Kendall and others 2018); the model has two heads."""

    def __init__(self) -> None:
        super().__init__()
        self.log_variance = nn.Parameter(torch.tensor([0.3, -0.2]))

    def forward(self, out: Any, y: Tensor) -> Tensor:
        losses = torch.stack([F.cross_entropy(out["kind"], y), out["size"].square().mean()])
        return (losses * (-self.log_variance).exp() + self.log_variance).sum()


class TwoHeads(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body, self.kind, self.size = nn.Linear(5, D), nn.Linear(D, C), nn.Linear(D, 1)

    def forward(self, x: Tensor) -> Any:
        h = self.body(x).tanh()
        return {"kind": self.kind(h), "size": self.size(h)[:, 0]}


class OwnParameter(nn.Module):
    """Has a parameter at its root, dropout that asks the root's mode, and a layer called loss."""

    def __init__(self) -> None:
        super().__init__()
        self.scale, self.loss = nn.Parameter(torch.ones(D)), nn.Linear(5, D)

    def forward(self, x: Tensor) -> Tensor:
        return F.dropout(self.loss(x).tanh() * self.scale, training=self.training)


def features() -> nn.Module:
    return nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, D))


class Situation(NamedTuple):
    model: Callable[[], nn.Module]
    loss: Callable[[], nn.Module]


SITUATIONS = {
    "ArcFace": Situation(features, ArcFace),
    "centre loss": Situation(features, CentreLoss),
    "task weights": Situation(TwoHeads, TaskWeights),
    "a layer alone": Situation(lambda: nn.Linear(5, D), ArcFace),
    "a model with a loss": Situation(OwnParameter, ArcFace),
}


def make(name: str) -> tuple[nn.Module, nn.Module]:
    torch.manual_seed(2)
    return SITUATIONS[name].model().double(), SITUATIONS[name].loss().double()


def trainable(*modules: nn.Module) -> list[Tensor]:
    return [p for module in modules for p in module.parameters() if p.requires_grad]


def example_losses(model: nn.Module, loss: nn.Module) -> list[Tensor]:
    model.eval()
    return [loss(model(X[i : i + 1]), Y[i : i + 1]).sum() for i in range(N)]


def score(model: nn.Module, loss: Any, method: Any, damping: float | None = None, **options: Any) -> ptif.Scores:
    damped = None if damping is None else Absolute(damping)
    return ptif.attribute(model, (X, Y), (X[:Q], Y[:Q]), loss=loss, method=method, damping=damped, **options)


@pytest.mark.parametrize("batch_size", [N, 3, 5])
@pytest.mark.parametrize("name", SITUATIONS)
def test_the_weights_of_the_loss_take_part(name: str, batch_size: int) -> None:
    """Also in batches of as many examples as there are classes, and so rows of the loss's weight."""
    model, loss = make(name)
    rows = gradients_of(trainable(model, loss), example_losses(model, loss))
    scores = score(model.train(), loss, "grad_dot", batch_size=batch_size)
    assert gap(scores.values, rows[:Q] @ rows.T / N) < rounding(torch.float64)
    assert scores.diagnostics.parameters_used == scores.diagnostics.parameters_total - sum(
        p.numel() for p in loss.parameters() if not p.requires_grad
    )


@pytest.mark.slow
@pytest.mark.parametrize("name", SITUATIONS)
def test_curvature_is_over_both(name: str) -> None:
    model, loss = make(name)
    parameters, losses = trainable(model, loss), example_losses(model, loss)
    rows = gradients_of(parameters, losses)
    dual = score(model, loss, ptif.dual(EmpiricalFisher()), 0.1).values
    assert gap(dual, influence(rows.T @ rows / N, 0.1, rows[:Q], rows)) < rounding(torch.float64, 1e3)
    hessian = hessian_of(parameters, torch.stack(losses).mean())
    enough = 2 * float(torch.linalg.eigvalsh(hessian).abs().max())
    methods = [ptif.exact(Hessian())]
    if name == "ArcFace":
        methods.append(ptif.Influence(Hessian(), ptif.solvers.CG(rtol=1e-10, max_steps=400)))
    for method in methods:
        scores = score(model, loss, method, enough).values
        assert gap(scores, influence(hessian, enough, rows[:Q], rows)) < rounding(torch.float64, 1e4)


@pytest.mark.parametrize("route", ["vmap", "loop"])
def test_every_route_has_them(route: str) -> None:
    model, loss = make("centre loss")
    rows = gradients_of(trainable(model, loss), example_losses(model, loss))
    assert gap(score(model, loss, "grad_dot", route=route).values, rows[:Q] @ rows.T / N) < rounding(torch.float64)


def test_the_diagnostics_name_them() -> None:
    model, loss = make("ArcFace")
    assert "ArcFace), its weights 'loss.weight' take part" in str(score(model, loss, "grad_dot").diagnostics)
    left_out = score(model, loss, "grad_dot", parameters=model).diagnostics
    assert "its weights 'loss.weight' are left out" in str(left_out)
    assert left_out.parameters_used == left_out.parameters_total - C * D
    other = score(*make("a model with a loss"), "grad_dot").diagnostics
    assert "its weights 'criterion.weight' take part" in str(other)


@pytest.mark.parametrize(
    ("selection", "chosen"),
    [
        (lambda m, loss: m, [0, 1, 2, 3]),
        (lambda m, loss: loss, [4]),
        (lambda m, loss: "loss.*", [4]),
        (lambda m, loss: ["2.*", "loss.weight"], [2, 3, 4]),
        (lambda m, loss: [m[2].bias, loss.weight], [3, 4]),
    ],
)
def test_they_are_selected_as_other_parameters_are(selection: Any, chosen: list[int]) -> None:
    model, loss = make("ArcFace")
    parameters = [trainable(model, loss)[i] for i in chosen]
    rows = gradients_of(parameters, example_losses(model, loss))
    scores = score(model, loss, "grad_dot", parameters=selection(model, loss))
    assert gap(scores.values, rows[:Q] @ rows.T / N) < rounding(torch.float64)


def test_a_name_that_the_loss_does_not_have_is_refused() -> None:
    with pytest.raises(UnknownName, match=r"'loss.wieght' matches no .*'loss.weight'"):
        score(*make("ArcFace"), "grad_dot", parameters="loss.wieght")


def test_weight_decay_of_the_optimiser_of_both() -> None:
    model, loss = make("ArcFace")
    groups = [{"params": list(model.parameters())}, {"params": list(loss.parameters()), "weight_decay": 0.5}]
    problem = ptif.Problem(model, loss, (X, Y), weight_decay=torch.optim.SGD(groups, lr=0.1, weight_decay=0.0))
    assert problem.space.decay == {"0": 0.0, "2": 0.0, "loss.weight": 0.5}


def test_nothing_of_the_users_is_changed() -> None:
    model, loss = make("centre loss")
    model.train(), loss.train()
    before = copy.deepcopy((model.state_dict(), loss.state_dict()))
    names = [name for name, _ in model.named_modules()]
    score(model, loss, ptif.exact(Hessian()), 50.0)
    assert all(m.training for root in (model, loss) for m in root.modules())
    assert not loss.margin.requires_grad and loss.centres.weight.requires_grad and loss.centres.weight.grad is None
    assert [name for name, _ in model.named_modules()] == names
    for was, state in zip(before, (model.state_dict(), loss.state_dict()), strict=True):
        assert was.keys() == state.keys() and all(torch.equal(was[k], state[k]) for k in was)


def test_a_problem_is_joined_once() -> None:
    model, loss = make("ArcFace")
    problem = ptif.Problem(model, loss, (X, Y))
    again = problem.with_(weight_decay=0.1)
    assert isinstance(again.model, ModelAndLoss) and again.model is problem.model
    assert problem.with_(objective=nn.CrossEntropyLoss()).model is model
    twin = copy.deepcopy(problem.model)
    with torch.no_grad():
        twin.get_parameter("loss.weight").add_(1.0)
    assert not torch.equal(twin.get_parameter("loss.weight"), loss.weight)
    assert twin.inner[0].weight is twin.get_parameter("0.weight")


# --------------------------------------------------------------------------- checkpoints and what is stored


def states(model: nn.Module, loss: nn.Module) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Another pair of weights."""
    return tuple({k: v * 1.5 + 0.1 for k, v in m.state_dict().items()} for m in (model, loss))  # type: ignore[return-value]


@pytest.mark.parametrize("form", ["flat", "nested", "criterion", "wrapped", "file"])
def test_a_checkpoint_holds_both(form: str, tmp_path: Path) -> None:
    model, loss = make("ArcFace")
    first, second = states(model, loss)
    checkpoint: Any = {
        "flat": {**first, **{f"loss.{k}": v for k, v in second.items()}},
        "nested": {"model": first, "loss": second, "epoch": 3},
        "criterion": {"state_dict": first, "criterion": second},
        "wrapped": {"model": {f"module.{k}": v for k, v in first.items()}, "loss": second},
        "file": str(tmp_path / "both.pt"),
    }[form]
    torch.save({"model": first, "loss": second}, tmp_path / "both.pt")
    scores = score(model, loss, "grad_dot", checkpoints=checkpoint).values
    model.load_state_dict(first), loss.load_state_dict(second)
    rows = gradients_of(trainable(model, loss), example_losses(model, loss))
    assert gap(scores, rows[:Q] @ rows.T / N) < rounding(torch.float64)


@pytest.mark.parametrize("parameters", [None, "0"])
def test_a_checkpoint_without_the_weights_of_the_loss_is_refused(parameters: Any) -> None:
    model, loss = make("ArcFace")
    message = r"^The checkpoint lacks 'loss.weight': the loss ArcFace has weights of its own.*\"loss\": loss.state_dict"
    with pytest.raises(InvalidInput, match=message):
        score(model, loss, "grad_dot", checkpoints=states(model, loss)[0], parameters=parameters)


def test_a_checkpoint_with_weights_of_a_loss_that_has_none_is_refused() -> None:
    model, loss = make("ArcFace")
    first, second = states(model, loss)
    with pytest.raises(InvalidInput, match=r"holds 'loss.weight', which the model does not have"):
        checkpoint = {**first, **{f"loss.{k}": v for k, v in second.items()}}
        score(model, nn.CrossEntropyLoss(), "grad_dot", checkpoints=checkpoint)


def test_what_is_stored_depends_on_the_weights_of_the_loss() -> None:
    model, loss = make("ArcFace")
    problem = ptif.Problem(model, loss, (X, Y))
    before, again = describe_model(problem), describe_model(problem)
    with torch.no_grad():
        loss.weight[0, 0] += 0.5
    after = describe_model(problem)
    assert before[0] == again[0] and before[0]["weights"] != after[0]["weights"]


# --------------------------------------------------------------------------- measures, and refusals


def test_the_same_loss_as_measure_is_the_training_loss() -> None:
    model, loss = make("ArcFace")
    assert gap(score(model, loss, "grad_dot", measure=loss).values, score(model, loss, "grad_dot").values) == 0


def test_a_measure_of_the_outputs_alone() -> None:
    model, loss = make("ArcFace")
    parameters = trainable(model, loss)
    rows = gradients_of(parameters, example_losses(model, loss))
    measured = gradients_of(parameters, [model(X[i : i + 1]).square().sum() for i in range(Q)])
    scores = score(model, loss, "grad_dot", measure=lambda f, y: f.square().sum(1)).values
    assert gap(scores, measured @ rows.T / N) < rounding(torch.float64)


def hidden(kind: str, model: nn.Module, loss: nn.Module) -> Any:
    sigma = nn.Parameter(torch.ones((), dtype=torch.float64))
    return {
        "module": lambda f, y: loss(f, y),
        "parameter": lambda f, y: F.cross_entropy(f[:, :C], y) / sigma,
        "penalty": lambda f, y: F.cross_entropy(f[:, :C], y) + sum(p.square().sum() for p in model.parameters()),
    }[kind]


@pytest.mark.parametrize("where", ["loss", "measure"])
@pytest.mark.parametrize("kind", ["module", "parameter", "penalty"])
def test_weights_hidden_in_a_function_are_refused(kind: str, where: str) -> None:
    model, loss = make("ArcFace")
    function = hidden(kind, model, loss)
    given = {"loss": function} if where == "loss" else {"loss": lambda f, y: f.square().sum(1), "measure": function}
    with pytest.raises(
        InvalidInput, match=r"depends on trainable weights beside .*requires_grad_\(False\).*weight_dec"
    ):
        score(model, method="grad_dot", **given)


def test_what_the_refusal_says_to_write_is_right() -> None:
    """A module that holds the weights, or weights that are fixed."""

    class Held(nn.Module):
        def __init__(self, inside: nn.Module) -> None:
            super().__init__()
            self.inside = inside

        def forward(self, f: Tensor, y: Tensor) -> Any:
            return self.inside(f, y)

    model, loss = make("ArcFace")
    assert gap(score(model, Held(loss), "grad_dot").values, score(model, loss, "grad_dot").values) == 0
    loss.requires_grad_(False)
    rows = gradients_of(trainable(model), example_losses(model, loss))
    for fixed in (hidden("module", model, loss), loss):
        assert gap(score(model, fixed, "grad_dot").values, rows[:Q] @ rows.T / N) < rounding(torch.float64)


def test_the_built_in_recipe_does_not_train_a_loss() -> None:
    model, loss = make("ArcFace")
    recipe = ptif.evaluation.Recipe(model=features, epochs=1, loss=loss)
    scores = score(model, loss, "grad_dot")
    with pytest.raises(
        InvalidInput, match="ArcFace has weights of its own, and the built-in recipe trains those of the model"
    ):
        scores.verify(recipe)

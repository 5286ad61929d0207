"""My model squeezes, returns a distribution or holds TorchScript; my loss works in place; my data are sparse.

Every score equals float64 autograd, example by example.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributions as D
from torch import Tensor, nn
from torch.nn import functional as F

import pytorch_influence_functions as ptif
from pytorch_influence_functions.damping import Absolute

N, LAMBDA = 11, 0.3


def data(targets: str = "real") -> tuple[Tensor, Tensor]:
    torch.manual_seed(0)
    x = torch.randn(N, 4, dtype=torch.float64)
    real = torch.randn(N, dtype=torch.float64)
    of = {"real": real, "positive": real.abs() + 0.1, "share": real.sigmoid(), "class": torch.arange(N) % 2}
    return x, of[targets] if targets in of else F.one_hot(of["class"], 2).double()


def rows(model: nn.Module, loss: Callable[[Any, Any], Tensor], x: Tensor, y: Tensor) -> Tensor:
    """The gradient of every example's loss, taken alone beside a copy of itself so that no axis is lost."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    grads = [
        torch.autograd.grad(loss(model(torch.stack([a, a])), torch.stack([b, b])), parameters)
        for a, b in zip(x, y, strict=True)
    ]
    return torch.stack([torch.cat([g.flatten() for g in row]) for row in grads])


def check(model: nn.Module, loss: Any, train: Any, plain: tuple[Tensor, Tensor], spelled: Any = None) -> None:
    """Gradient products and the empirical Fisher's influences against the dense ones."""
    x, y = plain
    gradients = rows(model, loss if spelled is None else spelled, x, y)
    queries = gradients[:3]
    scores = ptif.attribute(model, train, (x[:3], y[:3]), loss, method="grad_dot").values
    torch.testing.assert_close(scores.double(), queries @ gradients.T / N, rtol=1e-5, atol=1e-8)
    fisher = gradients.T @ gradients / N + LAMBDA * torch.eye(gradients.shape[1], dtype=torch.float64)
    scores = ptif.attribute(model, train, (x[:3], y[:3]), loss, method=ptif.dual(damping=Absolute(LAMBDA))).values
    expected = queries @ torch.linalg.solve(fisher, gradients.T) / N
    torch.testing.assert_close(scores.double(), expected, rtol=1e-4, atol=1e-7)


# --------------------------------------------------------------------------- an axis that goes


class Squeezed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 1).double()

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x).squeeze()


@pytest.mark.parametrize("loss", [nn.HuberLoss(), nn.PoissonNLLLoss(), lambda o, t: (o - t).square().mean()])
def test_a_model_that_squeezes_with_a_loss_that_is_differentiated(loss: Any) -> None:
    model, (x, y) = Squeezed(), data()
    gradients = rows(model, loss, x, y)
    hessians = []
    for a, b in zip(x, y, strict=True):
        out = model(torch.stack([a, a])).detach().requires_grad_()
        (slope,) = torch.autograd.grad(loss(out, torch.stack([b, b])), out, create_graph=True)
        (curve,) = torch.autograd.grad(slope.sum(), out)
        features = torch.cat([a, a.new_ones(1)])
        hessians.append(curve.sum() * torch.outer(features, features))
    matrix = torch.stack(hessians).mean(0) + LAMBDA * torch.eye(5, dtype=torch.float64)
    expected = gradients[:3] @ torch.linalg.solve(matrix, gradients.T) / N
    scores = ptif.attribute(model, (x, y), (x[:3], y[:3]), loss, method=ptif.exact(damping=Absolute(LAMBDA)))
    torch.testing.assert_close(scores.values.double(), expected, rtol=1e-4, atol=1e-7)
    assert torch.isfinite(ptif.attribute(model, (x, y), (x[:3], y[:3]), loss).values).all()
    with pytest.raises(ptif.errors.InvalidInput, match=r"shape \(\) for 1 example; .*\.squeeze\(-1\) instead"):
        ptif.attribute(model, (x, y), (x[:1], y[:1]), loss)


# --------------------------------------------------------------------------- TorchScript inside


def scripted(module: nn.Module) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.jit.script(module)


@pytest.mark.parametrize("part", ["activation", "layers", "frozen"])
def test_a_part_in_torchscript(part: str) -> None:
    torch.manual_seed(0)
    inside: Any = nn.Sequential(nn.Linear(4, 4), nn.Tanh()).double()
    inside = {"activation": nn.Tanh(), "layers": inside, "frozen": inside.eval()}[part]
    inside = torch.jit.freeze(scripted(inside)) if part == "frozen" else scripted(inside)
    model = nn.Sequential(nn.Linear(4, 4).double(), inside, nn.Linear(4, 2).double())
    check(model, nn.CrossEntropyLoss(), data("class"), data("class"))
    chosen = ptif.attribute(
        model, data("class"), data("class"), nn.CrossEntropyLoss(), method="ekfac", parameters="2.*"
    )
    assert torch.isfinite(chosen.values).all()


# --------------------------------------------------------------------------- sparse data


@pytest.mark.filterwarnings("ignore:Sparse CSR tensor support")
@pytest.mark.parametrize("made", [Tensor.to_sparse, Tensor.to_sparse_csr])
def test_sparse_tensors_are_written_out_by_the_batch(made: Callable[[Tensor], Tensor]) -> None:
    torch.manual_seed(0)
    x, y = data("class")
    x = x * (x > 0)
    model, loss = nn.Linear(4, 2).double(), nn.CrossEntropyLoss()
    for train in ((made(x), y), torch.utils.data.TensorDataset(made(x), y), {"input": made(x), "labels": y}):
        if isinstance(train, dict):
            scores = ptif.attribute(model, train, train, loss, method="grad_dot").values
            gradients = rows(model, loss, x, y)
            torch.testing.assert_close(scores.double(), gradients @ gradients.T / N, rtol=1e-5, atol=1e-8)
        else:
            check(model, loss, train, (x, y))
    scores = ptif.attribute(model, (x, y), (made(x), y), loss, method="grad_dot").values
    torch.testing.assert_close(scores, ptif.attribute(model, (x, y), (x, y), loss, method="grad_dot").values)


# --------------------------------------------------------------------------- losses that write


def clamped(outputs: Tensor, targets: Tensor) -> Tensor:
    outputs.clamp_(-0.2, 0.2)
    targets.sub_(1)
    return F.mse_loss(outputs, targets[:, None].expand_as(outputs))


def clamped_spelled(outputs: Tensor, targets: Tensor) -> Tensor:
    return F.mse_loss(outputs.clamp(-0.2, 0.2), (targets - 1)[:, None].expand_as(outputs))


def second_of_two(outputs: tuple[Tensor, Tensor], targets: Tensor) -> Tensor:
    outputs[1].sub_(targets)
    return (outputs[1].square() + outputs[0].square()).mean()


class Two(Squeezed):
    def forward(self, x: Tensor) -> Any:
        out = self.layer(x)[:, 0]
        return out * 2, out - 1


def test_a_loss_that_works_in_place() -> None:
    torch.manual_seed(0)
    x, y = data()
    check(nn.Linear(4, 2).double(), clamped, (x, y), (x, y), clamped_spelled)
    assert torch.equal(y, data()[1])
    check(Two(), second_of_two, (x, y), (x, y), lambda o, t: ((o[1] - t).square() + o[0].square()).mean())


# --------------------------------------------------------------------------- distributions


class Returns(nn.Module):
    def __init__(self, make: Callable[[Tensor], D.Distribution]) -> None:
        super().__init__()
        self.layer, self.make = nn.Linear(4, 2).double(), make

    def forward(self, x: Tensor) -> Any:
        return self.make(self.layer(x))


def positive(o: Tensor) -> tuple[Tensor, Tensor]:
    return o[:, 0].exp(), o[:, 1].exp()


DISTRIBUTIONS: dict[str, tuple[Callable[[Tensor], D.Distribution], str]] = {
    "LogNormal": (lambda o: D.LogNormal(o[:, 0], o[:, 1].exp()), "positive"),
    "Beta": (lambda o: D.Beta(*positive(o)), "share"),
    "MixtureSameFamily": (
        lambda o: D.MixtureSameFamily(D.Categorical(logits=o), D.Normal(o, torch.ones_like(o))),
        "real",
    ),
    "TransformedDistribution": (
        lambda o: D.TransformedDistribution(
            D.Normal(torch.zeros_like(o[:, 0]), 1.0),
            [D.AffineTransform(o[:, 0], o[:, 1].exp()), D.ComposeTransform([D.ExpTransform()])],
        ),
        "positive",
    ),
    "inverse": (
        lambda o: D.TransformedDistribution(D.Normal(o[:, 0], o[:, 1].exp()), [D.SigmoidTransform().inv]),
        "real",
    ),
    "OneHotCategorical": (lambda o: D.OneHotCategorical(logits=o), "one hot"),
    "Multinomial": (lambda o: D.Multinomial(1, probs=o.softmax(-1)), "one hot"),
    "HalfNormal": (lambda o: D.HalfNormal(o[:, 0].exp()), "positive"),
    "InverseGamma": (lambda o: D.InverseGamma(*positive(o)), "positive"),
    "Chi2": (lambda o: D.Chi2(o[:, 0].exp()), "positive"),
    "RelaxedBernoulli": (lambda o: D.RelaxedBernoulli(torch.tensor(0.5).double(), logits=o[:, 0]), "share"),
    "ContinuousBernoulli": (lambda o: D.ContinuousBernoulli(logits=o[:, 0]), "share"),
    "Independent": (lambda o: D.Independent(D.LogNormal(o, 1.0), 1), "one hot"),
}  # fmt: skip


@pytest.mark.parametrize("name", DISTRIBUTIONS)
def test_outputs_that_are_distributions(name: str) -> None:
    torch.manual_seed(0)
    make, targets = DISTRIBUTIONS[name]
    x, y = data(targets)
    y = y + 0.5 if name == "Independent" else y
    check(Returns(make), lambda d, t: -d.log_prob(t).mean(), (x, y), (x, y))


class Odd(D.Normal):
    def __init__(self, both: Tensor) -> None:
        super().__init__(both[:, 0], both[:, 1].exp())


def test_a_distribution_that_cannot_be_made_again_is_refused() -> None:
    x, y = data()
    with pytest.raises(ptif.errors.InvalidInput, match=r"returned a Odd, .*'both'.*make the distribution of them in"):
        ptif.attribute(Returns(Odd), (x, y), (x, y), lambda d, t: -d.log_prob(t).mean(), method="grad_dot")
    # What it recommends works.
    check(Returns(lambda o: o), lambda o, t: -Odd(o).log_prob(t).mean(), (x, y), (x, y))  # type: ignore[arg-type,return-value]

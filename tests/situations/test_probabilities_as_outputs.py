"""My model ends in a sigmoid, a softmax or a log-softmax, and I name no loss."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call, hessian, jacrev

import pytorch_influence_functions as ptif
from pytorch_influence_functions.core.errors import InvalidInput
from pytorch_influence_functions.problem.data import Source
from pytorch_influence_functions.problem.infer_loss import infer_objective
from tests.tolerance import gap, rounding

N = 40


def classes(dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    x = torch.randn(N, 3, dtype=dtype)
    return x, (x @ torch.tensor([1.0, -1.0, 0.5], dtype=dtype) > 0).long()


def train(model: nn.Module, loss: Callable[[Tensor, Tensor], Tensor], x: Tensor, y: Tensor) -> nn.Module:
    optimiser = torch.optim.Adam(model.parameters(), lr=0.05)
    for _ in range(200):
        optimiser.zero_grad()
        loss(model(x), y).backward()
        optimiser.step()
    return model


def infer(model: nn.Module, x: Tensor, y: Tensor) -> Any:
    return infer_objective(model, Source.of((x, y)))


def sigmoid() -> nn.Module:
    return nn.Sequential(nn.Linear(3, 1), nn.Sigmoid())


def softmax(classes: int = 2) -> nn.Module:
    return nn.Sequential(nn.Linear(3, classes), nn.Softmax(1))


Case = tuple[nn.Module, Tensor, Tensor]
X, Y = torch.linspace(-3, 3, 3 * N).reshape(N, 3).sin(), torch.arange(N) % 2

AMBIGUOUS: dict[str, tuple[Callable[[], Case], str, list[Any]]] = {
    "sigmoid": (
        lambda: (sigmoid(), X, Y),
        r"in \[0, 1\].*nn\.BCELoss\(\) if they are prob.*nn\.MSELoss\(\) for a regr.*BCEWithLogitsLoss\(\)",
        [nn.BCELoss(), nn.MSELoss(), nn.BCEWithLogitsLoss()],
    ),
    "softmax": (
        lambda: (softmax(), X, Y),
        r"are probabilities.*CrossEntropy\(from_probabilities=True\).*torch\.nn\.CrossEntropyLoss\(\)",
        [ptif.CrossEntropy(from_probabilities=True), nn.CrossEntropyLoss()],
    ),
    "sigmoid per class": (
        lambda: (nn.Sequential(nn.Linear(3, 4), nn.Sigmoid()), X, Y),
        r"do not sum to 1.*CrossEntropyLoss\(\).*binary_cross_entropy",
        [nn.CrossEntropyLoss(), lambda p, y: nn.functional.binary_cross_entropy(p, torch.eye(p.shape[1])[y].to(p))],
    ),
    "regression on 0 and 1": (
        lambda: (train(nn.Linear(3, 1), lambda f, y: (f[:, 0] - y).square().mean(), X, (X[:, 0] > 0).long()), X, Y),
        r"near the targets 0 and 1.*BCEWithLogitsLoss\(\).*MSELoss\(\)",
        [nn.BCEWithLogitsLoss(), nn.MSELoss()],
    ),
    "counts": (
        lambda: (nn.Linear(3, 1), X, torch.arange(N) % 5),
        r"whole numbers from 0 to [34].*MSELoss\(\).*poisson_nll_loss",
        [nn.MSELoss(), lambda f, y: nn.functional.poisson_nll_loss(f.flatten(), y.flatten())],
    ),
    "autoencoder": (
        lambda: (nn.Sequential(nn.Linear(3, 3), nn.Sigmoid()), X, X.abs()),
        r"and the targets all lie in \[0, 1\].*BCELoss\(\).*MSELoss\(\)",
        [nn.BCELoss(), nn.MSELoss()],
    ),
    "soft labels": (
        lambda: (nn.Linear(3, 3), X, X.softmax(1)),
        r"targets of each example sum to 1.*torch\.nn\.CrossEntropyLoss\(\).*MSELoss\(\)",
        [nn.CrossEntropyLoss(), nn.MSELoss()],
    ),
    "soft labels and probabilities": (
        lambda: (softmax(3), X, X.softmax(1)),
        r"targets of each example sum to 1.*from_probabilities=True.*MSELoss\(\)",
        [ptif.CrossEntropy(from_probabilities=True), nn.MSELoss()],
    ),
}


@pytest.mark.parametrize("name", AMBIGUOUS)
def test_two_readings_are_refused_and_each_can_be_written(name: str) -> None:
    make, message, losses = AMBIGUOUS[name]
    model, x, y = make()
    with pytest.raises(InvalidInput, match=message):
        ptif.attribute(model, (x, y), (x[:2], y[:2]))
    for loss in losses:
        assert ptif.attribute(model, (x, y), (x[:2], y[:2]), loss=loss, method="grad_dot").values.any()


def test_yes_and_no_as_floats_names_the_loss_of_the_outputs() -> None:
    y = Y.float()
    with pytest.raises(InvalidInput, match=r"write loss=torch.nn.BCELoss\(\) for a yes or no per output, or"):
        infer(sigmoid(), X, y)
    with pytest.raises(InvalidInput, match=r"write loss=torch.nn.BCEWithLogitsLoss\(\) for a yes or no per output"):
        infer(nn.Linear(3, 1), 9 * X, y)


def test_as_many_tokens_as_classes_is_refused() -> None:
    model = nn.Linear(4, 4)
    x, y = torch.randn(8, 4, 4), torch.randint(0, 4, (8, 4))
    with pytest.raises(InvalidInput, match=r"4 positions and 4 classes.*TokenCrossEntropy\(\).*CrossEntropyLoss\(\)"):
        infer(model, x, y)
    for loss in (ptif.TokenCrossEntropy(), nn.CrossEntropyLoss()):
        assert ptif.attribute(model, (x, y), (x[:2], y[:2]), loss=loss, method="grad_dot").values.any()


def test_probabilities_of_tokens_are_refused() -> None:
    model = nn.Sequential(nn.Linear(3, 5), nn.Softmax(-1))
    x, y = torch.randn(8, 4, 3), torch.randint(0, 5, (8, 4))
    with pytest.raises(InvalidInput, match=r"probabilities of tokens.*nll_loss\(p\.log.*TokenCrossEntropy\(\)"):
        infer(model, x, y)
    own = ptif.attribute(
        model,
        (x, y),
        (x[:2], y[:2]),
        loss=lambda p, y: torch.nn.functional.nll_loss(p.log().flatten(0, 1), y.flatten()),
        method="grad_dot",
    )
    logits = ptif.attribute(model[0], (x, y), (x[:2], y[:2]), method="grad_dot")
    assert gap(own.values, logits.values) < rounding(torch.float32)


def test_what_is_clear_is_inferred() -> None:
    x, y = classes()
    assert infer(nn.Linear(3, 2), x, y) == ptif.CrossEntropy()
    log_softmax = nn.Sequential(nn.Linear(3, 2), nn.LogSoftmax(1))
    assert infer(log_softmax, x, y) == ptif.CrossEntropy(from_log_probabilities=True)
    logit = train(
        nn.Linear(3, 1), lambda f, y: nn.functional.binary_cross_entropy_with_logits(f[:, 0], y.float()), x, y
    )
    assert infer(logit, x, y) == ptif.Bernoulli()
    assert infer(nn.Linear(3, 1), x, x[:, 0]) == ptif.SquaredError()
    assert infer(nn.Linear(3, 5), torch.randn(8, 4, 3), torch.randint(0, 5, (8, 4))) == ptif.TokenCrossEntropy()


def test_values_are_judged_on_more_than_the_loader_s_batch() -> None:
    """Two outputs in [0, 1] say little: a batch of two logits may lie there by chance."""
    x = torch.linspace(0, 8, N)[:, None]
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x, Y), batch_size=2)
    assert infer_objective(nn.Identity(), Source.of(loader)) == ptif.Bernoulli()


# --------------------------------------------------------------------------- the values


def flat(model: nn.Module) -> Tensor:
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def call(model: nn.Module, theta: Tensor, x: Tensor) -> Tensor:
    weight, bias = theta[: model[0].weight.numel()], theta[model[0].weight.numel() :]  # type: ignore[index]
    return functional_call(model, {"0.weight": weight.reshape(model[0].weight.shape), "0.bias": bias}, (x,))  # type: ignore[index]


@pytest.mark.parametrize("kind", ["softmax", "sigmoid"])
def test_scores_of_a_model_of_probabilities_are_those_of_dense_float64(kind: str) -> None:
    """Oracle: loss, Hessian by autograd in the parameters; Gauss-Newton J' E_y[H] J in the probabilities given."""
    x, y = classes(torch.float64)
    if kind == "softmax":
        model: nn.Module = softmax(3).double()
        objective: Any = ptif.CrossEntropy(from_probabilities=True)

        def loss(p: Tensor, y: Tensor) -> Tensor:
            return -p.gather(1, y[:, None])[:, 0].log()

        def expected(p: Tensor) -> Tensor:
            return torch.diag_embed(1 / p)  # E_y of e_y e_y' / p_y^2
    else:
        model = sigmoid().double()
        objective = ptif.Bernoulli(from_probabilities=True)

        def loss(p: Tensor, y: Tensor) -> Tensor:
            return -torch.where(y == 1, p[:, 0], 1 - p[:, 0]).log()  # torch's own adds 1e-12 when differentiated

        def expected(p: Tensor) -> Tensor:
            return torch.diag_embed(1 / (p * (1 - p)))

    theta, damping = flat(model), 0.1
    rows = jacrev(lambda t: loss(call(model, t, x), y))(theta)
    whole = hessian(lambda t: loss(call(model, t, x), y).mean())(theta)
    jacobian = jacrev(lambda t: call(model, t, x))(theta)
    gauss_newton = torch.einsum("nap,nab,nbq->pq", jacobian, expected(model(x).detach()), jacobian) / N
    for curvature, matrix in ((ptif.curvature.Hessian(), whole), (ptif.curvature.GGN(), gauss_newton)):
        method = ptif.Influence(curvature, ptif.solvers.Cholesky(), ptif.damping.Absolute(damping))
        ours = ptif.attribute(model, (x, y), (x[:3], y[:3]), loss=objective, method=method).values
        shifted = matrix + damping * torch.eye(len(theta), dtype=torch.float64)
        oracle = rows[:3] @ torch.linalg.solve(shifted, rows.T) / N
        assert gap(ours, oracle) < rounding(torch.float64, condition=float(torch.linalg.cond(shifted)))


def test_probabilities_of_zero_stay_finite() -> None:
    p = torch.tensor([[0.0, 1.0], [1.0, 0.0]], requires_grad=True)
    batch, objective = (p, torch.tensor([1, 1])), ptif.CrossEntropy(from_probabilities=True)
    losses = objective.losses(objective.outputs(lambda x: x, batch), batch)
    assert torch.isfinite(losses).all() and losses[0] == 0 and losses[1] > 80
    assert torch.isfinite(torch.autograd.grad(losses.sum(), p)[0]).all()


@pytest.mark.parametrize("outputs", [torch.ones(2, 3), torch.tensor([[0.5, 0.6, -0.1]] * 2)])
def test_what_are_no_probabilities_are_refused(outputs: Tensor) -> None:
    batch, objective = (outputs, torch.tensor([0, 1])), ptif.CrossEntropy(from_probabilities=True)
    with pytest.raises(InvalidInput, match=r"dataset indices 5, 6 are not probabilities that sum to 1.*softmax"):
        objective.check(objective.outputs(lambda x: x, batch), batch, torch.tensor([5, 6]))


def test_outputs_cannot_be_two_things() -> None:
    with pytest.raises(InvalidInput, match="one or the other, so leave one out"):
        ptif.CrossEntropy(from_log_probabilities=True, from_probabilities=True)


def test_a_margin_of_probabilities_is_refused_and_the_log_odds_are_right() -> None:
    """The margin of probabilities read as logits would be another number; the log-odds are those of the logits."""
    x, y = classes()
    model, margin = softmax(3), ptif.Margin()
    objective = ptif.CrossEntropy(from_probabilities=True)
    with pytest.raises(InvalidInput, match=r"Margin\(\) reads logits.*FromFunction\(lambda p, y: p\.gather"):
        ptif.attribute(model, (x, y), (x[:3], y[:3]), loss=objective, measure=margin, method="grad_dot")
    odds = ptif.FromFunction(lambda p, y: p.gather(1, y[:, None])[:, 0].logit(), lower_is_better=False)
    ours = ptif.attribute(model, (x, y), (x[:3], y[:3]), loss=objective, measure=odds, method="grad_dot")
    theirs = ptif.attribute(model[0], (x, y), (x[:3], y[:3]), measure=margin, method="grad_dot")  # type: ignore[index]
    assert gap(ours.values, theirs.values) < rounding(torch.float32, condition=10)
    binary, yes = ptif.Bernoulli(from_probabilities=True), sigmoid()
    with pytest.raises(InvalidInput, match=r"\(2 \* y - 1\) \* p\.flatten\(\)\.logit\(\)"):
        ptif.attribute(yes, (x, y), (x[:3], y[:3]), loss=binary, measure=margin, method="grad_dot")
    odds = ptif.FromFunction(lambda p, y: (2 * y - 1) * p.flatten().logit(), lower_is_better=False)
    ours = ptif.attribute(yes, (x, y), (x[:3], y[:3]), loss=binary, measure=odds, method="grad_dot")
    logit: Any = yes[0]  # type: ignore[index]
    options: dict[str, Any] = {"loss": ptif.Bernoulli(), "measure": margin, "method": "grad_dot"}
    theirs = ptif.attribute(logit, (x, y), (x[:3], y[:3]), **options)
    assert gap(ours.values, theirs.values) < rounding(torch.float32, condition=10)

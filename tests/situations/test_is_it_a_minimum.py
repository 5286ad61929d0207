"""Situation: "is my model trained far enough?" Trained networks pass the check, networks stopped early do not."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeAlias

import numpy as np
import pytest
import sklearn.datasets
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import pytorch_influence_functions as ptif
from pytorch_influence_functions.gradients.per_example import Derivatives
from pytorch_influence_functions.influence.assumptions import StationarityCheck
from pytorch_influence_functions.scores.diagnostics import Diagnostics

Data: TypeAlias = tuple[Tensor, Tensor]
Optimizer: TypeAlias = Callable[[list[nn.Parameter]], torch.optim.Optimizer]


def standardised(values: Any) -> Tensor:
    x = torch.as_tensor(np.asarray(values), dtype=torch.float32)
    return (x - x.mean(0)) / (x.std(0) + 1e-6)


def digits() -> Data:
    data = sklearn.datasets.load_digits()
    return torch.as_tensor(data.data[:900], dtype=torch.float32) / 16, torch.as_tensor(data.target[:900])


def digits_with_wrong_labels() -> Data:
    x, y = digits()
    generator = torch.Generator().manual_seed(3)
    wrong = torch.rand(len(y), generator=generator) < 0.1
    return x, torch.where(wrong, torch.randint(0, 10, y.shape, generator=generator), y)


def patients() -> Data:
    data = sklearn.datasets.load_breast_cancer()
    return standardised(data.data), torch.as_tensor(data.target)


def progression() -> Data:
    data = sklearn.datasets.load_diabetes()
    return standardised(data.data), standardised(data.target[:, None])


def perceptron(inputs: int, outputs: int, width: int = 32, smooth: bool = False) -> nn.Module:
    return nn.Sequential(nn.Linear(inputs, width), nn.Tanh() if smooth else nn.ReLU(), nn.Linear(width, outputs))


def frozen() -> nn.Module:
    model = nn.Sequential(nn.Linear(64, 48), nn.ReLU(), nn.Linear(48, 10))
    model[0].requires_grad_(False)
    return model


def normalised() -> nn.Module:
    return nn.Sequential(nn.Linear(64, 32), nn.BatchNorm1d(32), nn.ReLU(), nn.Linear(32, 10))


def convolutions() -> nn.Module:
    return nn.Sequential(
        nn.Unflatten(1, (1, 8, 8)), nn.Conv2d(1, 8, 3, stride=2, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(128, 10)
    )


def sgd(lr: float, decay: float = 0.0, momentum: float = 0.9) -> Optimizer:
    return lambda parameters: torch.optim.SGD(parameters, lr=lr, momentum=momentum, weight_decay=decay)


@dataclass(frozen=True)
class Case:
    name: str
    data: Callable[[], Data]
    model: Callable[[], nn.Module]
    optimizer: Optimizer
    epochs: int
    decay: float = 0.0
    falling: bool = True
    """Whether the learning rate falls to 0."""
    loss: nn.Module = nn.CrossEntropyLoss()
    early: float = 1.0
    """Epochs after which the other run is stopped."""
    batch: int = 32


CASES = [
    Case("interpolating", digits, lambda: perceptron(64, 10), sgd(0.1), 60, falling=False),
    Case("interpolating wrong labels", digits_with_wrong_labels, lambda: perceptron(64, 10, 128),
         lambda p: torch.optim.Adam(p, lr=5e-3), 60),
    Case("weight decay", digits, lambda: perceptron(64, 10), sgd(0.1, 5e-3), 30, 5e-3),
    Case("decay and wrong labels", digits_with_wrong_labels, lambda: perceptron(64, 10), sgd(0.1, 1e-2), 30, 1e-2),
    Case("stopped early at a plateau", digits, lambda: perceptron(64, 10, smooth=True), sgd(0.05), 12),
    Case("frozen backbone", digits, frozen, sgd(0.1, 1e-3), 30, 1e-3),
    Case("AdamW", digits, convolutions, lambda p: torch.optim.AdamW(p, lr=5e-3), 30),
    Case("batch norm", digits, normalised, sgd(0.05, 1e-3), 60, 1e-3, batch=128),
    Case("logistic regression", patients, lambda: nn.Linear(30, 2), sgd(0.05, 1e-2), 40, 1e-2),
    Case("regression", progression, lambda: perceptron(10, 1, 16, smooth=True), sgd(0.02, 1e-2), 40, 1e-2,
         loss=nn.MSELoss()),
]  # fmt: skip


def trained(case: Case, epochs: float) -> ptif.Problem:
    """The network trained for so many epochs by its recipe, and its problem."""
    torch.manual_seed(0)
    (x, y), model = case.data(), case.model()
    optimizer = case.optimizer([p for p in model.parameters() if p.requires_grad])
    steps = round(case.epochs * len(x) / case.batch)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    model.train()
    for step in range(round(epochs * len(x) / case.batch)):
        some = torch.randint(0, len(x), (case.batch,)) if step else torch.arange(case.batch)
        optimizer.zero_grad()
        case.loss(model(x[some]), y[some]).backward()
        optimizer.step()
        if case.falling:
            schedule.step()
    return ptif.Problem(model.eval(), case.loss, (x, y), weight_decay=case.decay)


def verdict(problem: ptif.Problem) -> tuple[str, str]:
    """The check's status and text."""
    look = StationarityCheck.of(Derivatives.of(problem))
    diagnostics = Diagnostics(
        relative_gradient=look.relative_gradient, relative_gradient_error=look.error,
        gradient_examples=look.looked_at, n_train=len(problem),
    )  # fmt: skip
    check = diagnostics.checks()[0]
    assert check.name == "minimum"
    return check.status, check.text


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_a_trained_network_is_at_a_minimum_and_one_stopped_early_is_not(case: Case) -> None:
    status, text = verdict(trained(case, case.epochs))
    assert status == "ok", text
    status, text = verdict(trained(case, case.early))
    assert status != "ok", text


def test_a_forgotten_weight_decay_is_named_and_giving_it_is_enough() -> None:
    torch.manual_seed(0)
    x = torch.randn(200, 4)
    y = (x[:, 0] + x[:, 1] + 0.5 * torch.randn(200) > 0).long()
    model = nn.Linear(4, 2)
    optimiser = torch.optim.SGD(model.parameters(), lr=1.0, weight_decay=0.05)
    for _ in range(1000):
        optimiser.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        optimiser.step()
    forgotten, given = (
        ptif.attribute(model, (x, y), (x[:2], y[:2]), weight_decay=decay).diagnostics for decay in (0.0, optimiser)
    )
    assert forgotten is not None and given is not None
    advice = {check.name: check for check in forgotten.checks()}["minimum"]
    assert advice.status != "ok" and "pass the weight_decay= that it was trained with" in advice.text
    assert {check.name: check.status for check in given.checks()}["minimum"] == "ok"


# --------------------------------------------------------------------------- a multiple of the loss was trained


def minimised(model: nn.Module, objective: Callable[[nn.Module], Tensor]) -> nn.Module:
    settings: Any = {"max_iter": 400, "tolerance_grad": 1e-11, "tolerance_change": 1e-14}
    optimiser = torch.optim.LBFGS(model.parameters(), line_search_fn="strong_wolfe", **settings)

    def step() -> Tensor:
        optimiser.zero_grad()
        value = objective(model)
        value.backward()
        return value

    optimiser.step(step)
    return model


def numbers(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def linear(outputs: int) -> Data:
    x = numbers(60, 4)
    return x, x @ numbers(4, outputs) + numbers(60, outputs + 4)[:, :outputs] / 2


def masks() -> Data:
    """Of 16 positions of an image 10 are ignored."""
    images = numbers(60, 1, 4, 4)
    labels = (images[:, 0] > -0.5).long() + (images[:, 0] > 0.5)
    labels[:, :2], labels[:, 2, :2] = 255, 255
    return images, labels


def halved(f: Tensor, y: Tensor) -> Tensor:
    return (f - y).square().flatten(1).sum(1) / 2


def over_all_positions(f: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(f, y, ignore_index=255, reduction="none").mean((1, 2))


@dataclass(frozen=True)
class Multiple:
    """A model trained with torch's own loss, what is passed for it, and how that measures an example."""

    name: str
    model: Callable[[], nn.Module]
    data: Data
    decay: float
    trained: Callable[[Tensor, Tensor], Tensor]
    given: Any
    own: Callable[[Tensor, Tensor], Tensor]
    factor: float

    def train(self, left_out: int | None = None, start: nn.Module | None = None) -> nn.Module:
        """The minimum of the mean over what is left plus decay; a left-out example leaves the others' weights."""
        x, y = self.data
        kept = [i for i in range(len(x)) if i != left_out]
        model = self.model().double() if start is None else copy.deepcopy(start)
        share = 1.0 if "sum" in self.name else len(kept) / len(x)

        def objective(model: nn.Module) -> Tensor:
            loss = share * self.trained(model(x[kept]), y[kept])
            return loss + self.decay / 2 * sum(p.square().sum() for p in model.parameters())

        return minimised(model, objective)


MULTIPLES = [
    Multiple(
        "no loss given, one output",
        lambda: nn.Linear(4, 1),
        linear(1),
        1.0,
        F.mse_loss,
        None,
        halved,
        2.0,
    ),
    Multiple(
        "no loss given, three outputs",
        lambda: nn.Linear(4, 3),
        linear(3),
        2.0,
        F.mse_loss,
        None,
        halved,
        2 / 3,
    ),
    Multiple(
        "ignored positions",
        lambda: nn.Conv2d(1, 3, 3, padding=1),
        masks(),
        0.1,
        partial(F.cross_entropy, ignore_index=255),
        nn.CrossEntropyLoss(ignore_index=255),
        over_all_positions,
        16 / 6,
    ),
    Multiple(
        "a sum",
        lambda: nn.Linear(4, 3),
        (numbers(60, 4), linear(3)[1].argmax(1)),
        5.0,
        partial(F.cross_entropy, reduction="sum"),
        nn.CrossEntropyLoss(reduction="sum"),
        partial(F.cross_entropy, reduction="none"),
        60.0,
    ),
]


def slope_of_retraining(case: Multiple, model: nn.Module, scores: ptif.Scores, own: Any) -> float:
    """By how much queries change when one of five examples is left out, over what was predicted."""
    x, y = (part[:4] for part in case.data)
    left_out = [0, 7, 21, 33, 50]
    with torch.no_grad():
        before = own(model(x), y)
    retrained = [case.train(i, model) for i in left_out]
    with torch.no_grad():
        changes = torch.stack([own(other(x), y) - before for other in retrained], 1)
    predicted = scores.values[:, left_out]
    return float((changes * predicted).sum() / predicted.square().sum())


@pytest.mark.parametrize("case", MULTIPLES, ids=lambda case: case.name)
def test_a_multiple_of_the_trained_loss_is_told_and_the_advice_is_the_minimum(case: Multiple) -> None:
    """Beside a weight decay a factor of the loss matters: followed, the advice predicts retraining."""
    torch.manual_seed(0)
    model, (x, y) = case.train(), case.data
    method = ptif.Influence(ptif.curvature.Hessian(), damping=ptif.damping.Absolute(0.0))

    def ask(loss: Any, decay: float) -> tuple[ptif.Scores, Any]:
        scores = ptif.attribute(model, (x, y), (x[:4], y[:4]), loss=loss, weight_decay=decay, method=method)
        return scores, scores.diagnostics.checks()[0]

    scores, check = ask(case.given, case.decay)
    assert scores.diagnostics.loss_factor == pytest.approx(case.factor, rel=1e-5)
    assert check.status in ("warn", "bad") and f"minimum of {case.factor:.4g} times this loss" in check.text
    as_given = abs(slope_of_retraining(case, model, scores, case.own) - 1)
    advised = re.search(r"weight_decay=([0-9.e-]+)", check.text)
    assert advised and float(advised[1]) == pytest.approx(case.decay / case.factor, rel=1e-3)
    cures = [(case.given, float(advised[1]), case.own)]
    assert ("pass loss=torch.nn.MSELoss()" in check.text) == (case.given is None)
    if case.given is None:
        cures.append((nn.MSELoss(), case.decay, lambda f, t: (f - t).square().flatten(1).mean(1)))
    for loss, decay, own in cures:
        scores, check = ask(loss, decay)
        assert check.status == "ok" and "times this loss" not in check.text
        assert abs(slope_of_retraining(case, model, scores, own) - 1) < min(0.2, as_given / 2)


def test_no_factor_is_told_where_none_makes_it_a_minimum() -> None:
    """Untrained, trained without the decay, trained with another one for some parameters."""
    torch.manual_seed(0)
    x, y = numbers(60, 4), torch.arange(60) % 3
    untrained = nn.Linear(4, 3).double()
    without = minimised(nn.Linear(4, 3).double(), lambda model: F.cross_entropy(model(x), y))
    biased = numbers(60, 4) + 1
    partly = minimised(
        nn.Linear(4, 3).double(),
        lambda model: F.cross_entropy(model(biased), y) + 0.5 * next(model.parameters()).square().sum(),
    )
    for model, inputs in ((untrained, x), (without, x), (partly, biased)):
        problem = ptif.Problem(model, nn.CrossEntropyLoss(), (inputs, y), weight_decay=0.3)
        look = StationarityCheck.of(Derivatives.of(problem))
        assert look.relative_gradient > 0.006 and look.loss_factor == 1.0


def test_the_factor_is_told_from_a_sample_too() -> None:
    torch.manual_seed(0)
    x = numbers(4000, 4)
    y = x.sum(1, keepdim=True) + numbers(4000, 5)[:, :1]
    model = minimised(
        nn.Linear(4, 1).double(),
        lambda model: F.mse_loss(model(x), y) + 0.5 * sum(p.square().sum() for p in model.parameters()),
    )
    derivatives = Derivatives.of(ptif.Problem(model, ptif.SquaredError(), (x, y), weight_decay=1.0))
    look = StationarityCheck.of(derivatives)
    assert look.error > 0 and look.looked_at == 2048
    assert look.loss_factor == pytest.approx(2, rel=0.15)

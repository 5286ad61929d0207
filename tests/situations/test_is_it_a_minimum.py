"""Situation: "is my model trained far enough?" Trained networks pass the check, networks stopped early do not."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import pytest
import sklearn.datasets
import torch
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

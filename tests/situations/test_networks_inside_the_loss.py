"""The loss asks another network: a teacher, or features of a perceptual loss, left in training mode by its owner."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import pytorch_influence_functions as ptif
from pytorch_influence_functions.core.errors import InvalidInput
from tests.oracles.autograd import example_gradients
from tests.tolerance import gap, rounding

X = torch.randn(20, 4, generator=torch.Generator().manual_seed(0)).double()
TRAIN, QUERIES = (X[:16], X[:16]), (X[16:], X[16:])


def make_teacher() -> nn.Module:
    torch.manual_seed(1)
    network = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.Dropout(0.5), nn.Linear(6, 3)).double()
    network(X)  # running statistics
    return network.requires_grad_(False).train()


class Perceptual(nn.Module):
    """A distance of features."""

    def __init__(self) -> None:
        super().__init__()
        self.features = make_teacher()

    def forward(self, outputs: Tensor, targets: Tensor) -> Tensor:
        return F.mse_loss(self.features(F.pad(outputs, (0, 1))), self.features(targets))


def distil(outputs: Tensor, inputs: Tensor, teacher: nn.Module) -> Tensor:
    return F.kl_div(outputs.log_softmax(1), teacher(inputs).softmax(1), reduction="batchmean")


class Distiller:
    """A trainer with its loss as a method."""

    def __init__(self, teacher: nn.Module) -> None:
        self.models = {"teacher": teacher}

    def loss(self, outputs: Tensor, inputs: Tensor) -> Tensor:
        return distil(outputs, inputs, self.models["teacher"])


def closure(teacher: nn.Module) -> Callable[[Tensor, Tensor], Tensor]:
    return lambda outputs, inputs: distil(outputs, inputs, teacher)


GLOBAL_TEACHER = make_teacher()
LOSSES: dict[str, Callable[[], tuple[Any, nn.Module]]] = {
    "a module": lambda: (loss := Perceptual(), loss.features),
    "a closure": lambda: (closure(teacher := make_teacher()), teacher),
    "a partial": lambda: (functools.partial(distil, teacher=(teacher := make_teacher())), teacher),
    "a method": lambda: (Distiller(teacher := make_teacher()).loss, teacher),
    "a global": lambda: (lambda outputs, inputs: distil(outputs, inputs, GLOBAL_TEACHER), GLOBAL_TEACHER),
}


@pytest.mark.parametrize("name", LOSSES)
def test_it_is_asked_in_eval_mode_and_left_as_it_was(name: str) -> None:
    loss, teacher = LOSSES[name]()
    before, modes = copy.deepcopy(teacher.state_dict()), [m.training for m in teacher.modules()]
    torch.manual_seed(0)
    model = nn.Linear(4, 3).double()
    scores = ptif.attribute(model, TRAIN, QUERIES, loss=loss, method="grad_dot")
    assert all(torch.equal(value, before[key]) for key, value in teacher.state_dict().items())
    assert [m.training for m in teacher.modules()] == modes
    teacher.eval()
    rows = [example_gradients(model, loss, *data) for data in (QUERIES, TRAIN)]
    teacher.train()
    assert gap(scores.values, rows[0] @ rows[1].T / 16) < rounding(torch.float64, 100)


def test_a_loss_that_draws_random_numbers_says_so() -> None:
    model = nn.Linear(4, 4).double()
    with pytest.raises(
        InvalidInput, match=r"The loss <lambda> gave .* for the same outputs and targets: it draws random"
    ):
        ptif.attribute(model, TRAIN, QUERIES, loss=lambda f, y: F.mse_loss(f, y + 0.1 * torch.randn_like(y)))
    noise = 0.1 * torch.randn_like(X)  # as the message says: part of the target

    def denoise(outputs: Tensor, targets: Any) -> Tensor:
        clean, drawn = targets
        return F.mse_loss(outputs, clean + drawn)

    examples = [(x, (x, e)) for x, e in zip(X, noise, strict=True)]
    scores = ptif.attribute(model, examples[:16], examples[16:], loss=denoise, method="grad_dot")
    rows = [example_gradients(model, F.mse_loss, X[part], (X + noise)[part]) for part in (slice(16, 20), slice(0, 16))]
    assert gap(scores.values, rows[0] @ rows[1].T / 16) < rounding(torch.float64, 100)

"""Law: a warning points at the line that called, not into the package."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch import nn

import pytorch_influence_functions as ptif
from pytorch_influence_functions.core.errors import IncompleteSolveWarning, TrainingDataWarning
from pytorch_influence_functions.core.renames import OldNames
from pytorch_influence_functions.core.warn import warn_caller


class Noisy(torch.utils.data.Dataset[tuple[torch.Tensor, int]]):
    def __len__(self) -> int:
        return 20

    def __getitem__(self, i: int) -> tuple[torch.Tensor, int]:
        return torch.randn(3), i % 2


def few_steps() -> None:
    torch.manual_seed(0)
    x, y = torch.randn(40, 6).double(), torch.randint(0, 3, (40,))
    method = ptif.Influence(ptif.curvature.GGN(), ptif.solvers.CG(rtol=1e-12, max_steps=1))
    ptif.attribute(nn.Linear(6, 3).double(), (x, y), (x[:1], y[:1]), method=method)


def random_data() -> None:
    ptif.attribute(nn.Linear(3, 2), Noisy(), (torch.randn(2, 3), torch.tensor([0, 1])), loss=nn.CrossEntropyLoss())


def drawn_with_replacement() -> None:
    data = torch.utils.data.TensorDataset(torch.randn(20, 3), torch.arange(20) % 2)
    sampler = torch.utils.data.RandomSampler(data, replacement=True, num_samples=30)
    loader = torch.utils.data.DataLoader(data, batch_size=5, sampler=sampler)
    ptif.attribute(nn.Linear(3, 2), loader, (torch.randn(2, 3), torch.tensor([0, 1])), loss=nn.CrossEntropyLoss())


class Fitted(OldNames):
    def self_influence(self) -> None: ...


def old_method() -> None:
    Fitted().self_scores()  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("call", "category"),
    [
        (few_steps, IncompleteSolveWarning),
        (random_data, TrainingDataWarning),
        (drawn_with_replacement, TrainingDataWarning),
        (old_method, DeprecationWarning),
        (lambda: warn_caller("here", UserWarning), UserWarning),
    ],
)
def test_the_place_is_the_callers_line(call, category) -> None:  # type: ignore[no-untyped-def]
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        call()
    places = [w.filename for w in caught if issubclass(w.category, category)]
    assert places and set(places) == {__file__}

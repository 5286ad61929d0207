"""Law: an example is read once per pass that needs its gradient, and never for its label alone."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

import pytorch_influence_functions as ptif
from pytorch_influence_functions.curvature import EmpiricalFisher

N = 1000
# Reads that find out how things stand: the stationarity check looks once at each of so few examples; one wide batch
# where a fit plans its memory, a few to probe the layers and the data.
LOOKS = N + 256 + 20


class Counting(Dataset[Any]):
    """Counts every read of every item."""

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(0)
        self.x = torch.randn(N, 3, generator=generator)
        self.y = torch.arange(N) % 2
        self.reads: Counter[int] = Counter()

    def __len__(self) -> int:
        return N

    def __getitem__(self, i: int) -> tuple[Tensor, Tensor]:
        self.reads[i] += 1
        return self.x[i], self.y[i]


@pytest.mark.parametrize(
    ("method", "passes"),
    [
        (ptif.dual(EmpiricalFisher(), damping=0.1), 1),
        (ptif.methods.grad_dot(), 1),
        (ptif.ekfac(damping=0.1), 2),  # the fit, and the scoring
        (ptif.methods.TrainingLoss(), 1),
    ],
    ids=lambda value: repr(value)[:40],
)
def test_one_read_per_pass_that_needs_gradients(method: Any, passes: int) -> None:
    torch.manual_seed(0)
    data, model = Counting(), nn.Sequential(nn.Linear(3, 6), nn.Tanh(), nn.Linear(6, 2))
    queries = (torch.randn(2, 3), torch.tensor([0, 1]))
    scores = ptif.attribute(model, data, queries, loss=nn.CrossEntropyLoss(), method=method, deterministic="ignore")
    assert sum(data.reads.values()) <= passes * N + LOOKS
    assert len(data.reads) == N
    assert scores.train_labels == data.y.tolist()

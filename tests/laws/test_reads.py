"""Law: an example is read once per pass that needs its gradient, and never for its label alone."""

from __future__ import annotations

import os
from collections import Counter
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

import pytorch_influence_functions as ptif
from pytorch_influence_functions.core.errors import InvalidInput
from pytorch_influence_functions.curvature import EmpiricalFisher
from pytorch_influence_functions.problem import reading
from pytorch_influence_functions.problem.data import Source
from pytorch_influence_functions.problem.session import open_session, session

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


@pytest.mark.parametrize(
    "collate", [None, lambda items: torch.utils.data.default_collate(items)], ids=["default", "own"]
)
def test_an_iterative_solve_reads_small_data_once(collate: Any) -> None:
    """Conjugate gradients pass over the data for every step; what fits in memory is read once per call."""
    torch.manual_seed(0)
    data, model = Counting(), nn.Sequential(nn.Linear(3, 6), nn.Tanh(), nn.Linear(6, 2))
    queries = (torch.randn(2, 3), torch.tensor([0, 1]))
    train = data if collate is None else DataLoader(data, batch_size=500, collate_fn=collate)
    method = ptif.gauss_newton()
    scores = ptif.attribute(model, train, queries, loss=nn.CrossEntropyLoss(), method=method)
    assert scores.diagnostics.steps >= 5
    assert sum(data.reads.values()) <= 2 * N + LOOKS
    same = ptif.attribute(model, (data.x, data.y), queries, loss=nn.CrossEntropyLoss(), method=method)
    torch.testing.assert_close(scores.values, same.values, rtol=1e-3, atol=1e-4 * float(same.values.abs().max()))


def test_nothing_is_held_above_the_bound_nor_of_random_data_nor_after_the_call(monkeypatch: pytest.MonkeyPatch) -> None:
    data = Counting()
    source = Source.of(DataLoader(data, batch_size=100))
    source.check_deterministic()

    def reads_of_two_passes() -> int:
        data.reads.clear()
        for _ in range(2):
            list(source.batches())
        return sum(data.reads.values())

    assert reads_of_two_passes() == 2 * N
    with session():
        assert reads_of_two_passes() == N
        first = next(iter(source.batches()))[1][0].zero_()
        assert not torch.equal(next(iter(source.batches()))[1][0], first)
    assert open_session() is None
    with session():
        monkeypatch.setattr(reading, "_HELD_BYTES", 3 * 100 * (3 * 4 + 8))
        assert reads_of_two_passes() == 2 * N - 300
    with session():
        source._determinism["differs"] = 0
        assert reads_of_two_passes() == 2 * N


class Slow(Counting):
    """Says in which process an item was read."""

    def __getitem__(self, i: int) -> tuple[Tensor, Tensor]:
        return torch.tensor(float(os.getpid())), self.y[i]


def test_workers_live_as_long_as_a_call() -> None:
    source = Source.of(DataLoader(Slow(), batch_size=100, num_workers=2))

    def processes(ids: Any = None) -> set[float]:
        return {float(pid) for _, (pids, _) in source.batches(ids) for pid in pids}

    with session():
        first = processes()
        assert len(first) == 2 and processes() == first
        # A sweep that was given up, and one inside another.
        outer = source.batches()
        next(outer)
        assert not processes([1, 2]) & first
        outer.close()
        assert processes() == first
        with pytest.raises(InvalidInput, match="outside the dataset"):
            processes([N])
    assert not processes() & first

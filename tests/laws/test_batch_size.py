"""Scores do not depend on batch sizes; where nobody asked for one it follows from the size of an example and memory."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import pytorch_influence_functions as ptif
from pytorch_influence_functions.gradients.per_example import Derivatives
from pytorch_influence_functions.problem.data import Source

N = 30
METHODS: dict[str, ptif.Influence] = {
    "auto": ptif.Influence(),
    "grad_dot": ptif.methods.grad_dot(),
    "dual": ptif.dual(),
    "ekfac": ptif.ekfac(),
    "drawn labels": ptif.ekfac(fisher=ptif.curvature.Fisher(samples=1)),
    "conjugate gradients": ptif.gauss_newton(),
    "dense": ptif.methods.exact(),
}


def network(inputs: int = 6, hidden: int = 5) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(inputs, hidden), nn.Tanh(), nn.Linear(hidden, 3)).double()


def data(n: int = N, inputs: int = 6) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(n, inputs, generator=generator).double(), torch.arange(n) % 3


@pytest.fixture
def sizes(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many examples each batch had, over all reads of a test."""
    recorded: list[int] = []
    load = Source.load

    def watched(self: Source, plan: Sequence[Tensor]) -> Any:
        recorded.extend(len(ids) for ids in plan)
        return load(self, plan)

    monkeypatch.setattr(Source, "load", watched)
    return recorded


@pytest.mark.slow
@pytest.mark.parametrize("name", METHODS)
def test_scores_are_the_same_in_batches_of_any_size(name: str, sizes: list[int]) -> None:
    queries = (data()[0][:4] + 0.1, data()[1][:4])
    scores, largest = [], []
    for batch_size in (None, 4, 7, 5000):
        problem = ptif.Problem(network(), ptif.CrossEntropy(), data(), batch_size=batch_size)
        sizes.clear()
        fitted = METHODS[name].fit(problem)
        scores.append(fitted.score(queries).values)
        if name != "conjugate gradients":  # where that is a solve for every example
            scores[-1] = torch.cat([scores[-1], fitted.self_influence()[None]])
        largest.append(max(sizes))
    tight = 1e-5 if name == "conjugate gradients" else 1e-9
    for other in scores[1:]:
        torch.testing.assert_close(other, scores[0], rtol=tight, atol=tight * float(scores[0].abs().max()))
    assert largest == [N, 4, 7, N]


def test_small_examples_come_in_wide_batches_also_from_a_loader(sizes: list[int]) -> None:
    x, y = data(6000)
    for train in ((x, y), DataLoader(TensorDataset(x, y), batch_size=32)):
        sizes.clear()
        ptif.methods.grad_dot().fit(ptif.Problem(network(), ptif.CrossEntropy(), train)).score((x[:1], y[:1]))
        assert sizes[-2:] == [4096, 6000 - 4096]


def test_a_loader_that_collates_itself_gets_no_larger_batches_than_its_own(sizes: list[int]) -> None:
    x, y = data()
    loader = DataLoader(
        TensorDataset(x, y), batch_size=10, collate_fn=lambda items: torch.utils.data.default_collate(items)
    )
    ptif.ekfac().fit(ptif.Problem(network(), ptif.CrossEntropy(), loader)).score((x[:1], y[:1]))
    assert max(sizes) == 10


def test_memory_bounds_a_batch(sizes: list[int]) -> None:
    x, y = data(2000)
    problem = ptif.Problem(network(), ptif.CrossEntropy(), (x, y))
    each = Derivatives.of(problem).held * 8
    bounded = ptif.Influence(ptif.curvature.Identity(), ptif.solvers.Spectral(), memory=int(16 * 200 * each))
    sizes.clear()
    bounded.fit(problem).score((x[:1], y[:1]))
    assert 100 <= max(sizes) <= 200


def test_large_examples_come_in_small_batches_even_where_most_of_the_model_is_frozen() -> None:
    """Gradients of a head are small, and the activations of the backbone below it are not."""
    torch.manual_seed(0)
    backbone = nn.Sequential(nn.Conv2d(1, 64, 3, padding=1), nn.ReLU(), nn.Conv2d(64, 64, 3, padding=1), nn.ReLU())
    model = nn.Sequential(backbone, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 2))
    backbone.requires_grad_(False)
    x, y = torch.randn(1, 1, 64, 64).expand(500, -1, -1, -1), torch.zeros(500, dtype=torch.long)
    derivatives = Derivatives.of(ptif.Problem(model, ptif.CrossEntropy(), (x, y)))
    activations = 4 * 64 * 64 * 64
    assert derivatives.numbers < 100 and activations < derivatives.held < 1.2 * activations
    assert derivatives.batched(derivatives.problem.data).batch_size <= 64


def test_several_processes_get_a_share_each() -> None:
    source = Source.of(data(100))
    assert source.suited_to(10, workers=4).batch_size == 25
    assert source.suited_to(10, workers=1).batch_size == 100


def test_a_copy_of_a_problem_keeps_what_was_asked_and_nothing_else() -> None:
    chosen = ptif.Problem(network(), ptif.CrossEntropy(), data())
    asked = ptif.Problem(network(), ptif.CrossEntropy(), data(), batch_size=7)
    copies = [problem.with_(data=data(40)).data for problem in (chosen, asked)]
    assert [(copy.fixed, copy.batch_size) for copy in copies] == [(False, 64), (True, 7)]

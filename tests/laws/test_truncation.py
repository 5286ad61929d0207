"""Low-rank queries: the bound holds for every score, and full rank loses nothing."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import pytorch_influence_functions as ptif
from pytorch_influence_functions.core.errors import InvalidInput
from pytorch_influence_functions.linalg.blocks import Dense, Outer
from pytorch_influence_functions.linalg.rows import Rows
from pytorch_influence_functions.solvers.truncation import Truncation
from tests.laws.test_influence import cross_entropy
from tests.oracles.autograd import dense_ggn, example_gradients


def some(n: int, decay: float = 0.6) -> Rows:
    generator = torch.Generator().manual_seed(n)
    g = torch.randn(n, 12, 20, generator=generator, dtype=torch.float64)
    u, s, v = torch.linalg.svd(g, full_matrices=False)
    matrix = (u * (decay ** torch.arange(12).double())) @ v
    vector = torch.randn(n, 5, generator=generator, dtype=torch.float64)
    assert s.shape == (n, 12)
    return Rows({"a": Dense(matrix), "b": Dense(vector)})


@pytest.mark.parametrize("given", [{"tolerance": 0.3}, {"tolerance": 0.05}, {"rank": 1}, {"rank": 4}], ids=repr)
def test_no_score_is_off_by_more_than_its_bound(given: Any) -> None:
    queries, training = some(7), some(30, decay=0.95)
    made = Truncation(**given).of(queries)
    assert isinstance(made.rows.blocks["a"], Outer)
    assert torch.equal(made.rows.blocks["b"].dense(), queries.blocks["b"].dense())
    error = (made.rows.inner(training) - queries.inner(training)).abs()
    bound = made.bound(training)
    assert bool((error <= bound * (1 + 1e-12)).all())
    # A bound that were never approached would be worthless: some pair comes within a factor of 30.
    assert float((error / bound).max()) > 1 / 30


def test_what_is_lost_is_measured_exactly_and_kept_below_the_tolerance() -> None:
    queries = some(7)
    for tolerance in (0.3, 0.05):
        made = Truncation(tolerance=tolerance).of(queries)
        full = queries.blocks["a"].dense()
        gap = (made.rows.blocks["a"].dense() - full).flatten(1).norm(dim=1)
        torch.testing.assert_close(made.lost["a"], gap)
        assert bool((gap <= tolerance * full.flatten(1).norm(dim=1)).all())
        smaller = made.ranks["a"] - 1
        assert float((Truncation(rank=smaller).of(queries).lost["a"] / full.flatten(1).norm(dim=1)).max()) > tolerance


def test_a_rank_that_saves_nothing_leaves_the_rows_as_they_are() -> None:
    queries = some(3)
    made = Truncation(rank=8).of(queries)  # 8 (12 + 20) > 12 * 20
    assert made.rows.blocks["a"] is queries.blocks["a"]
    assert float(made.bound(some(4)).max()) == 0.0


@pytest.mark.parametrize(
    "bad", [{}, {"tolerance": 0.1, "rank": 2}, {"tolerance": 0.0}, {"tolerance": 2.0}, {"rank": 0}]
)
def test_settings_without_meaning_are_refused(bad: Any) -> None:
    with pytest.raises(InvalidInput, match="Truncation"):
        Truncation(**bad)


LAYERS = {"first": (10, 8, 3.0), "second": (6, 9, 1.0), "last": (7, 7, 0.01)}
"""Sizes of three layers, and how large their gradients are: what the last one loses is next to nothing."""


def layers(n: int, seed: int, rough: bool) -> Rows:
    generator = torch.Generator().manual_seed(seed)
    blocks: dict[str, Any] = {}
    for name, (o, i, size) in LAYERS.items():
        g = torch.randn(n, o, i, generator=generator, dtype=torch.float64)
        u, s, v = torch.linalg.svd(g, full_matrices=False)
        blocks[name] = Dense(size * (g if rough else (u * (0.6 ** torch.arange(s.shape[1]).double())) @ v))
    return Rows(blocks)


def lost(block: Tensor, rank: int) -> Tensor:
    """|V - V_r|_F, by dense singular values."""
    return torch.linalg.svdvals(block)[:, rank:].square().sum(1).sqrt()


@pytest.mark.parametrize("rank", [1, 2])
def test_the_bound_adds_up_what_every_layer_loses(rank: int) -> None:
    queries, training = layers(7, 1, rough=False), layers(30, 2, rough=True)
    made = Truncation(rank=rank).of(queries)
    want = torch.zeros(7, 30, dtype=torch.float64)
    for name in LAYERS:
        sizes = training.blocks[name].dense().flatten(1).norm(dim=1)
        want += lost(queries.blocks[name].dense(), rank)[:, None] * sizes[None]
    bound = made.bound(training)
    torch.testing.assert_close(bound, want)
    error = (made.rows.inner(training) - queries.inner(training)).abs()
    assert bool((error <= bound * (1 + 1e-12)).all())
    # No single layer's loss would do: each alone promises less than some score is off by.
    for name in ("second", "last"):
        alone = lost(queries.blocks[name].dense(), rank)[:, None] * training.blocks[name].dense().flatten(1).norm(dim=1)
        assert bool((error > alone).any())


def test_the_diagnostics_of_a_network_say_the_largest_bound_of_all_pairs() -> None:
    """From dense matrices: what each layer of each solved query loses, times the layer of each example's gradient."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 9), nn.Tanh(), nn.Linear(9, 8), nn.Tanh(), nn.Linear(8, 4)).double()
    x, y, damping = torch.randn(30, 8).double(), torch.arange(30) % 4, 1e-2
    x[2] *= 3  # the largest bound is not in the last batch
    g = example_gradients(model, cross_entropy, x, y)
    matrix = dense_ggn(model, cross_entropy, x, y) + damping * torch.eye(g.shape[1], dtype=g.dtype)
    solved, bound = torch.linalg.solve(matrix, g[:5].T).T, torch.zeros(5, 30, dtype=g.dtype)
    for queries, training in zip(by_layer(model, solved), by_layer(model, g), strict=True):
        bound += lost(queries, 1)[:, None] * training.flatten(1).norm(dim=1) / 30
    assert float(bound[:, 28:].max()) < 0.9 * float(bound.max())

    spec = ptif.Influence(ptif.curvature.GGN(), ptif.solvers.Spectral(), damping, truncation=Truncation(rank=1))
    problem = ptif.Problem(model, ptif.CrossEntropy(), (x, y), batch_size=7)
    scores = spec.fit(problem).score((x[:5], y[:5]))
    (note,) = [n for n in scores.diagnostics.notes if "off by more than" in n]
    assert "0 1, 2 1, 4 1" in note  # all three layers are kept at rank 1
    assert float(re.findall(r"off by more than ([\d.e+-]+)", note)[0]) == pytest.approx(float(bound.max()), rel=0.05)
    error = (scores.values - solved @ g.T / 30).abs()
    assert bool((error <= bound * (1 + 1e-9)).all()) and float(error.max()) > 1e-3 * float(bound.max())


@pytest.mark.parametrize("weights", [(10.0, 5.0), (1.0, -2.0), None], ids=str)
def test_the_certificate_of_weighted_checkpoints_is_the_weighted_sum(weights: Any) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 9), nn.Tanh(), nn.Linear(9, 4)).double()
    x, y = torch.randn(30, 8).double(), torch.arange(30) % 4
    states = [{k: v * scale for k, v in model.state_dict().items()} for scale in (1.0, 1.3)]

    def scores(states: list[Any], weights: Any, truncation: Truncation | None) -> ptif.Scores:
        spec = ptif.Influence(
            ptif.curvature.GGN(), ptif.solvers.Spectral(), 1e-2, weights=weights, truncation=truncation
        )
        return spec.fit(ptif.Problem(model, ptif.CrossEntropy(), (x, y), checkpoints=states)).score((x[:5], y[:5]))

    def promised(scores: ptif.Scores) -> float:
        (note,) = [n for n in scores.diagnostics.notes if "off by more than" in n]
        return float(re.findall(r"off by more than ([\d.e+-]+)", note)[0])

    low, full = (scores(states, weights, t) for t in (Truncation(rank=1), None))
    alone = [promised(scores([state], None, Truncation(rank=1))) for state in states]
    want = sum(abs(w) * bound for w, bound in zip(weights or (0.5, 0.5), alone, strict=True))
    assert promised(low) == pytest.approx(want, rel=0.1)  # two digits are shown
    assert float((low.values - full.values).abs().max()) <= 1.05 * promised(low)


def by_layer(model: nn.Module, rows: Tensor) -> list[Tensor]:
    """Flat rows as the matrices of the linear layers, the bias as a last column."""
    sizes = [p.numel() for p in model.parameters()]
    parts = [
        part.reshape(len(rows), *p.shape) for part, p in zip(rows.split(sizes, 1), model.parameters(), strict=True)
    ]
    return [torch.cat([w, b[:, :, None]], 2) for w, b in zip(parts[::2], parts[1::2], strict=True)]

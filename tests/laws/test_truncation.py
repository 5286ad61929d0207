"""Low-rank queries: the bound holds for every score, and full rank loses nothing."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from pytorch_influence_functions.core.errors import InvalidInput
from pytorch_influence_functions.linalg.blocks import Dense, Outer
from pytorch_influence_functions.linalg.rows import Rows
from pytorch_influence_functions.solvers.truncation import Truncation


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

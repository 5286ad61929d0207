"""Which examples stand for all: in order, different, and fair to any arrangement of the classes."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pytorch_influence_functions.core.indexing import spread_sample


@given(n=st.integers(1, 5000), most=st.integers(1, 300))
def test_indices_are_in_range_different_and_in_order(n: int, most: int) -> None:
    ids = spread_sample(n, most)
    assert len(ids) == min(n, most)
    assert int(ids[0]) >= 0 and int(ids[-1]) < n
    assert bool((ids.diff() > 0).all())


@pytest.mark.parametrize("period", [2, 3, 5, 10])
def test_alternating_classes_are_met_in_proportion(period: int) -> None:
    # A fixed step of `period` would meet one class alone.
    ids = spread_sample(2000 * period, 2000)
    shares = torch.bincount(ids % period, minlength=period).double() / len(ids)
    # Five standard deviations of a share of independent draws.
    tolerance = 5 * (1 / period * (1 - 1 / period) / 2000) ** 0.5
    torch.testing.assert_close(shares, torch.full_like(shares, 1 / period), rtol=0, atol=tolerance)


def test_sorted_classes_are_met_in_proportion() -> None:
    classes = torch.arange(6000) // 2000
    shares = torch.bincount(classes[spread_sample(6000, 300)]).double() / 300
    torch.testing.assert_close(shares, torch.full_like(shares, 1 / 3), rtol=0, atol=1 / 300)

"""The yardstick of the other tests: what counts as equal."""

from __future__ import annotations

import math

import pytest
import torch

from tests.tolerance import gap, rounding


def test_another_order_of_a_sum_is_equal_and_another_number_is_not() -> None:
    for dtype in (torch.float32, torch.float64):
        terms = torch.randn(1000, 50, dtype=dtype)
        total = terms.sum(0)
        one_by_one = torch.zeros(50, dtype=dtype)
        for row in terms.flip(0):
            one_by_one += row
        assert 0 < gap(one_by_one, total) < rounding(dtype)
        assert gap(total * (1 + 1e-3), total) == pytest.approx(1e-3, rel=1e-3)


def test_nothing_is_near_a_nan() -> None:
    assert math.isnan(gap([1.0, math.nan], [1.0, 2.0]))
    assert not gap([1.0, math.nan], [1.0, 2.0]) < rounding(torch.float64)
    with pytest.raises(AssertionError, match=r"\(2,\) and \(1, 2\)"):
        gap([1.0, 2.0], [[1.0, 2.0]])

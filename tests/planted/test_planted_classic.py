"""Bugs planted in the classic functions' tuning of themselves: each must break its law."""

from __future__ import annotations

from typing import Any

import pytest

from pytorch_influence_functions.classic import engine
from tests.interface import test_classic_config as laws
from tests.planted.planting import Bug, must_be_noticed, swap

RUNS = 3


def as_if_not_squared(original: Any, *args: Any, **kwargs: Any) -> float:
    """What makes (spread / noise)^2 come out as spread / noise."""
    return float((original(*args, **kwargs) * laws.NOISE) ** 0.5)


def by_n(original: Any, *args: Any, **kwargs: Any) -> float:
    """The variance of three runs divided by three instead of two."""
    return float(original(*args, **kwargs) * ((RUNS - 1) / RUNS) ** 0.5)


LAW = laws.test_the_r_of_auto_tune_brings_the_noise_down_to_what_was_asked
BUGS = [
    Bug("runs needed not squared", swap(engine, "relative_deviation", as_if_not_squared), LAW),
    Bug("spread of few runs divided by n", swap(engine, "relative_deviation", by_n), LAW),
]


@pytest.mark.parametrize("bug", BUGS, ids=lambda bug: bug.name)
def test_a_planted_bug_breaks_its_law(bug: Bug, monkeypatch: pytest.MonkeyPatch) -> None:
    must_be_noticed(bug, monkeypatch)

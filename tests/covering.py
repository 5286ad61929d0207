"""Which combinations the tests go through: those that cover what can differ, or with PTIF_TEST_FULL=1 all of them.

Where a law is asked over a product (every public call x every kind of model), `make test` takes every value of each
and every pair that shares code, and `make test-full` the whole product.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from typing import TypeVar

T = TypeVar("T")

FULL = os.environ.get("PTIF_TEST_FULL", "0") not in ("", "0")


def chosen(values: Iterable[T], cover: Iterable[T]) -> list[T]:
    """Those of `values` that are in `cover`, or all of them; what is in the cover must be among the values."""
    values, cover = list(values), set(cover)
    assert cover <= set(values), sorted(map(str, cover - set(values)))
    return [value for value in values if FULL or value in cover]

"""Positions of examples: which of many are looked at."""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Iterator

import torch
from jaxtyping import Int
from torch import Tensor


def spread_sample(n: int, most: int) -> Int[Tensor, " k"]:
    """At most `most` of n indices in increasing order, one at random from each of as many equal stretches.

    They are the same ones every time. Stretches keep a sorted data set's classes in proportion. A fixed step would too,
    but in data whose classes alternate it may meet one class only.

    >>> spread_sample(9, 3).tolist(), spread_sample(2, 3).tolist()
    ([2, 5, 7], [0, 1])
    """
    if n <= most:
        return torch.arange(n)
    edges = torch.linspace(0, n, most + 1, dtype=torch.float64).long()
    first, width = edges[:-1], edges.diff()
    draws = torch.rand(most, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return first + (draws * width).long()


def while_cheap(places: Iterable[int], fewest: int, seconds: float) -> Iterator[int]:
    """The places, each once; beyond the fewest only while so many times the quickest look takes no longer than that.

    The quickest, because on a busy machine a look may wait for others: how many are looked at should not depend on it.

    Args:
        places: what to look at, in this order.
        fewest: how many are looked at however long it takes.
        seconds: for all of them.

    >>> list(while_cheap([4, 2, 4, 7], 1, 60.0))
    [4, 2, 7]
    """
    quickest = math.inf
    for count, place in enumerate(dict.fromkeys(places)):
        if count >= fewest and quickest * (count + 1) > seconds:
            return
        start = time.perf_counter()
        yield place
        quickest = min(quickest, time.perf_counter() - start)

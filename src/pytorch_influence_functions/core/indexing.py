"""Positions of examples: which of many are looked at."""

from __future__ import annotations

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

"""Positions of examples: which of many are looked at."""

from __future__ import annotations

import torch
from jaxtyping import Int
from torch import Tensor


def evenly_spaced(n: int, most: int) -> Int[Tensor, " k"]:
    """At most `most` of n indices, evenly spaced: the same ones every time.

    >>> evenly_spaced(9, 3).tolist(), evenly_spaced(2, 3).tolist()
    ([0, 4, 8], [0, 1])
    """
    return torch.arange(n) if n <= most else torch.linspace(0, n - 1, most).long()

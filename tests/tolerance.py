"""How far apart two computations of the same numbers may lie.

Machines and numbers of threads add in different orders, so results that were added or multiplied agree up to rounding
only. `gap` measures how well two results agree, `rounding` says how well they must.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def gap(a: Any, b: Any) -> float:
    """The largest difference between entries, relative to the largest entry of `b`. NaN where one of them is NaN."""
    a, b = (torch.as_tensor(t, dtype=torch.float64).detach() for t in (a, b))
    assert a.shape == b.shape, f"{tuple(a.shape)} and {tuple(b.shape)}"
    if torch.equal(a, b):
        return 0.0
    return float((a - b).abs().max() / b.abs().max())


def rounding(dtype: torch.dtype | Tensor, condition: float = 1.0, terms: int = 1000) -> float:
    """The relative error that rounding leaves in a sum of `terms` products, magnified by `condition`.

    The errors of a sum grow as the root of their number. A factor of 4 leaves room for sums of sums.
    """
    if isinstance(dtype, Tensor):
        dtype = dtype.dtype
    return 4 * float(torch.finfo(dtype).eps) * terms**0.5 * condition

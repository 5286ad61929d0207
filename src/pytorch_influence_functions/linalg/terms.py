"""The terms of sums of outer products, one axis of a block: which of them are zero, and terms of zeros."""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float, Int, Shaped
from torch import Tensor


def terms_in_use(*factors: Float[Tensor, "n t _"]) -> Int[Tensor, " u"] | None:
    """Which terms have no factor that is zero in all rows, at least one; None: all, also where NaN would be lost."""
    used = torch.stack([_used_in_any_row(x) for x in factors]).all(0)
    if bool(used.all()):
        return None
    if not all(bool(torch.isfinite(x[:, ~used].sum())) for x in factors):
        return None
    chosen = used.nonzero().flatten()
    return chosen if len(chosen) else chosen.new_zeros(1)


def _used_in_any_row(x: Float[Tensor, "n t d"]) -> Bool[Tensor, " t"]:
    """Whether a term differs from zero in any row. One number of each is looked at first."""
    used: Tensor = (x[..., -1] != 0).any(0)
    rest = (~used).nonzero().flatten()
    if len(rest):
        used[rest] = (x[:, rest] != 0).any(2).any(0)
    return used


def padded(x: Shaped[Tensor, "n t *d"], terms: int) -> Tensor:
    """With terms of zeros, so that there are so many."""
    if x.shape[1] == terms:
        return x
    return torch.cat([x, x.new_zeros(len(x), terms - x.shape[1], *x.shape[2:])], 1)

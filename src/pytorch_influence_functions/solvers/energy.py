"""How far an answer is from the solution in the norm of C + D: what the scores that are made of it are wrong by.

The norm |e|^2 = e^T (C + D) e of an error e is, but for D, about the mean square of what it changes in the scores: C is
the mean of the gradients' squares, or near it. The residual r = b - (C + D) x in its usual norm says little of it where
eigenvalues differ by far, for it sees the steepest directions alone.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor


def energy(x: Float[Tensor, "n p"], b: Float[Tensor, "n p"], r: Float[Tensor, "n p"]) -> Float[Tensor, " n"]:
    """x^T (C + D) x of every row; 0 where rounding makes it negative."""
    return (x * (b - r)).sum(1).clamp(min=0)


def error_bound(
    x: Float[Tensor, "n p"], b: Float[Tensor, "n p"], r: Float[Tensor, "n p"], smallest: float
) -> Float[Tensor, " n"]:
    """How far every row is, at most, from the solution, relative to its own size in the norm of C + D; 0 for b = x = 0.

    The error's square is r^T (C + D)^-1 r, at most |r|^2 over the smallest eigenvalue.

    Args:
        x: the answers.
        b: the right-hand sides.
        r: b - (C + D) x.
        smallest: the smallest number in D, which no eigenvalue of C + D is below where C has no negative ones.
    """
    size = r.norm(dim=1) / smallest**0.5
    return torch.where(size == 0, size, size / energy(x, b, r).sqrt())

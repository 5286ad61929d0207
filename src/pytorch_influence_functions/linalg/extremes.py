"""What can be learned of a spectrum from products alone. Own generators: the global RNG is never touched."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .operator import AbstractOperator

# Probes pushed through one product at a time, in numbers.
_PIECE = 1 << 26


class Extremes(NamedTuple):
    """Estimates of both ends of a spectrum: `largest` from below, `smallest` from above."""

    largest: float
    smallest: float


def _product(operator: AbstractOperator, flat: Tensor) -> Tensor:
    return operator.apply(operator.space.rows(flat)).flat()


def lanczos(
    operator: AbstractOperator,
    steps: int = 20,
    seed: int = 0,
    *,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
) -> Extremes:
    """Largest and smallest eigenvalue of a symmetric operator from `steps` products (Lanczos 1950).

    Full reorthogonalisation, twice, so the estimates are Ritz values and lie inside the true spectrum:
    `largest <= lambda_max`, `smallest >= lambda_min`. `dtype` and `device` are those of the model.

    >>> lanczos(operator)  # doctest: +SKIP
    Extremes(largest=2.03, smallest=0.0001)
    """
    generator = torch.Generator().manual_seed(seed)
    p = operator.size
    steps = min(steps, p)
    start = torch.randn(1, p, generator=generator, dtype=torch.float64)
    v = (start / start.norm()).to(device=device, dtype=dtype)
    basis = v.new_zeros(steps, p)
    tri = torch.zeros(steps, steps, dtype=torch.float64)
    used, largest_seen = 0, 0.0
    for k in range(steps):
        basis[k] = v[0]
        used = k + 1
        w = _product(operator, v)
        tri[k, k] = float((w * v).sum())
        for _ in range(2):
            seen = basis[:used]
            w = w - (w @ seen.T) @ seen
        beta = float(w.norm())
        largest_seen = max(largest_seen, abs(float(tri[k, k])), beta)
        if k + 1 == steps or beta <= 10 * torch.finfo(dtype).eps * largest_seen:
            break  # the space spanned is invariant: the Ritz values are eigenvalues
        tri[k, k + 1] = tri[k + 1, k] = beta
        v = w / beta
    ritz = torch.linalg.eigvalsh(tri[:used, :used])
    return Extremes(float(ritz[-1]), float(ritz[0]))


def hutchinson_trace(
    operator: AbstractOperator,
    samples: int = 16,
    seed: int = 0,
    *,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
) -> float:
    """trace(C) as the mean of z^T C z over random signs z (Hutchinson 1990).

    Variance `2 (|C|_F^2 - |diag C|^2) / samples`; exact for a diagonal C.
    """
    return sum(hutchinson_traces(operator, samples, seed, dtype=dtype, device=device).values())


def hutchinson_traces(
    operator: AbstractOperator,
    samples: int = 16,
    seed: int = 0,
    *,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
) -> dict[str, float]:
    """`hutchinson_trace` of every diagonal block, from the same products."""
    generator = torch.Generator().manual_seed(seed)
    p = operator.size
    totals = dict.fromkeys(operator.space.blocks, 0.0)
    step = max(1, min(samples, _PIECE // max(1, p)))
    for at in range(0, samples, step):
        n = min(step, samples - at)
        signs = torch.randint(0, 2, (n, p), generator=generator, dtype=torch.int8)
        z = (2 * signs - 1).to(device=device, dtype=dtype)
        along = (z * _product(operator, z)).double()
        for name, part in operator.space.slices.items():
            totals[name] += float(along[:, part].sum()) / samples
    return totals

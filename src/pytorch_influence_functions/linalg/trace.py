"""Traces from products alone, by random signs. Own generators: the global one is never touched."""

from __future__ import annotations

import torch

from .chunks import CHUNK_NUMBERS, chunks
from .operator import AbstractOperator, apply_flat


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
    return sum(hutchinson_block_traces(operator, samples, seed, dtype=dtype, device=device).values())


def hutchinson_block_traces(
    operator: AbstractOperator,
    samples: int = 16,
    seed: int = 0,
    *,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
) -> dict[str, float]:
    """`hutchinson_trace` of every diagonal block, from the same products."""
    generator = torch.Generator().manual_seed(seed)
    traces = dict.fromkeys(operator.space.blocks, 0.0)
    # Each chunk of probes is a pass over the data, which costs more than the memory of a wider one.
    for chunk in chunks(samples, operator.size, most=4 * CHUNK_NUMBERS):
        shape = (chunk.stop - chunk.start, operator.size)
        signs = torch.randint(0, 2, shape, generator=generator, dtype=torch.int8)
        probes = (2 * signs - 1).to(device=device, dtype=dtype)
        products = (probes * apply_flat(operator, probes)).double()
        for name, columns in operator.space.slices.items():
            traces[name] += float(products[:, columns].sum()) / samples
    return traces

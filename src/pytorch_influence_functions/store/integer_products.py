"""Products of rows of 8-bit whole numbers with queries in float32, by the machine's own 8-bit products."""

from __future__ import annotations

from functools import lru_cache
from typing import Final

import torch
from jaxtyping import Float, Int8
from torch import Tensor

# Bytes of rows in float32 that are made at once, and products in 32 bits: they stay in a core's cache.
_CACHED: Final = 1 << 19
_NUMBERS: Final = 1 << 18
# Products of up to so many pairs of numbers from -127 to 127 fit into 32 bits.
_LONGEST: Final = (2**31 - 1) // 127**2
# The library's products of fewer columns are slower than of so many.
_FEWEST_COLUMNS: Final = 8


def integer_products(rows: Int8[Tensor, "n k"], queries: Float[Tensor, "q k"]) -> Float[Tensor, "q n"]:
    """<query, row> for all pairs, float32.

    A query is split into two whole numbers of 8 bits per coordinate, which together keep 15 bits of it; their products
    with the rows are exact. Where the machine has no such products, or they are wrong, rows are turned into float32.

    Args:
        rows: from -127 to 127.
        queries: float32.
    """
    n, k = rows.shape
    if rows.device.type != "cpu" or k > _LONGEST or not has_integer_products():
        return float_products(rows, queries)
    scales = queries.abs().amax(1) / 127
    scales = torch.where(scales > 0, scales, torch.ones_like(scales))
    steps = queries / scales[:, None]
    high = steps.round()
    low = ((steps - high) * 254).round()
    columns = torch.cat([high, low]).to(torch.int8)
    if len(columns) < _FEWEST_COLUMNS:
        columns = torch.cat([columns, columns.new_zeros(_FEWEST_COLUMNS - len(columns), k)])
    columns = columns.T.contiguous()
    q, step = len(queries), max(1, _NUMBERS // columns.shape[1])
    whole = torch.empty(min(step, n), columns.shape[1], dtype=torch.int32)
    out = torch.empty(n, q)
    for some, products in zip(torch.split(rows, step), torch.split(out, step), strict=True):
        piece = whole[: len(some)]
        torch._int_mm(some, columns, out=piece)
        torch.mul(piece[:, :q], scales, out=products)
        products.addcmul_(piece[:, q : 2 * q].float(), scales, value=1 / 254)
    return out.T


def float_products(rows: Tensor, queries: Float[Tensor, "q k"]) -> Float[Tensor, "q n"]:
    """<query, row> for all pairs, rows of a narrow type being turned into float32 a few at a time.

    Args:
        rows: [n, k], of any type.
        queries: float32.
    """
    if rows.dtype == queries.dtype or rows.device.type != "cpu":
        return queries @ rows.to(queries.dtype).T
    n, k = rows.shape
    step = max(1, _CACHED // (4 * max(1, k)))
    # One place for all pieces, which stays in the cache: fresh memory for each takes as long as the products do.
    wide = torch.empty(step, k)
    single = len(queries) == 1
    factor = queries[0].contiguous() if single else queries.T.contiguous()
    out = torch.empty(n) if single else torch.empty(n, len(queries))
    multiply = torch.mv if single else torch.mm
    last = wide[: n % step]
    # Thousands of pieces: what is done for each in Python counts.
    for some, products in zip(torch.split(rows, step), torch.split(out, step), strict=True):
        piece = wide if some.shape[0] == step else last
        multiply(piece.copy_(some), factor, out=products)
    return out[None] if single else out.T


@lru_cache(maxsize=1)
def has_integer_products() -> bool:
    """Whether this machine's products of 8-bit numbers are there and exact: some saturate in 16 bits."""
    rows = torch.full((32, 64), 127, dtype=torch.int8)
    rows[::2] = -127
    columns = torch.full((64, _FEWEST_COLUMNS), 127, dtype=torch.int8)
    columns[:, ::2] = -127
    try:
        products = torch._int_mm(rows, columns)
    except (RuntimeError, AttributeError):
        return False
    return torch.equal(products.double(), rows.double() @ columns.double())

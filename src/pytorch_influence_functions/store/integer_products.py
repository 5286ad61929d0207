"""Products of rows of 8-bit whole numbers with queries in float32, by the machine's own 8-bit products."""

from __future__ import annotations

from functools import lru_cache
from typing import Final

import torch
from jaxtyping import Float, Int8
from torch import Tensor

# Bytes of rows that are multiplied at once: they stay in a core's cache.
_CACHED: Final = 1 << 20
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
    step = max(1, _CACHED // max(1, k))
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
    whole = torch.empty(n, columns.shape[1], dtype=torch.int32)
    for start in range(0, n, step):
        torch._int_mm(rows[start : start + step], columns, out=whole[start : start + step])
    q = len(queries)
    products = whole[:, :q].float().mul_(scales)
    return products.addcmul_(whole[:, q : 2 * q].float(), scales, value=1 / 254).T


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
    out, columns = torch.empty(n, len(queries)), queries.T.contiguous()
    for start in range(0, n, step):
        torch.mm(rows[start : start + step].float(), columns, out=out[start : start + step])
    return out.T


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

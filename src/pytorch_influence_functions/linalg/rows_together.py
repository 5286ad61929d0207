"""Rows that several processes made, each of its share, on all of them; and their inner products, shared out."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import fields
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from ..core.distributed import World, current
from .blocks import AbstractBlock, Dense, Sum, cat
from .rows import Rows

# Rows and columns of a matrix that are mirrored at once.
_TILE = 1024


def everyones_rows(rows: Rows) -> Rows:
    """The rows of process 0, then those of process 1, and so on, on every process of a `distributed()` block.

    Args:
        rows: of this process, at least one; of the same space on every process.
    """
    world = current()
    if world.size == 1:
        return rows
    forms = [json.loads(text) for text in world.exchange(json.dumps({k: _form(b) for k, b in rows.blocks.items()}))]
    # Texts of different lengths may be kept in different forms: those are written out, as `Rows.cat` would.
    own = rows.map(lambda name, block: block if _same_types([f[name] for f in forms]) else _written_out(block))
    forms = [json.loads(text) for text in world.exchange(json.dumps({k: _form(b) for k, b in own.blocks.items()}))]
    # Block by block: beside all rows no more than one block of them is held twice.
    return Rows(
        {
            name: cat([_sent(block, forms[source][name], source, world) for source in range(world.size)])
            for name, block in own.blocks.items()
        }
    )


def products_of(rows: Rows, dtype: torch.dtype | None) -> Float[Tensor, "m m"]:
    """All inner products of rows that every process has, in float64, each process a band of them.

    Beside the result no more than one band is held.

    Args:
        rows: the same on every process.
        dtype: as for `Rows.inner`.
    """
    world, m = current(), len(rows)
    if world.size == 1:
        return symmetrised(rows.inner(rows, dtype=dtype).double())
    own = rows.take(world.share(m)).inner(rows, dtype=dtype)
    total = own.new_empty(m, m, dtype=torch.float64)
    for source in range(world.size):
        share = World(source, world.size).share(m)
        band = own if source == world.rank else own.new_empty(share.stop - share.start, m)
        total[share] = world.broadcast(band, source)
    return symmetrised(total)


def symmetrised(k: Float[Tensor, "m m"]) -> Float[Tensor, "m m"]:
    """(k + k^T) / 2, in the place of k and a tile at a time."""
    tiles = [slice(start, start + _TILE) for start in range(0, len(k), _TILE)]
    for at, one in enumerate(tiles):
        for other in tiles[: at + 1]:
            mean = (k[one, other] + k[other, one].T) / 2
            k[one, other], k[other, one] = mean, mean.T
    return k


def _written_out(block: AbstractBlock) -> Dense:
    return Dense(block.dense().reshape(len(block), *block.shape))


def _form(block: AbstractBlock) -> dict[str, Any]:
    """The type of a block and what its tensors look like."""
    if isinstance(block, Sum):
        return {"type": "Sum", "parts": [_form(part) for part in block.parts]}
    tensors = {name: value for name, value in vars(block).items() if isinstance(value, Tensor)}
    looks = {name: [str(t.dtype).removeprefix("torch."), list(t.shape)] for name, t in tensors.items()}
    return {"type": type(block).__name__, "tensors": looks}


def _same_types(forms: list[dict[str, Any]]) -> bool:
    def types(form: Mapping[str, Any]) -> Any:
        return form["type"], [types(part) for part in form.get("parts", ())]

    return all(types(form) == types(forms[0]) for form in forms)


def _sent(block: AbstractBlock, form: Mapping[str, Any], source: int, world: World) -> AbstractBlock:
    """The block of process `source`, of the type of this process's own."""
    if isinstance(block, Sum):
        return Sum(tuple(_sent(p, f, source, world) for p, f in zip(block.parts, form["parts"], strict=True)))
    received: dict[str, Any] = {}
    for name, (dtype, shape) in form["tensors"].items():
        own = getattr(block, name)
        room = own if world.rank == source else own.new_empty(shape, dtype=getattr(torch, dtype))
        received[name] = world.broadcast(room.contiguous(), source)
    rest = {f.name: getattr(block, f.name) for f in fields(block) if f.name not in received}  # type: ignore[arg-type]
    return type(block)(**received, **rest)

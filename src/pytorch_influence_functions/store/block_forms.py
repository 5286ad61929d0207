"""Rows in factors as named tensors with one entry per example, and back."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ..core.errors import InvalidInput
from ..linalg import blocks as _blocks
from ..linalg.blocks import AbstractBlock, Conv, Dense, Indexed, Outer, Sum
from ..linalg.rows import Rows
from ..linalg.window import Window


def join_rows(parts: Sequence[Rows]) -> Rows:
    """Rows of several batches, one after the other, in factors: shorter ones get terms of zeros."""
    return Rows({name: _join([rows.blocks[name] for rows in parts]) for name in parts[0].blocks})


def _join(several: Sequence[AbstractBlock]) -> AbstractBlock:
    outers = [b for b in several if isinstance(b, Outer)]
    if len(outers) == len(several):
        most = max(b.terms for b in outers)
        return _blocks.cat([Outer(_padded(b.left, most), _padded(b.right, most)) for b in outers])
    tables = [b for b in several if isinstance(b, Indexed)]
    if len(tables) == len(several):
        most = max(b.index.shape[1] for b in tables)
        return _blocks.cat([Indexed(_padded(b.index, most), _padded(b.values, most), b.size) for b in tables])
    return _blocks.cat(several)


def _padded(x: Tensor, terms: int) -> Tensor:
    if x.shape[1] == terms:
        return x
    return torch.cat([x, x.new_zeros(len(x), terms - x.shape[1], *x.shape[2:])], 1)


def split_block(block: AbstractBlock, name: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors of a block under names that start with `name`, and its form as plain values."""
    if isinstance(block, Dense):
        return {f"{name}.values": block.values}, {"form": "dense"}
    if isinstance(block, Outer):
        return {f"{name}.left": block.left, f"{name}.right": block.right}, {"form": "outer"}
    if isinstance(block, Indexed):
        return {f"{name}.index": block.index, f"{name}.values": block.values}, {"form": "indexed", "size": block.size}
    if isinstance(block, Conv):
        form = {"form": "conv", "window": {k: _plain(v) for k, v in vars(block.window).items()}}
        return {f"{name}.left": block.left, f"{name}.x": block.x}, form
    if isinstance(block, Sum):
        tensors: dict[str, Tensor] = {}
        forms = []
        for number, part in enumerate(block.parts):
            some, form = split_block(part, f"{name}.{number}")
            tensors |= some
            forms.append(form)
        return tensors, {"form": "sum", "parts": forms}
    raise InvalidInput(f"Rows of the form {type(block).__name__} have no factors to store; use TwoSided(k_in).")


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def build_block(tensors: Mapping[str, Tensor], name: str, form: Mapping[str, Any]) -> AbstractBlock:
    """The block that `split_block` took apart."""
    kind = form["form"]
    if kind == "dense":
        return Dense(tensors[f"{name}.values"])
    if kind == "outer":
        return Outer(tensors[f"{name}.left"], tensors[f"{name}.right"])
    if kind == "indexed":
        return Indexed(tensors[f"{name}.index"].long(), tensors[f"{name}.values"], int(form["size"]))
    if kind == "conv":
        w = form["window"]
        window = Window(tuple(w["kernel"]), tuple(w["stride"]), tuple(w["dilation"]), bool(w["bias"]))
        return Conv(tensors[f"{name}.left"], tensors[f"{name}.x"], window)
    return Sum(tuple(build_block(tensors, f"{name}.{k}", part) for k, part in enumerate(form["parts"])))

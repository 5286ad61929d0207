"""Rows in factors as named tensors with one entry per example, and back."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from ..core.errors import InvalidInput
from ..linalg.blocks import AbstractBlock, Conv, Dense, Indexed, Outer, Sum
from ..linalg.window import Window


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

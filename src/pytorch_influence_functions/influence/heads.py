"""Attention heads: which rows and columns of which weights belong to each."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from ..linalg.space import BlockSpec, Space

# What attention modules call the number of their heads, themselves or in the configuration that they hold.
_COUNTS = ("num_heads", "num_attention_heads", "n_heads", "n_head", "nhead", "heads")
# Weights with one piece of their outputs for each head, three such pieces one after the other, three pieces head by
# head, and one piece of their inputs for each head.
_OUTPUTS = (
    *("q_proj", "k_proj", "v_proj", "query", "key", "value", "q_lin", "k_lin", "v_lin"),
    *("q", "k", "v", "to_q", "to_k", "to_v", "wq", "wk", "wv"),
)
_THREE = ("c_attn", "in_proj", "qkv", "Wqkv")
_HEAD_BY_HEAD = ("query_key_value",)
_INPUTS = ("o_proj", "out_proj", "out_lin", "o", "c_proj", "dense", "to_out", "wo")


@dataclass(frozen=True)
class Cut:
    """Some rows (`axis` 0) or columns (1) of a block, seen as a matrix [outputs, inputs]."""

    block: str
    axis: int
    start: int
    stop: int

    @property
    def name(self) -> str:
        """The block and the piece of it."""
        piece = f"{self.start}:{self.stop}"
        return f"{self.block}[{piece}]" if self.axis == 0 else f"{self.block}[:, {piece}]"


def heads_of(model: nn.Module, space: Space) -> dict[str, tuple[Cut, ...]]:
    """The pieces of weights of every attention head, as `module.head.0`; of shared keys and values `module.kv_head.0`.

    Attention is known by the names of its projections and its number of heads, as in transformers and
    `nn.MultiheadAttention`. What it does not know is in no head.

    Args:
        model: with attention, or without.
        space: its parameters that take part.
    """
    pieces: dict[str, list[Cut]] = {}
    for name, module in model.named_modules():
        count = _count_of(module)
        if count is None:
            continue
        for cuts in _cuts(name, module, count, _outer_projection(model, name), space):
            for label, cut in cuts:
                pieces.setdefault(f"{name}.{label}" if name else label, []).append(cut)
    return {label: tuple(cuts) for label, cuts in pieces.items()}


def _count_of(module: nn.Module) -> int | None:
    """How many heads a module says it has."""
    for holder in (module, getattr(module, "config", None)):
        # The configuration is the whole model's: only a module with projections of its own is attention.
        if holder is not module and not any(hasattr(module, child) for child in (*_OUTPUTS, *_THREE, *_HEAD_BY_HEAD)):
            continue
        for attribute in _COUNTS:
            count = getattr(holder, attribute, None)
            if isinstance(count, int) and count > 0:
                return count
    return None


def _outer_projection(model: nn.Module, name: str) -> tuple[str, nn.Module] | None:
    """BERT's: `attention.output.dense` beside `attention.self`."""
    parent, _, own = name.rpartition(".")
    if own != "self":
        return None
    path = f"{parent}.output.dense"
    try:
        return path, model.get_submodule(path)
    except AttributeError:
        return None


def _cuts(
    name: str, module: nn.Module, count: int, outer: tuple[str, nn.Module] | None, space: Space
) -> Iterator[Iterator[tuple[str, Cut]]]:
    head_size = _head_size(module, name, count, space)
    for child in (*_OUTPUTS, *_THREE, *_HEAD_BY_HEAD):
        for block, size in _blocks(_joined(name, child), module, space, axis=0):
            if child in _OUTPUTS:
                yield _of_outputs(block, size, count, head_size)
            elif size == 3 * count * (head_size or size // (3 * count)):
                yield _of_three(block, size, count, child in _HEAD_BY_HEAD)
    projections = [_joined(name, child) for child in _INPUTS]
    for place in [*projections, *([outer[0]] if outer else [])]:
        for block, size in _blocks(place, module, space, axis=1):
            if size % count == 0:
                yield _even(block, 1, size // count, count, "head")


def _joined(name: str, child: str) -> str:
    return f"{name}.{child}" if name else child


def _head_size(module: nn.Module, name: str, count: int, space: Space) -> int | None:
    """How many outputs a head has: what the module says, else its share of the queries."""
    for attribute in ("head_dim", "head_size", "attention_head_size"):
        said = getattr(module, attribute, None)
        if isinstance(said, int) and said > 0:
            return said
    for child in ("q_proj", "query", "q_lin", "q", "to_q", "wq"):
        for _, size in _blocks(_joined(name, child), module, space, axis=0):
            return size // count if size % count == 0 else None
    return None


def _blocks(place: str, module: nn.Module, space: Space, axis: int) -> Iterator[tuple[str, int]]:
    """(block, its outputs or inputs) of a layer: a weight with its bias, or the two alone; and of `in_proj_weight`."""
    for name in (place, f"{place}.weight", f"{place}.bias", f"{place}_weight", f"{place}_bias"):
        block = space.blocks.get(name)
        if block is None or (axis == 1 and len(block.shape) < 2):
            continue
        if _is_turned(place, module, block):
            continue
        yield name, block.shape[0] if axis == 0 else block.shape[1] - block.joint


def _is_turned(place: str, module: nn.Module, block: BlockSpec) -> bool:
    """Whether the weight stands alone and is stored as [inputs, outputs]: then its rows are not its outputs."""
    layer: Any = getattr(module, place.rpartition(".")[2], None)
    return type(layer).__name__ == "Conv1D" and not block.joint and len(block.shape) == 2


def _of_outputs(block: str, size: int, count: int, head_size: int | None) -> Iterator[tuple[str, Cut]]:
    """One piece for each head; for each group of heads where keys and values are shared."""
    if head_size is None or size % head_size or count % (size // head_size):
        return iter(())
    own = size // head_size
    return _even(block, 0, head_size, own, "head" if own == count else "kv_head")


def _of_three(block: str, size: int, count: int, head_by_head: bool) -> Iterator[tuple[str, Cut]]:
    if head_by_head:
        yield from _even(block, 0, size // count, count, "head")
        return
    third = size // 3
    for first in (0, third, 2 * third):
        yield from _even(block, 0, third // count, count, "head", first)


def _even(block: str, axis: int, width: int, count: int, label: str, first: int = 0) -> Iterator[tuple[str, Cut]]:
    for head in range(count):
        yield f"{label}.{head}", Cut(block, axis, first + head * width, first + (head + 1) * width)


def rest_of(cuts: Mapping[str, tuple[Cut, ...]], space: Space) -> dict[str, tuple[Cut, ...]]:
    """By block, the rows or columns that belong to no head, such as the bias beside the inputs of heads."""
    cuts_by_block: dict[str, list[Cut]] = {}
    for pieces in cuts.values():
        for cut in pieces:
            cuts_by_block.setdefault(cut.block, []).append(cut)
    rest: dict[str, tuple[Cut, ...]] = {}
    for block, own in cuts_by_block.items():
        axis, shape = own[0].axis, space.blocks[block].shape
        size, stop = (shape[0] if axis == 0 else math.prod(shape[1:])), max(cut.stop for cut in own)
        rest[block] = (Cut(block, axis, stop, size),) if stop < size else ()
    return rest

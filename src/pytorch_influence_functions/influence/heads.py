"""Attention heads: which rows and columns of which weights belong to each."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from ..core.errors import InvalidInput
from ..linalg.space import Space, is_conv1d

# What attention modules call the number of their heads, themselves or in the configuration that they hold, and the
# number of outputs of each.
_COUNTS = ("num_heads", "num_attention_heads", "n_heads", "n_head", "nhead")
_SIZES = ("head_dim", "head_size", "attention_head_size")
_QUERIES = ("q_proj", "query", "query_proj", "q_lin", "q", "to_q", "wq")
_KEYS_AND_VALUES = (
    *("k_proj", "v_proj", "key", "value", "key_proj", "value_proj", "k_lin", "v_lin"),
    *("k", "v", "to_k", "to_v", "wk", "wv"),
)
_OUTPUTS = ("o_proj", "out_proj", "out_lin", "o", "c_proj", "dense", "to_out", "wo")
# One weight for queries, keys and values: three such pieces, or three pieces head by head. The name of the layer does
# not tell which, so only classes whose code was read are known.
_THREE = {"GPT2Attention": "c_attn", "MultiheadAttention": "in_proj"}
_HEAD_BY_HEAD = {"GPTNeoXAttention": "query_key_value", "BloomAttention": "query_key_value"}


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


@dataclass(frozen=True)
class _Pieces:
    """The pieces of one layer: each head has `width` outputs (`axis` 0) or inputs (1) behind every one of `firsts`."""

    place: str
    axis: int
    label: str
    count: int
    width: int
    firsts: tuple[int, ...] = (0,)
    turned: bool = False
    """Whether the layer stores its weight as [inputs, outputs]."""

    def cuts(self, space: Space) -> Iterator[tuple[str, Cut]]:
        for block, axis in self._blocks(space):
            for head in range(self.count):
                for first in self.firsts:
                    start = first + head * self.width
                    yield f"{self.label}.{head}", Cut(block, axis, start, start + self.width)

    def _blocks(self, space: Space) -> Iterator[tuple[str, int]]:
        """The blocks that hold the layer, or the side of its adapter that is divided like it."""
        adapter = f"{self.place}.lora_{'B' if self.axis == 0 else 'A'}."
        for name, block in space.blocks.items():
            alone = name in (f"{self.place}.weight", f"{self.place}_weight")
            bias = name in (f"{self.place}.bias", f"{self.place}_bias")
            if name == self.place or alone or name.startswith(adapter):
                # A weight with its bias is a block [outputs, inputs + 1] however it is stored.
                yield name, 1 - self.axis if self.turned and alone and not block.joint else self.axis
            elif bias and self.axis == 0:
                yield name, 0


def heads_of(model: nn.Module, space: Space) -> dict[str, tuple[Cut, ...]]:
    """The pieces of weights of every attention head, as `module.head.0`; of shared keys and values `module.kv_head.0`.

    Attention is known by the names of its projections and its number of heads, as in transformers and
    `nn.MultiheadAttention`. Of adapters the side that is divided like the layer takes part.

    Args:
        model: with attention, or without.
        space: its parameters that take part.

    Raises:
        InvalidInput: attention of which only a part is known.
    """
    cuts: dict[str, list[Cut]] = {}
    for name, module in model.named_modules():
        for pieces in _pieces_of(model, name, module):
            for label, cut in pieces.cuts(space):
                cuts.setdefault(_joined(name, label), []).append(cut)
    return {label: tuple(several) for label, several in cuts.items()}


def _pieces_of(model: nn.Module, name: str, module: nn.Module) -> list[_Pieces]:
    """How the layers of an attention module are divided among its heads; nothing for other modules."""
    kind, count = type(module).__name__, _count_of(module)
    fused = _THREE.get(kind) or _HEAD_BY_HEAD.get(kind)
    queries = [child for child in _QUERIES if _layer(module, child) is not None or hasattr(module, f"{child}_weight")]
    if count is None or not (fused or queries):
        return []
    outputs = [(_joined(name, child), layer) for child in _OUTPUTS if (layer := _layer(module, child)) is not None]
    outputs += _beside(model, name)
    size = _size_of(module, count, queries, fused)
    pieces: list[_Pieces] = []
    if fused is not None and size is not None and _outputs_of(module, fused) == 3 * count * size:
        turned, together = _is_turned(_layer(module, fused)), count * size
        if kind in _THREE:
            pieces.append(_Pieces(_joined(name, fused), 0, "head", count, size, (0, together, 2 * together), turned))
        else:
            pieces.append(_Pieces(_joined(name, fused), 0, "head", count, 3 * size))
    for child in (*queries, *_KEYS_AND_VALUES) if size else ():
        if (length := _outputs_of(module, child)) is None:
            continue
        own = length // size if size and length % size == 0 else 0
        if own == count or (child in _KEYS_AND_VALUES and own and count % own == 0):
            label = "head" if own == count else "kv_head"
            pieces.append(
                _Pieces(_joined(name, child), 0, label, own, size or 0, turned=_is_turned(_layer(module, child)))
            )
        else:
            raise _unknown(name, kind)
    fitting = [(place, layer) for place, layer in outputs if size and _shape(layer)[1] == count * size]
    if not pieces or len(fitting) != 1:
        raise _unknown(name, kind)
    ((place, layer),) = fitting
    return [*pieces, _Pieces(place, 1, "head", count, size or 0, turned=_is_turned(layer))]


def _unknown(name: str, kind: str) -> InvalidInput:
    return InvalidInput(
        f"by='head' does not know how {name or 'the model'} ({kind}) divides its weights among its heads; use "
        "by='layer', or patterns of names."
    )


def _count_of(module: nn.Module) -> int | None:
    """How many heads a module says it has, itself or in the configuration that it holds."""
    for holder in (module, getattr(module, "config", None)):
        for attribute in _COUNTS:
            count = getattr(holder, attribute, None)
            if isinstance(count, int) and count > 0:
                return count
    return None


def _size_of(module: nn.Module, count: int, queries: list[str], fused: str | None) -> int | None:
    """How many outputs a head has: what the module says, else its share of the queries."""
    for attribute in _SIZES:
        said = getattr(module, attribute, None)
        if isinstance(said, int) and said > 0:
            return said
    length = _outputs_of(module, queries[0]) if queries else None
    parts = count
    if length is None and fused is not None:
        length, parts = _outputs_of(module, fused), 3 * count
    return length // parts if length and length % parts == 0 else None


def _layer(module: nn.Module, child: str) -> nn.Module | None:
    """A linear layer of a module, seen through an adapter around it."""
    layer: Any = getattr(module, child, None)
    layer = getattr(layer, "base_layer", layer)
    weight = getattr(layer, "weight", None)
    return layer if isinstance(layer, nn.Module) and isinstance(weight, Tensor) and weight.dim() == 2 else None


def _beside(model: nn.Module, name: str) -> list[tuple[str, nn.Module]]:
    """BERT's output: `attention.output.dense` beside `attention.self`."""
    parent, _, own = name.rpartition(".")
    if own != "self":
        return []
    try:
        layer = _layer(model.get_submodule(f"{parent}.output"), "dense")
    except AttributeError:
        return []
    return [] if layer is None else [(f"{parent}.output.dense", layer)]


def _outputs_of(module: nn.Module, child: str) -> int | None:
    """The number of outputs of a layer, or of a weight that the module holds itself."""
    if (layer := _layer(module, child)) is not None:
        return _shape(layer)[0]
    weight = getattr(module, f"{child}_weight", None)
    return weight.shape[0] if isinstance(weight, Tensor) and weight.dim() == 2 else None


def _shape(layer: nn.Module) -> tuple[int, int]:
    """(outputs, inputs) of a linear layer."""
    weight: Any = layer.weight
    rows, columns = weight.shape
    return (columns, rows) if _is_turned(layer) else (rows, columns)


def _is_turned(layer: nn.Module | None) -> bool:
    """Whether the layer stores its weight as [inputs, outputs]."""
    return layer is not None and is_conv1d(layer)


def _joined(name: str, child: str) -> str:
    return f"{name}.{child}" if name else child


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

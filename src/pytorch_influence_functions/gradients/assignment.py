"""Whether the rows that a layer reads in a batch are those of the examples that its layout says they are.

Where the examples sit in a layer's input is told by shapes, on a few of them. Code may still put a batch in another
order before the layer (sorted by length, or by expert) and back behind it, join nodes of graphs or the real tokens of
texts of unequal length, or read time first: then rows of one example are taken for another's, and no sum shows it. What
a layer reads of an example alone tells: it must be what it reads for that example among others.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from ..core.batches import batch_slice
from ..core.errors import InvalidInput
from ..objectives.base import AbstractObjective
from .layer_rules import Layout, rows_first
from .recording import HookedLayer, record_calls
from .separability import largest_gap

Seen: TypeAlias = Mapping[str, Sequence[Tensor]]
"""Of every layer, a few numbers of each row of each of its inputs."""


def misassigned(
    layers: Mapping[str, HookedLayer],
    model: nn.Module,
    objective: AbstractObjective,
    batch: Any,
    n: int,
    allowed: float,
) -> list[str]:
    """The layers that read something else for an example among others than for it alone.

    The batch is looked at in its order and in the opposite one: examples that happen to be sorted are so only once.

    Args:
        layers: with the place of the examples at each call.
        model: in eval mode.
        objective: how outputs are taken from it.
        batch: examples that differ, in size most of all.
        n: how many they are.
        allowed: the largest relative difference of two correct results.

    Returns:
        Their names. A layer may be named wrongly, where padding changes what it reads, and must be tried by its
        gradients then.
    """
    order = torch.arange(n)
    alone = [_seen(layers, model, objective, batch_slice(batch, n, slice(e, e + 1)), 1) for e in range(n)]
    strange: set[str] = set()
    for some in (order, order.flip(0)):
        together = _seen(layers, model, objective, batch_slice(batch, n, some), n)
        own = [alone[e] for e in some.tolist()]
        if together is not None:
            strange |= {k for k, layer in layers.items() if not _reads_its_own(layer, together, own, allowed)}
    return [name for name in layers if name in strange]


def _seen(
    layers: Mapping[str, HookedLayer], model: nn.Module, objective: AbstractObjective, batch: Any, n: int
) -> Seen | None:
    """What layers see; None where the model does not run on it.

    As on a text shorter than a convolution is wide until it is padded, or on a batch that had to be sorted by length.
    """
    try:
        with torch.no_grad(), record_calls(layers, n, _marks) as capture:
            objective.outputs(model, batch)
    except InvalidInput:
        return None
    return capture.seen


def _marks(layer: HookedLayer, number: int, x: Tensor) -> Tensor:
    """A number for every row of an input: a projection of it. Where the axes are few, all numbers."""
    layout = layer.layouts[number] if number < len(layer.layouts) else "shared"
    values = x.detach().abs() if x.is_complex() else x.detach()
    if not values.is_floating_point() or values.dim() < (3 if layout == "second" else 2):
        return values.double()
    return values.double() @ torch.arange(1.0, values.shape[-1] + 1, dtype=torch.float64, device=values.device).cos()


def _reads_its_own(layer: HookedLayer, together: Seen, alone: Sequence[Seen | None], allowed: float) -> bool:
    inputs, n = together.get(layer.name, ()), len(alone)
    calls = len(layer.layouts)
    if len(inputs) != calls or any(one is not None and len(one.get(layer.name, ())) != calls for one in alone):
        return False  # read by some of the examples only
    for call, (layout, marks) in enumerate(zip(layer.layouts, inputs, strict=True)):
        room = allowed * (float(torch.nan_to_num(marks).abs().max()) if marks.numel() else 0.0)
        rows = _rows_of_each(marks, layout, n)
        if rows is None:
            return False
        for row, one in zip(rows, alone, strict=True):
            if one is None:
                continue
            its_own = _rows_of_each(one[layer.name][call], layout, 1)
            if its_own is None or not _agree(row, its_own[0], room):
                return False
    return True


def _rows_of_each(marks: Tensor, layout: Layout, n: int) -> Sequence[Tensor] | None:
    """What belongs to each of n examples; None where it cannot be cut so."""
    if layout == "shared":
        return [marks] * n
    rows = rows_first(marks, layout)
    if layout == "folded" and len(rows) % n == 0:
        return list(rows.reshape(n, -1, *rows.shape[1:]))
    return list(rows) if len(rows) == n else None


def _agree(among: Tensor, alone: Tensor, room: float) -> bool:
    """Whether an example reads the same alone, where it may be padded less, at the beginning or at the end."""
    if among.dim() != alone.dim() or any(x < y for x, y in zip(among.shape, alone.shape, strict=True)):
        return False
    beginning = tuple(slice(0, y) for y in alone.shape)
    end = tuple(slice(x - y, x) for x, y in zip(among.shape, alone.shape, strict=True))
    return any(largest_gap(among[part], alone) <= room for part in (beginning, end))

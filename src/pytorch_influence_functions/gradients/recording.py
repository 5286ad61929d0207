"""One forward pass recorded: module inputs, and the graph edges at module outputs.

Only what per-example gradients need is kept. The backward pass then runs to module *outputs*, never to weights, so no
weight gradient is ever computed: the cost is two thirds of an ordinary training step.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, get_gradient_edge
from torch.utils._python_dispatch import TorchDispatchMode

from ..core.errors import InfluenceError, InvalidInput
from ..linalg.blocks import AbstractBlock, add
from .layer_rules import Layout, ParameterPart, Rule, rows_first
from .vjp import grads


@dataclass(frozen=True)
class HookedLayer:
    """A module with a rule: which blocks it feeds, and where the examples sit at each of its calls."""

    name: str
    module: nn.Module
    rule: Rule
    parts: Mapping[str, ParameterPart]
    layouts: tuple[Layout, ...] = ()

    @property
    def dtype(self) -> torch.dtype:
        """Of its parameters, and so of their gradients."""
        return next(p.dtype for p in self.module.parameters(recurse=False))


@dataclass
class Call:
    """One call of one hooked layer."""

    layer: HookedLayer
    x: Tensor
    version: int
    edge: GradientEdge
    layout: Layout


@dataclass
class Capture:
    """The calls of one forward pass over `n` examples."""

    n: int
    calls: list[Call] = field(default_factory=list)
    seen: dict[str, list[Any]] = field(default_factory=dict)
    """Of every layer, what was looked at of each of its inputs, where only that was asked for."""

    def rows(self, outputs: Tensor, cotangent: Tensor, keep_graph: bool) -> dict[str, AbstractBlock]:
        """Blocks of J_n^T c_n for every layer; `cotangent` has the shape of `outputs`."""
        if not self.calls:
            return {}
        edges = [c.edge for c in self.calls]
        gradients = grads(outputs, edges, cotangent.to(outputs.dtype), retain_graph=keep_graph)
        blocks: dict[str, AbstractBlock] = {}
        for call, g in zip(self.calls, gradients, strict=True):
            if g is None:
                continue
            if call.x._version != call.version:
                raise InfluenceError(
                    f"The input of layer {call.layer.name!r} was changed in place after the layer had read it; "
                    "replace the in-place operation that follows it."
                )
            # Autocast inside forward runs a layer in a narrower type than its weight's.
            x, g = _widen(call.x, call.layer.dtype), _widen(g.detach(), call.layer.dtype)
            x, g = rows_first(x, call.layout), rows_first(g, call.layout)
            if call.layout == "shared":
                x = x.expand(self.n, *x.shape[1:])
            for block, part in call.layer.parts.items():
                rows = call.layer.rule(call.layer.module, x, g, part)
                rows = rows if len(rows) == self.n else rows.fold(self.n)
                blocks[block] = add(blocks[block], rows) if block in blocks else rows
        return blocks


def _widen(values: Tensor, dtype: torch.dtype) -> Tensor:
    return values.to(dtype) if values.is_floating_point() else values


class NarrowestType(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Notes, while open, the narrowest floating point type that any operation gave, and how many numbers all gave.

    A model may run in bfloat16 inside autocast of its own and return float32: two correct computations of its outputs
    then agree to bfloat16 only.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.dtype = torch.float64
        self.numbers = 0

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        # torch would import its compiler, about a second and a half, to keep it out of this function.
        return False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        returned = func(*args, **(kwargs or {}))
        if isinstance(returned, Tensor) and returned.is_floating_point():
            self.dtype = max(self.dtype, returned.dtype, key=lambda dtype: torch.finfo(dtype).eps)
            self.numbers += 0 if func.is_view else returned.numel()
        return returned


def _expand_examples(output: Tensor, n: int) -> Tensor:
    """An output that is the same for all examples, given an axis for them so that its gradient has one too."""
    return output.expand(n, *output.shape[1:])


@contextmanager
def record_calls(
    layers: Mapping[str, HookedLayer], n: int, look: Callable[[HookedLayer, int, Tensor], Any] | None = None
) -> Iterator[Capture]:
    """Hook the layers for the forward passes inside the block; hooks are gone afterwards whatever happens.

    Args:
        layers: with the place of the examples at each call.
        n: how many examples are run.
        look: keep only what this gives of a layer, the number of its call, and its input.

    Raises:
        InvalidInput: a layer does not read the rows that its layout says.
    """
    capture = Capture(n)
    calls: Counter[str] = Counter()
    handles = []

    def hook(layer: HookedLayer) -> Any:
        def record(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
            x = args[0] if args else next(iter(kwargs.values()), None)
            if not isinstance(x, Tensor) or not isinstance(output, Tensor):
                return None
            number, calls[layer.name] = calls[layer.name], calls[layer.name] + 1
            if look is not None:
                capture.seen.setdefault(layer.name, []).append(look(layer, number, x))
                return None
            if not output.requires_grad:
                return None
            layout = _layout_of_call(layer, number, x, n)
            changed = None
            if layout == "shared":
                if x.dim() == 0 or x.shape[0] != 1 or output.shape[0] != 1:
                    x, output = x.unsqueeze(0), output.unsqueeze(0)
                changed = output = _expand_examples(output, n)
            x = x.detach()
            capture.calls.append(Call(layer, x, x._version, get_gradient_edge(output), layout))
            return changed

        return record

    try:
        for layer in layers.values():
            # prepend: a user's own forward hook must not come between the layer and its recorded output
            handles.append(layer.module.register_forward_hook(hook(layer), prepend=True, with_kwargs=True))
        yield capture
    finally:
        for handle in handles:
            handle.remove()


def _layout_of_call(layer: HookedLayer, number: int, x: Tensor, n: int) -> Layout:
    """Where the examples are at this call, as was found on a few of them.

    Raises:
        InvalidInput: they cannot be there, as where a layer reads only those that some condition chooses.
    """
    # A layer that is called once a token is called more often in a batch of longer texts, in the same way. Of rows that
    # are joined, more calls are pieces of them, cut anywhere.
    alike = layer.layouts[:1] if len(set(layer.layouts)) == 1 and layer.layouts[0] != "folded" else ()
    for layout in layer.layouts[number : number + 1] or alike:
        fits = {
            "first": x.dim() > 0 and x.shape[0] == n,
            "second": x.dim() > 1 and x.shape[1] == n,
            "folded": x.dim() > 0 and x.shape[0] % n == 0,
            "shared": True,
        }
        if fits[layout]:
            return layout
    raise InvalidInput(
        f"Call {number + 1} of layer {layer.name!r} read {tuple(x.shape)} for {n} examples, which is not what it reads "
        "for the few it was tried on: which rows it reads depends on what is in a batch, so they cannot be told apart; "
        "ask with method.with_options(route='loop'), one pass per example."
    )

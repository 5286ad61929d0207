"""Nested batches: the tensors inside tuples, named tuples, lists and mappings, tokenizer outputs among them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor


def map_tensors(batch: Any, f: Callable[[Tensor], Any]) -> Any:
    """`batch` with `f` applied to every tensor in it, containers kept; anything else is left as it is."""
    return f(batch) if isinstance(batch, Tensor) else _map_members(batch, lambda x: map_tensors(x, f))


def tensors_of(batch: Any) -> Iterator[tuple[str, Tensor]]:
    """Every tensor in a nested batch, in the order of `map_tensors`, with its place (`"[0]"`, `"['x']"`)."""
    if isinstance(batch, Tensor):
        yield "", batch
    elif isinstance(batch, Mapping):
        for key, value in batch.items():
            yield from ((f"[{key!r}]{inner}", t) for inner, t in tensors_of(value))
    elif isinstance(batch, (tuple, list)):
        for i, value in enumerate(batch):
            yield from ((f"[{i}]{inner}", t) for inner, t in tensors_of(value))


def to_device(batch: Any, device: torch.device | str) -> Any:
    """A nested batch moved whole; objects with a `.to(device)` of their own (packed sequences) are asked."""
    if callable(getattr(batch, "to", None)):
        return batch.to(device)
    return _map_members(batch, lambda x: to_device(x, device))


def batch_slice(batch: Any, n: int, index: slice | Tensor) -> Any:
    """A part of a nested batch of `n` examples: tensors with first dimension `n` are indexed, others kept."""
    return map_tensors(batch, lambda t: t[index] if _runs_over(t, n) else t)


def example_tensors(batch: Any, n: int) -> list[Tensor]:
    """The tensors of a nested batch of `n` examples that have one entry per example."""
    return [t for _, t in tensors_of(batch) if _runs_over(t, n)]


def with_example_tensors(batch: Any, n: int, tensors: Sequence[Tensor]) -> Any:
    """The batch with the tensors that `example_tensors` gave replaced by others, in the same order."""
    remaining = iter(tensors)
    return map_tensors(batch, lambda t: next(remaining) if _runs_over(t, n) else t)


def _runs_over(tensor: Tensor, n: int) -> bool:
    return tensor.dim() > 0 and tensor.shape[0] == n


def _map_members(batch: Any, f: Callable[[Any], Any]) -> Any:
    """A container of the same kind with `f` of each member; anything else as it is."""
    if isinstance(batch, tuple) and hasattr(batch, "_fields"):
        return type(batch)(*map(f, batch))
    if isinstance(batch, (tuple, list)):
        return type(batch)(map(f, batch))
    if isinstance(batch, Mapping):
        members = {key: f(value) for key, value in batch.items()}
        try:
            return type(batch)(members)  # type: ignore[call-arg]
        except Exception:  # a mapping with a constructor of its own
            return members
    return batch

"""Nested batches: the tensors inside tuples, named tuples, lists and mappings, tokenizer outputs among them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, final

import torch
from torch import Tensor


@final
@dataclass(frozen=True, eq=False)
class Collated:
    """A batch that only the collate function understands, with the examples it was made from.

    Bags of words with offsets, lists of images of different sizes, packed sequences and graphs put together as one are
    not cut along a first axis. A part of such a batch is what the collate function makes of the examples in it.

    Args:
        whole: what the model is given.
        items: the examples as the dataset gave them.
        collate: what makes a batch of examples.
        changes: what was done to the batch since: it is done to its parts too.
    """

    whole: Any
    items: tuple[Any, ...]
    collate: Callable[[list[Any]], Any]
    changes: tuple[Callable[[Any], Any], ...] = ()

    def changed(self, change: Callable[[Any], Any]) -> Collated:
        """The batch after a change, such as a move to another device."""
        return replace(self, whole=change(self.whole), changes=(*self.changes, change))

    def part(self, index: slice | Tensor) -> Collated:
        """Some of its examples, collated by themselves.

        Not kept: what is collated inside a transform of `torch.func` cannot be used outside of it.
        """
        chosen = torch.arange(len(self.items))[index.cpu() if isinstance(index, Tensor) else index].tolist()
        items = tuple(self.items[i] for i in chosen)
        whole = self.collate(list(items))
        for change in self.changes:
            whole = change(whole)
        return replace(self, whole=whole, items=items)


def whole_batch(batch: Any) -> Any:
    """The batch as the collate function made it."""
    return batch.whole if isinstance(batch, Collated) else batch


def map_tensors(batch: Any, f: Callable[[Tensor], Any]) -> Any:
    """`batch` with `f` applied to every tensor in it, containers kept; anything else is left as it is."""
    if isinstance(batch, Collated):
        return batch.changed(lambda whole: map_tensors(whole, f))
    return f(batch) if isinstance(batch, Tensor) else _map_members(batch, lambda x: map_tensors(x, f))


def tensors_of(batch: Any) -> Iterator[tuple[str, Tensor]]:
    """Every tensor in a nested batch, in the order of `map_tensors`, with its place (`"[0]"`, `"['x']"`)."""
    if isinstance(batch, Collated):
        yield from tensors_of(batch.whole)
    elif isinstance(batch, Tensor):
        yield "", batch
    elif isinstance(batch, Mapping):
        for key, value in batch.items():
            yield from ((f"[{key!r}]{inner}", t) for inner, t in tensors_of(value))
    elif isinstance(batch, (tuple, list)):
        for i, value in enumerate(batch):
            yield from ((f"[{i}]{inner}", t) for inner, t in tensors_of(value))


def to_device(batch: Any, device: torch.device | str) -> Any:
    """A nested batch moved whole; objects with a `.to(device)` of their own (packed sequences) are asked."""
    if isinstance(batch, Collated):
        return batch.changed(lambda whole: to_device(whole, device))
    if callable(getattr(batch, "to", None)):
        return batch.to(device)
    return _map_members(batch, lambda x: to_device(x, device))


def batch_slice(batch: Any, n: int, index: slice | Tensor) -> Any:
    """A part of a nested batch of `n` examples: tensors with first dimension `n` are indexed, others kept.

    A batch that cannot be cut so is collated again from the examples of the part.
    """
    if isinstance(batch, Collated):
        return batch.part(index)
    return map_tensors(batch, lambda t: t[index] if _runs_over(t, n) else t)


def example_tensors(batch: Any, n: int) -> list[Tensor]:
    """The tensors of a nested batch of `n` examples that have one entry per example; none where it cannot be cut."""
    if isinstance(batch, Collated):
        return []
    return [t for _, t in tensors_of(batch) if _runs_over(t, n)]


def with_example_tensors(batch: Any, n: int, tensors: Sequence[Tensor]) -> Any:
    """The batch with the tensors that `example_tensors` gave replaced by others, in the same order."""
    if isinstance(batch, Collated):
        return batch
    remaining = iter(tensors)
    return map_tensors(batch, lambda t: next(remaining) if _runs_over(t, n) else t)


def count_examples(batch: Any, targets: Any) -> int:
    """How many examples a batch holds: as many as its targets, else as its first tensor has rows."""
    if isinstance(batch, Collated):
        return len(batch.items)
    sized = [t for part in (targets, batch) for _, t in tensors_of(part) if t.dim() > 0]
    return int(sized[0].shape[0]) if sized else 1


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

"""Data that can only be iterated, read once into memory."""

from __future__ import annotations

from itertools import islice
from typing import Any, Final

from torch.utils.data import DataLoader

from ..core.errors import InvalidInput

MOST: Final = 100_000
"""The most examples that are read from a stream, which says neither how many it holds nor whether it ends."""


def only_iterates(data: Any) -> bool:
    """Whether data have no length or no index, as an `IterableDataset` or a generator."""
    return hasattr(data, "__iter__") and not (hasattr(data, "__len__") and hasattr(data, "__getitem__"))


def read_stream(data: Any) -> list[Any]:
    """The examples of a stream, in its order, as plain Python objects.

    Args:
        data: an `IterableDataset` of datasets or torch, a generator, or anything else that can be iterated.

    Raises:
        InvalidInput: there are more than `MOST`, or none, or batches of a loader in their place.
    """
    if isinstance(data, DataLoader):
        raise InvalidInput(
            "A DataLoader gives batches, and texts are encoded one by one; pass its dataset, loader.dataset, or of "
            "tokenised batches ptif.attribute(model, loader, queries)."
        )
    plain = data.with_format(None) if callable(getattr(data, "with_format", None)) else data
    examples = list(islice(iter(plain), MOST + 1))
    if len(examples) > MOST:
        raise InvalidInput(
            f"{type(data).__name__} can only be iterated and goes on after {MOST:,} examples, the most that are read "
            "from what may have no end; pass a list of as many as fit in memory, list(itertools.islice(dataset, n))."
        )
    if not examples:
        raise InvalidInput(f"{type(data).__name__} gives no example; one that was read before may be used up.")
    return examples


def refuse_trainers_stream(data: Any) -> None:
    """Refuse a Trainer's data that can only be iterated: how many of them training saw, nobody says.

    Args:
        data: the Trainer's.

    Raises:
        InvalidInput: they can only be iterated.
    """
    if only_iterates(data):
        raise InvalidInput(
            f"The Trainer's data, a {type(data).__name__}, can only be iterated, but examples are named by index; pass "
            "list(dataset.take(n)) of those that training saw, as many as fit in memory, as dataset=."
        )

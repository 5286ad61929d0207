"""Reading batches of a dataset: errors name the item, workers stay alive, and small data are read once in a call."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import torch
from jaxtyping import Int
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, default_collate

from ..core.batches import Collated, map_tensors, tensors_of
from ..core.errors import InfluenceError, InvalidInput, first_line
from .samplers import SampledSubset
from .session import open_session

Collate: TypeAlias = Callable[[list[Any]], Any]

# Bytes of batches that are held while a public call lasts.
_HELD_BYTES = 256 << 20


@dataclass(frozen=True, eq=False)
class NamingDataset(Dataset[Any]):
    """The user's dataset, with errors that say which item could not be read."""

    dataset: Any

    def _name(self, index: int) -> int:
        return int(self.dataset.indices[index]) if type(self.dataset) is SampledSubset else index

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> Any:
        try:
            return self.dataset[index]
        except InfluenceError:  # a sentence already
            raise
        except Exception as cause:
            reason = f"{type(cause).__name__}: {first_line(cause)}"
            raise InvalidInput(f"Reading item {self._name(index)} of the dataset failed with {reason}.") from cause

    def __getitems__(self, ids: list[int]) -> list[Any]:
        if callable(getattr(self.dataset, "__getitems__", None)):
            try:
                return list(self.dataset.__getitems__(ids))
            except Exception:
                # Read one by one, to find out and say which item it was.
                pass
        return [self[i] for i in ids]


@dataclass(frozen=True, eq=False)
class NamingCollate:
    """The user's collate function, with errors that say what was given to it; `keep_items`: returned beside the batch.

    They come as a pair, because what a worker process returns must be made of data alone.
    """

    collate: Collate
    keep_items: bool = False

    def __call__(self, items: list[Any]) -> Any:
        batch = self._collate(items)
        return (batch, items) if self.keep_items else batch

    def _collate(self, items: list[Any]) -> Any:
        if self.collate is default_collate and (place := _list_in(items[0])):
            raise InvalidInput(
                f"The examples hold a Python list ({place}), which the default collate function would turn around; "
                "give tensors (a dataset of Hugging Face: dataset.with_format('torch')), or a DataLoader whose "
                "collate_fn makes tensors and pads them."
            )
        try:
            return self.collate(items)
        except InvalidInput:  # says itself what to do
            raise
        except Exception as cause:
            raise InvalidInput(
                f"The collate function failed on {len(items)} examples with {type(cause).__name__}: "
                f"{first_line(cause)}; give examples of one shape, tensors or arrays (x, y), or a DataLoader whose "
                "collate_fn pads them."
            ) from cause


def _list_in(item: Any) -> str:
    """Where an example holds a list of numbers, in words; empty where it does not."""
    members = item.items() if isinstance(item, Mapping) else enumerate(item) if isinstance(item, tuple) else ()
    for place, value in members:
        if type(value) is list and value and isinstance(value[0], (int, float)):
            return f"under {place!r}" if isinstance(place, str) else f"as member {place}"
    return ""


@dataclass(eq=False)
class _Plan:
    """The batches of the sweep under way: what a loader whose workers stay alive takes for its batch sampler."""

    batches: list[list[int]] = field(default_factory=list)

    def __iter__(self) -> Iterator[list[int]]:
        return iter(self.batches)

    def __len__(self) -> int:
        return len(self.batches)


@dataclass(eq=False)
class _Workers:
    """A loader whose worker processes live until the session ends."""

    loader: DataLoader[Any]
    plan: _Plan
    busy: bool = False


@dataclass(eq=False)
class _Held:
    """Batches that were read in this session, by what was read."""

    batches: dict[tuple[int, int, bytes], tuple[Any, Any]] = field(default_factory=dict)
    bytes: int = 0


@dataclass(frozen=True, eq=False)
class Reader:
    """How batches of a dataset are read.

    While a public call lasts, worker processes are kept for the next sweep, and batches for the sweep that asks for
    the same ones, up to a bound: an iterative solve passes over the data dozens of times.
    """

    dataset: Any
    collate: Collate
    num_workers: int = 0
    options: Mapping[str, Any] = field(default_factory=dict)
    keep_items: bool = False
    """Whether items come with their batch, which cannot be cut by its rows."""

    def read(self, plan: Sequence[Int[Tensor, "_"]], hold: bool = True) -> Iterator[tuple[Int[Tensor, "_"], Any]]:
        """Yield `(ids, batch)` for each list of indices.

        Args:
            plan: the indices of every batch.
            hold: whether a batch may be kept, and one that was kept be given.

        Raises:
            InvalidInput: an item cannot be read, or a batch not collated; the item is named.
        """
        session = open_session()
        hold = hold and not self.keep_items
        held = session.setdefault("held", _Held()) if session is not None and hold else None
        known = {} if held is None else {i: b for i, ids in enumerate(plan) if (b := self._held(held, ids)) is not None}
        loaded = self._load([ids for i, ids in enumerate(plan) if i not in known])
        for i, ids in enumerate(plan):
            if i in known:
                # A model may change its input in place.
                yield ids, map_tensors(known[i], Tensor.clone)
                continue
            batch = next(loaded)
            if held is not None:
                self._keep(held, ids, batch)
            yield ids, batch
        # The loader is told that nothing more is asked.
        for _ in loaded:
            pass

    def _key(self, ids: Tensor) -> tuple[int, int, bytes]:
        return id(self.dataset), id(self.collate), ids.numpy().tobytes()

    def _held(self, held: _Held, ids: Tensor) -> Any | None:
        entry = held.batches.get(self._key(ids))
        return None if entry is None else entry[1]

    def _keep(self, held: _Held, ids: Tensor, batch: Any) -> None:
        size = sum(tensor.numel() * tensor.element_size() for _, tensor in tensors_of(batch))
        if 0 < size <= _HELD_BYTES - held.bytes:
            # With what the key is made of: an object that is gone could give its number to another one.
            held.batches[self._key(ids)] = (self.dataset, self.collate), map_tensors(batch, Tensor.clone)
            held.bytes += size

    def _load(self, plan: Sequence[Tensor]) -> Iterator[Any]:
        if not plan:
            return
        workers = self._workers()
        workers.busy, workers.plan.batches = True, [ids.tolist() for ids in plan]
        try:
            for batch in workers.loader:
                if self.keep_items:
                    whole, items = batch
                    yield Collated(whole, tuple(items), NamingCollate(self.collate))
                else:
                    yield batch
        except InvalidInput as error:
            # From a worker process the sentence comes inside a traceback, as its last line.
            message = str(error)
            if not message.startswith("Caught InvalidInput in DataLoader worker"):
                raise
            raise InvalidInput(message.strip().splitlines()[-1].split(f"{InvalidInput.__name__}: ", 1)[-1]) from None
        finally:
            workers.busy = False

    def _workers(self) -> _Workers:
        """The loader of this session; a new one where there is none, or where another sweep is under way on it."""
        session = open_session() if self.num_workers else None
        if session is None:
            return self._start(persistent=False)
        key = ("workers", id(self.dataset), id(self.collate))
        kept: _Workers | None = session.get(key)
        if kept is None:
            kept = session[key] = self._start(persistent=True)
        return self._start(persistent=False) if kept.busy else kept

    def _start(self, persistent: bool) -> _Workers:
        plan = _Plan()
        loader = DataLoader(
            NamingDataset(self.dataset),
            batch_sampler=plan,
            collate_fn=NamingCollate(self.collate, self.keep_items),
            num_workers=self.num_workers,
            persistent_workers=persistent,
            generator=torch.Generator().manual_seed(0),
            **self.options,
        )
        return _Workers(loader, plan)

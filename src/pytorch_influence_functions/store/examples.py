"""The examples an index is made of: data by index or data that can only be iterated, shard by shard, with digests."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import islice
from typing import Any, Final, cast, final

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset

from ..core.batches import Collated, tensors_of, whole_batch
from ..core.digest import digest, tensor_bytes
from ..core.errors import InvalidInput
from ..core.indexing import spread_sample
from ..gradients.sketches import random_words
from ..problem.data import Source
from ..problem.ingredients import seeded

# Bytes of the words that digests are made from.
_WORD: Final = 4
# Examples of a file whose own digests are kept, by which other data are told later, and the most that are compared.
_KEPT: Final = 16
COMPARED: Final = 64


@final
@dataclass(frozen=True, eq=False)
class ShardSource:
    """The examples of one shard.

    Args:
        source: what holds them.
        ids: their places in `source`.
    """

    source: Source
    ids: Int[Tensor, " n"]


@final
@dataclass(frozen=True, eq=False)
class Examples:
    """Data to be indexed; `count` is None where it can only be iterated."""

    source: Source | None
    stream: Iterable[Any] | None
    like: Source

    @staticmethod
    def of(data: Any, like: Source) -> Examples:
        """Read nothing yet.

        Args:
            data: what `Source.of` takes, an `IterableDataset`, a loader of one, or any iterable of examples; None:
                `like`.
            like: whose collate function and batch size examples of a stream get.

        Raises:
            InvalidInput: a loader's sampler draws a part of its dataset.
        """
        if data is None:
            data = like
        loader = data if isinstance(data, DataLoader) else None
        inner: Any = data if loader is None else loader.dataset
        streams = isinstance(inner, IterableDataset) or (
            hasattr(inner, "__iter__") and not hasattr(inner, "__getitem__") and not isinstance(inner, Source)
        )
        if streams:
            if loader is not None:
                like = replace(like, collate=loader.collate_fn, batch_size=loader.batch_size or like.batch_size)
            return Examples(None, inner, like)
        source = data if isinstance(data, Source) else _read_as(like, data)
        if source.positions is not None:
            raise InvalidInput(
                "The loader's sampler draws a part of its dataset, and an index names examples by their place in what "
                "it was given; pass torch.utils.data.Subset(dataset, indices), or the whole dataset."
            )
        return Examples(source, None, source)

    @property
    def count(self) -> int | None:
        """How many there are, where that is known."""
        return None if self.source is None else len(self.source)

    def shards(self, size: int) -> Iterator[ShardSource]:
        """All examples in order, `size` at a time."""
        if self.source is not None:
            for first in range(0, len(self.source), size):
                yield ShardSource(self.source, torch.arange(first, min(first + size, len(self.source))))
            return
        assert self.stream is not None
        remaining = iter(self.stream)
        while part := list(islice(remaining, size)):
            yield ShardSource(self._listed(part), torch.arange(len(part)))

    def _listed(self, part: list[Any]) -> Source:
        like, source = self.like, _read_as(self.like, part)
        return replace(source, collate=like.collate, batch_size=like.batch_size, fixed=like.fixed)


def _read_as(like: Source, data: Any) -> Source:
    """Data by index; texts and rows of them are encoded as those of the problem were."""
    encode = getattr(like.dataset, "encode", None) if like.ask is not None else None
    if encode is None or isinstance(data, DataLoader) or _is_item(data[0], like.dataset[0]):
        return like.read_alike(data, like.batch_size if like.fixed else None)
    return replace(like, dataset=encode(data), reading="", _determinism={})


def _is_item(first: Any, known: Any) -> bool:
    """Whether an example has the form of one that is encoded already."""
    return isinstance(first, Mapping) and all(isinstance(first.get(name), Tensor) for name in known)


def sample_digests(source: Source, ids: Int[Tensor, " n"], most: int = _KEPT) -> list[tuple[int, str]]:
    """(place in `ids`, digest) of some examples.

    Args:
        source: what holds the examples.
        ids: which ones these stand for.
        most: how many.
    """
    places = spread_sample(len(ids), most)
    return list(zip(places.tolist(), digest_alone(source, ids[places]), strict=True))


def digest_alone(source: Source, ids: Int[Tensor, " n"]) -> list[str]:
    """A digest of every example read and collated by itself, so that no batch, padding or precision counts.

    Args:
        source: what holds the examples.
        ids: which ones.
    """
    alone = replace(source, num_workers=0, worker_options={})
    with seeded():
        return [
            _digest_single(whole_batch(batch)) for _, batch in alone.load([ids[k : k + 1] for k in range(len(ids))])
        ]


def _digest_single(batch: Any) -> str:
    """Of all tensors, real numbers in float32: arrays are often in float64 for no reason."""
    tensors = {
        where: tensor.detach().float() if tensor.dtype == torch.float64 else tensor.detach()
        for where, tensor in tensors_of(batch)
    }
    return digest(tensors or batch)[:16]


def hash_examples(batch: Any, n: int) -> Int[Tensor, " n"]:
    """A digest of 64 bits of every example of a batch: of what the model is given of it."""
    if isinstance(batch, Collated):
        hashes = [hashlib.blake2b(digest(item).encode(), digest_size=8).digest() for item in batch.items]
        return torch.tensor([int.from_bytes(h, "little", signed=True) for h in hashes], dtype=torch.long)
    total = np.zeros(n, np.uint64)
    for where, tensor in tensors_of(batch):
        if tensor.shape[:1] == (n,) and tensor.numel():
            total += _hash_rows(where, tensor.detach())
    return torch.from_numpy(total.view(np.int64))


def _hash_rows(where: str, rows: Tensor) -> np.ndarray[tuple[int], np.dtype[np.uint64]]:
    """sum_k r_k w_k mod 2^64 over the words w_k of 32 bits of every row, with odd random numbers r_k.

    Another value of any one word is always noticed, of several with a chance of 1 - 2^-32 at least (multilinear
    hashing, Lemire & Kaser 2014). One product per word: digests made for cryptography would take longer than the
    gradients of a perceptron.
    """
    content = np.frombuffer(tensor_bytes(rows), np.uint8).reshape(len(rows), -1)
    short = -content.shape[1] % _WORD
    if short:
        content = np.pad(content, ((0, 0), (0, short)))
    words = content.view("<u4")
    start = random_words(1, "place", where, rows.dtype, tuple(rows.shape[1:]))
    factors = _factors(where, words.shape[1])
    total = np.einsum("nk,k->n", words, factors, dtype=np.uint64, casting="unsafe") + start
    return cast("np.ndarray[tuple[int], np.dtype[np.uint64]]", total)


@lru_cache(maxsize=16)
def _factors(where: str, count: int) -> np.ndarray[tuple[int], np.dtype[np.uint64]]:
    factors = random_words(count, "digest of an example", where)
    factors |= np.uint64(1)
    return factors

"""Taking examples out: masked at once, and their bytes freed by compaction."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from ..core.errors import InvalidInput, name_ids
from .filters import mask_of
from .folder import IndexFolder, writing
from .manifest import Shard, ranges_of
from .shard_files import write_file


def remove(folder: IndexFolder, ids: Any) -> IndexFolder:
    """Let examples count no longer.

    Args:
        folder: the index.
        ids: positions of the examples, one position, a slice, or a mask over all of them.

    Raises:
        InvalidInput: none is given, or one is outside or was removed before.
    """
    if not isinstance(ids, (slice, Tensor)):
        ids = [ids] if isinstance(ids, int) else list(ids) if isinstance(ids, Iterable) else ids
    alive = folder.manifest.mask()
    asked = mask_of(ids, len(alive))
    gone = (asked & ~alive).nonzero().flatten().tolist()
    if gone and not isinstance(ids, slice):
        raise InvalidInput(
            f"Example {name_ids(gone)} was removed from the index before; name only what it still holds."
        )
    chosen = asked & alive
    if not bool(chosen.any()):
        raise InvalidInput("No example was named that the index still holds; name at least one to remove.")
    with writing(folder.path):
        opened = IndexFolder.open(folder.path, folder.check)
        opened.write(opened.manifest.without(chosen.nonzero().flatten().tolist()))
    return opened


def compact(folder: IndexFolder) -> IndexFolder:
    """Drop the rows of removed examples, shard by shard; the other rows keep their bytes and their examples' numbers.

    Killed in between, the folder holds either the old shards or the new ones.

    Args:
        folder: the index.
    """
    with writing(folder.path):
        opened = IndexFolder.open(folder.path, folder.check)
        mask = opened.manifest.mask()
        shards = tuple(_compacted(opened, shard, mask[shard.ids]) for shard in opened.manifest.shards)
        opened.write(opened.manifest.with_shards(shards))
        opened.drop_unlisted()
    return opened


def _compacted(opened: IndexFolder, shard: Shard, kept: torch.Tensor) -> Shard:
    if bool(kept.all()):
        return shard
    file = opened.read(shard.file)
    tensors = {name: tensor[kept] for name, tensor in file.tensors.items()}
    stored = write_file(opened.path, f"rows-{shard.first:012d}-{shard.stop:012d}", tensors, file.record)
    return Shard(stored, shard.first, shard.stop, ranges_of(shard.ids[kept].tolist()), shard.sample)

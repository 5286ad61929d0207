"""Compaction: shards written anew without the rows that were removed."""

from __future__ import annotations

from dataclasses import replace

from .folder import IndexFolder
from .manifest import Shard, ranges_of
from .shard_files import write_file


def compact(opened: IndexFolder) -> int:
    """Drop the rows of removed examples, shard by shard; the other rows keep their bytes and their examples' numbers.

    Killed in between, the folder holds either the old shards or the new ones.

    Returns:
        How many bytes were freed.
    """
    mask, before = opened.manifest.mask(), opened.manifest.bytes
    shards: list[Shard] = []
    for shard in opened.manifest.shards:
        kept = mask[shard.ids]
        if bool(kept.all()):
            shards.append(shard)
            continue
        ids = shard.ids[kept]
        file = opened.read(shard.file)
        tensors = {name: tensor[kept] for name, tensor in file.tensors.items()}
        stored = write_file(opened.path, f"rows-{shard.first:012d}-{shard.stop:012d}", tensors, file.record)
        shards.append(Shard(stored, shard.first, shard.stop, ranges_of(ids.tolist())))
    opened.write(replace(opened.manifest, shards=tuple(shards)))
    opened.drop_unlisted()
    return before - opened.manifest.bytes

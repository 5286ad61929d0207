"""Solved queries that together have no room in memory: on disk, read layer by layer, so that all share one pass."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import final

import torch
from torch import Tensor

from ..core.temporary_folder import TemporaryFolder
from ..linalg.on_disk import OnDisk, append_rows
from ..linalg.rows import Rows
from ..linalg.space import Space


@final
@dataclass(eq=False)
class QueryStore:
    """A temporary folder with one file per block; `rows()` gives what was added, as rows that are read when used.

    Reading a language model's solved query takes a small part of what another pass over the training data does.
    """

    space: Space
    folder: TemporaryFolder
    ids: list[Tensor] = field(default_factory=list)
    _like: Tensor = field(default_factory=lambda: torch.zeros(0))

    @staticmethod
    def of(space: Space, count: int, number_bytes: int) -> QueryStore:
        """Room for `count` vectors.

        Raises:
            TooLarge: the disk has no room for them.
        """
        size = float(space.size) * count * number_bytes
        way_out = "ask fewer queries at once, or raise the bound with memory="
        return QueryStore(space, TemporaryFolder(size, f"{count} solved queries", way_out))

    def add(self, ids: Tensor, rows: Rows) -> None:
        """Write solved queries behind those that are there."""
        self.ids.append(ids)
        for number, name in enumerate(self.space.blocks):
            block = rows.blocks[name]
            self._like = block.reference.new_empty(0)
            append_rows(self.folder.path / str(number), block.dense())

    def rows(self) -> Rows:
        """All of them, in the order in which they came."""
        count = sum(map(len, self.ids))
        blocks: Mapping[str, OnDisk] = {
            name: OnDisk(self.folder.path / str(number), count, spec.shape, self._like)
            for number, (name, spec) in enumerate(self.space.blocks.items())
        }
        return _Kept(blocks, self.folder)


@final
@dataclass(frozen=True, eq=False)
class _Kept(Rows):
    """Rows that keep their folder alive."""

    folder: TemporaryFolder

"""Rows of one block that lie in a file and are read whenever they are multiplied."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, final

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from ..core.files import append_scratch
from .blocks import AbstractBlock, Dense
from .chunks import chunks

# Numbers that are read at once.
_READ = 1 << 27


@final
@dataclass(frozen=True, eq=False)
class OnDisk(AbstractBlock):
    """`count` rows written out one after the other in the file `path`, as numbers of the dtype of `like`."""

    read_when_used: ClassVar[bool] = True

    path: Path
    count: int
    row_shape: tuple[int, ...]
    like: Tensor
    """An empty tensor: tells dtype and device."""

    @property
    def shape(self) -> tuple[int, ...]:
        return self.row_shape

    @property
    def reference(self) -> Tensor:
        return self.like

    @property
    def numbers(self) -> int:
        return self.count * int(torch.Size(self.row_shape).numel())

    def __len__(self) -> int:
        return self.count

    def dense(self) -> Tensor:
        return self._read(slice(0, self.count))

    def pieces(self) -> Iterator[Dense]:
        """All rows in order, as many at once as memory is asked for."""
        for part in chunks(self.count, int(torch.Size(self.row_shape).numel()), _READ):
            yield Dense(self._read(part))

    def take(self, index: Tensor | slice) -> Dense:
        if isinstance(index, slice) and index.step in (None, 1):
            start, stop, _ = index.indices(self.count)
            return Dense(self._read(slice(start, max(start, stop))))
        return Dense(self.dense()[index])

    def scale(self, factor: Tensor | float) -> Dense:
        return Dense(self.dense()).scale(factor)

    def to(self, dtype: torch.dtype) -> Dense:
        return Dense(self.dense().to(dtype))

    def sums(self) -> Float[Tensor, " n"]:
        return torch.cat([piece.sums() for piece in self.pieces()])

    def _read(self, part: slice) -> Tensor:
        each = int(torch.Size(self.row_shape).numel()) * self.like.element_size()
        count = part.stop - part.start
        raw = np.fromfile(self.path, dtype=np.uint8, count=count * each, offset=part.start * each)
        return torch.from_numpy(raw).view(self.like.dtype).reshape(count, *self.row_shape).to(self.like.device)


def append_rows(path: Path, values: Tensor) -> None:
    """Write rows [n, ...] behind those that the file has."""
    append_scratch(path, values.detach().contiguous().cpu().flatten().view(torch.uint8).numpy().data)

"""The gradients of an index of factors, read back as they were taken."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from typing import final

from jaxtyping import Int
from torch import Tensor

from ..core.errors import InvalidInput, name_ids
from ..linalg.rows import Rows
from ..linalg.space import Space
from .build import representation_of
from .codecs import CODECS
from .fitted_basis import FittedBasis
from .folder import IndexFolder
from .layouts import FactorLayout
from .representation import Factors
from .search import StoredRows


@final
@dataclass(frozen=True, eq=False)
class StoredGradients:
    """Rows on the CPU, in factors.

    Args:
        folder: the index.
        layout: how its rows are stored.
    """

    folder: IndexFolder
    layout: FactorLayout

    @staticmethod
    def open(path: str | os.PathLike[str]) -> StoredGradients:
        """Of the index in a folder.

        Raises:
            InvalidInput: there is none, it was not built to its end, or it holds projected gradients.
        """
        folder = IndexFolder.open(path)
        manifest, where = folder.manifest, os.fspath(path)
        representation = representation_of(manifest)
        if not isinstance(representation, Factors):
            raise InvalidInput(
                f"The index in {where!r} keeps {representation!r}, from which no gradient can be read back; build one "
                "with representation=Factors()."
            )
        if not manifest.complete:
            raise InvalidInput(f"The index in {where!r} was not built to its end; build it again, which goes on.")
        fitted = FittedBasis.from_file(folder.read(manifest.basis), representation)
        return StoredGradients(folder, FactorLayout(fitted.basis, CODECS[manifest.facts["dtype"]]))

    def __len__(self) -> int:
        """How many examples have been given, removed ones included."""
        return self.folder.manifest.examples

    @property
    def space(self) -> Space:
        """Of the rows."""
        return self.layout.basis.space

    @property
    def names(self) -> list[str]:
        """The parameters, in the model's order."""
        return list(self.folder.manifest.facts["parameters"])

    def stream(self) -> Iterator[tuple[Int[Tensor, " n"], Rows]]:
        """(examples, their gradients), in order, without those that were removed."""
        for part in StoredRows(self.folder, self.layout, self.folder.manifest.mask()).parts():
            rows = self.layout.rows(part.stored, part.forms)
            yield (part.ids, rows) if part.kept is None else (part.ids[part.kept], rows.take(part.kept))

    def row(self, example: int) -> Rows:
        """The gradient of one example.

        Args:
            example: its position.

        Raises:
            InvalidInput: it is not stored.
        """
        for shard in self.folder.manifest.shards:
            if shard.first <= example < shard.stop:
                place = (shard.ids == example).nonzero().flatten()
                if len(place):
                    file, chunk = self.folder.read(shard.file), slice(int(place), int(place) + 1)
                    stored = {name: tensor[chunk] for name, tensor in file.tensors.items()}
                    return self.layout.rows(stored, file.record["forms"])
        raise InvalidInput(
            f"The index in {os.fspath(self.folder.path)!r} holds no gradient of example {name_ids([example])}."
        )

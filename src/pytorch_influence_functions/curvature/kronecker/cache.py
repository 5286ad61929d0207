"""Factors on disk: one safetensors file per block, written as it is finished, found again by what it was made from."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, final

import torch
from torch import Tensor

from ...core.cache_folder import CacheFolder
from ...core.errors import InvalidInput
from ...core.files import read_tensors, write_tensors
from ...core.fingerprint import Fingerprint
from ...core.temporary_folder import TemporaryFolder
from ...gradients.per_example import Derivatives
from ...linalg.kronecker import KroneckerBlock
from ...problem.checkpoints import Checkpoint
from ...problem.ingredients import describe_model, digest_data
from ..base import Budget

_KIND: Final = "curvature factors"
_SIDES: Final = ("left_values", "right_values")


def fingerprint_factors(
    settings: Mapping[str, Any], derivatives: Derivatives, checkpoints: Sequence[Checkpoint | None], ids: Tensor
) -> Fingerprint:
    """What factors are made from.

    Cost: the examples `ids`, on which factors are measured, are read once; see `describe_model` for the probe.
    """
    problem = derivatives.problem
    model, probes = describe_model(problem, checkpoints)
    ingredients = model | {
        "loss": derivatives.objective,
        "training data": [ids, digest_data(problem.data, ids, "reading the data for a fingerprint")],
        "parameters": [(b.name, b.parameters, b.shape, b.transposed) for b in derivatives.space.blocks.values()],
        "settings": settings,
    }
    return Fingerprint.of(ingredients, probes)


@final
@dataclass(frozen=True, eq=False)
class FactorCache:
    """Where the blocks of one fit are kept, finished or not."""

    place: CacheFolder
    names: tuple[str, ...]
    device: torch.device
    own: TemporaryFolder | None = None
    """The temporary folder that the blocks lie in, where no other was asked for; it goes when nobody needs it."""
    notes: tuple[str, ...] = ()
    """Sentences that belong to the result."""

    @staticmethod
    def temporary(size: int, budget: Budget, names: tuple[str, ...], device: torch.device) -> FactorCache:
        """A place for blocks of so many bytes in all, which are more than the budget: until the fit is let go.

        Raises:
            TooLarge: the disk has no room for them.
        """
        way_out = "give folder=path on a larger disk, select fewer parameters, or raise the bound with memory="
        own = TemporaryFolder(size, "The Kronecker factors", way_out)
        note = (
            f"the Kronecker factors take {size / 2**30:.2g} GiB, above the bound of {budget.bytes / 2**30:.2g} GiB: "
            "they were fitted in turn and lie in a temporary folder (give folder=path to keep them, or raise memory=)"
        )
        return FactorCache(CacheFolder(own.path, "temporary"), names, device, own, (note,))

    @staticmethod
    def of(
        folder: str | os.PathLike[str], fingerprint: Fingerprint, names: tuple[str, ...], device: torch.device
    ) -> FactorCache:
        """The place under `folder` of the fit with this fingerprint; made if it is not there.

        Raises:
            InvalidInput: the folder cannot be made.
        """
        place = CacheFolder.of(folder, fingerprint)
        return FactorCache(place, names, device, notes=place.notes)

    def path(self, name: str) -> Path:
        """The file of one block."""
        return self.place.path / f"{hashlib.sha256(name.encode()).hexdigest()[:20]}.safetensors"

    def finished(self) -> Iterator[tuple[str, KroneckerBlock]]:
        """The blocks that are there and undamaged, by name; each is read and verified as it is asked for."""
        for name in self.names:
            with suppress(InvalidInput):  # not there yet, or to be fitted again
                yield name, self.read(name)

    def write(self, name: str, block: KroneckerBlock) -> None:
        """Keep one finished block, whole or not at all."""
        parts = {"left": block.left, "right": block.right, "values": block.values}
        parts |= dict(zip(_SIDES, block.sides or (None, None), strict=True))
        tensors = {key: tensor for key, tensor in parts.items() if tensor is not None}
        write_tensors(self.path(name), _KIND, tensors, self._record(name))

    def _record(self, name: str) -> dict[str, str]:
        return {"block": name, "fingerprint": self.place.identity}

    def read(self, name: str) -> KroneckerBlock:
        """One finished block.

        Raises:
            InvalidInput: there is none, it is damaged, or it belongs to another fit.
        """
        path = self.path(name)
        tensors, record = read_tensors(path, _KIND, cure="remove it and fit again")
        if record != self._record(name) or "values" not in tensors:
            raise InvalidInput(
                f"{str(path)!r} holds a block of another fit, not {name!r} of this one; remove it and fit again."
            )
        tensors = {key: tensor.to(self.device) for key, tensor in tensors.items()}
        sides = (tensors[_SIDES[0]], tensors[_SIDES[1]]) if _SIDES[0] in tensors else None
        return KroneckerBlock(tensors.get("left"), tensors.get("right"), tensors["values"], sides)

    def blocks(self) -> Mapping[str, KroneckerBlock]:
        """All blocks, once they are finished; each is read when it is asked for and not kept."""
        return _OnDisk(self)


@final
@dataclass(frozen=True, eq=False)
class _OnDisk(Mapping[str, KroneckerBlock]):
    cache: FactorCache

    def __getitem__(self, name: str) -> KroneckerBlock:
        if name not in self.cache.names:
            raise KeyError(name)
        return self.cache.read(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self.cache.names)

    def __len__(self) -> int:
        return len(self.cache.names)

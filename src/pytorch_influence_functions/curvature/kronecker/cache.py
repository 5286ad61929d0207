"""Factors on disk: one safetensors file per block, written as it is finished, found again by what it was made from."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, final

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from ..._version import __version__
from ...core.batches import tensors_of
from ...core.distributed import World
from ...core.errors import InvalidInput
from ...gradients.per_example import Derivatives
from ...linalg.kronecker import KroneckerBlock
from ...problem.problem import sweep

_FORMAT = "ptif-kronecker-1"
_SIDES = ("left_values", "right_values")


def fingerprint(settings: str, derivatives: list[Derivatives], states: list[Mapping[str, Tensor]], ids: Tensor) -> str:
    """A hash of everything the factors depend on: settings, weights, objective, blocks, and the examples themselves."""
    made = hashlib.sha256()
    problem = derivatives[0].problem
    layout = [(b.name, b.parameters, b.shape, b.transposed) for b in derivatives[0].space.blocks.values()]
    for words in (_FORMAT, __version__, settings, repr(derivatives[0].objective), repr(layout), repr(ids.tolist())):
        made.update(words.encode())
        made.update(b"\0")
    for state in states:
        for name, tensor in sorted(state.items()):
            made.update(name.encode())
            _absorb(made, tensor)
    for _, batch in sweep(problem, ids=ids, label="fingerprint", world=World()):
        for name, tensor in tensors_of(batch):
            made.update(str(name).encode())
            _absorb(made, tensor)
    return made.hexdigest()


def _absorb(made: Any, tensor: Tensor) -> None:
    made.update(f"{tensor.dtype} {tuple(tensor.shape)}".encode())
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    made.update(flat.view(torch.uint8).numpy().tobytes())


@final
@dataclass(frozen=True, eq=False)
class Shelf:
    """Where the blocks of one fit are kept, finished or not."""

    folder: Path
    names: tuple[str, ...]

    @staticmethod
    def at(folder: str | os.PathLike[str], mark: str, names: tuple[str, ...]) -> Shelf:
        """The place under `folder` of the fit with this fingerprint; made if it is not there.

        Raises:
            InvalidInput: the folder cannot be made.
        """
        place = Path(folder) / mark[:20]
        try:
            place.mkdir(parents=True, exist_ok=True)
        except OSError as cause:
            raise InvalidInput(
                f"The folder {os.fspath(folder)!r} for curvature factors cannot be made ({cause.strerror}); "
                "give a folder that can be written to."
            ) from cause
        return Shelf(place, names)

    def path(self, name: str) -> Path:
        """The file of one block."""
        return self.folder / f"{hashlib.sha256(name.encode()).hexdigest()[:20]}.safetensors"

    def missing(self) -> list[str]:
        """Blocks that have not been finished, or whose file does not open."""
        return [name for name in self.names if not self._whole(name)]

    def _whole(self, name: str) -> bool:
        try:
            with safe_open(self.path(name), framework="pt") as file:
                return (file.metadata() or {}).get("block") == name
        except (OSError, SafetensorError):
            return False

    def put(self, name: str, block: KroneckerBlock) -> None:
        """Write one finished block: aside, synced, then renamed, so that a file is whole or absent."""
        held = {"left": block.left, "right": block.right, "values": block.values}
        held |= dict(zip(_SIDES, block.sides or (None, None), strict=True))
        tensors = {k: v.detach().cpu().contiguous() for k, v in held.items() if v is not None}
        path = self.path(name)
        aside = path.with_suffix(f".{os.getpid()}.tmp")
        save_file(tensors, aside, metadata={"format": _FORMAT, "block": name})
        with open(aside, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(aside, path)

    def get(self, name: str) -> KroneckerBlock:
        """Read one finished block."""
        with safe_open(self.path(name), framework="pt") as file:
            held = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        sides = (held[_SIDES[0]], held[_SIDES[1]]) if _SIDES[0] in held else None
        return KroneckerBlock(held.get("left"), held.get("right"), held["values"], sides)

    def blocks(self) -> Mapping[str, KroneckerBlock]:
        """All blocks, once they are finished; each is read when it is asked for and not kept."""
        return _OnDisk(self)


@final
@dataclass(frozen=True, eq=False)
class _OnDisk(Mapping[str, KroneckerBlock]):
    shelf: Shelf

    def __getitem__(self, name: str) -> KroneckerBlock:
        if name not in self.shelf.names:
            raise KeyError(name)
        return self.shelf.get(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self.shelf.names)

    def __len__(self) -> int:
        return len(self.shelf.names)

"""Finished trainings on disk: found again by what they were made from, so that interrupted work loses nothing."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, final

import torch
from torch import Tensor

from ..core.batches import tensors_of
from ..core.errors import InvalidInput
from ..problem.data import Source
from ..scores import files as scores_io
from .training import Job

_KIND = "retraining"


def absorb(made: Any, *things: Any) -> None:
    """Add words and tensors to a hash, each ended so that neighbours cannot run into each other."""
    for thing in things:
        if isinstance(thing, Tensor):
            made.update(f"{thing.dtype} {tuple(thing.shape)} ".encode())
            made.update(thing.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
        else:
            made.update(str(thing).encode())
        made.update(b"\0")


def absorb_source(made: Any, source: Source) -> None:
    """Add every example of a dataset."""
    for _, batch in source.batches():
        for where, tensor in tensors_of(batch):
            absorb(made, where, tensor)


def key(job: Job) -> str:
    """What tells one training from another of the same recipe and data."""
    made = hashlib.sha256()
    absorb(made, job.kept, sorted((i, repr(label)) for i, label in job.change.items()), job.seed)
    return made.hexdigest()[:24]


@final
@dataclass(frozen=True, eq=False)
class Shelf:
    """A folder of finished measurements of one recipe, dataset and set of queries; `None`: nothing is kept."""

    folder: Path | None

    @staticmethod
    def at(folder: str | os.PathLike[str] | None, mark: str) -> Shelf:
        """The place under `folder` for this mark, made if it is not there.

        Raises:
            InvalidInput: it cannot be made.
        """
        if folder is None:
            return Shelf(None)
        place = Path(folder) / mark[:20]
        try:
            place.mkdir(parents=True, exist_ok=True)
        except OSError as cause:
            raise InvalidInput(
                f"The folder {os.fspath(folder)!r} for retrained measurements cannot be made ({cause.strerror}); "
                "give one that can be written to."
            ) from cause
        return Shelf(place)

    def read(self) -> tuple[dict[str, Tensor], float]:
        """All finished measurements [Q] by job, and the seconds they took.

        Raises:
            InvalidInput: a file there is not one of these.
        """
        found: dict[str, Tensor] = {}
        seconds = 0.0
        for path in sorted(self.folder.glob("*.safetensors")) if self.folder is not None else ():
            tensors, record = scores_io.read(path, _KIND)
            found |= dict(zip(record["jobs"], tensors["measured"], strict=True))
            seconds += record["seconds"]
        return found, seconds

    def write(self, jobs: Sequence[str], measured: Tensor, seconds: float) -> None:
        """Keep the measurements [J, Q] of some jobs."""
        if self.folder is not None:
            record: Mapping[str, Any] = {"jobs": list(jobs), "seconds": seconds}
            name = hashlib.sha256("".join(jobs).encode()).hexdigest()[:20]
            scores_io.write(self.folder / f"{name}.safetensors", _KIND, {"measured": measured}, record)

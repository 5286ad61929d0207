"""Finished trainings on disk: found again by what they were made from, so that interrupted work loses nothing."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Final, final

from torch import Tensor

from ..core.cache_folder import CacheFolder
from ..core.digest import digest
from ..core.errors import InvalidInput
from ..core.files import read_tensors, write_tensors
from ..core.fingerprint import Fingerprint
from .training import Job

_KIND: Final = "retraining"


def job_key(job: Job) -> str:
    """What tells one training from another of the same recipe and data."""
    return digest(job.kept, dict(job.change), job.seed)[:24]


@final
@dataclass(frozen=True, eq=False)
class RetrainingCache:
    """A folder of finished measurements of one recipe, dataset and set of queries; `None`: nothing is kept."""

    place: CacheFolder | None

    @staticmethod
    def of(folder: str | os.PathLike[str] | None, fingerprint: Fingerprint) -> RetrainingCache:
        """The place under `folder` of this fingerprint, made if it is not there.

        Raises:
            InvalidInput: it cannot be made.
        """
        return RetrainingCache(None if folder is None else CacheFolder.of(folder, fingerprint))

    @property
    def notes(self) -> tuple[str, ...]:
        """What should be known of what was found in the folder."""
        return () if self.place is None else self.place.notes

    def read(self) -> tuple[dict[str, Tensor], float]:
        """All finished measurements [Q] by job, and the seconds they took; damaged files are left out."""
        measurements: dict[str, Tensor] = {}
        seconds = 0.0
        if self.place is None:
            return measurements, seconds
        for path in sorted(self.place.path.glob("*.safetensors")):
            with suppress(InvalidInput):  # to be trained again
                tensors, record = read_tensors(path, _KIND)
                if record.get("fingerprint") == self.place.identity:
                    measurements |= dict(zip(record["jobs"], tensors["measured"], strict=True))
                    seconds += record["seconds"]
        return measurements, seconds

    def write(self, jobs: Sequence[str], measured: Tensor, seconds: float) -> None:
        """Keep the measurements [J, Q] of some jobs.

        Raises:
            InvalidInput: the folder cannot be written to.
        """
        if self.place is None:
            return
        record: Mapping[str, Any] = {"jobs": list(jobs), "seconds": seconds, "fingerprint": self.place.identity}
        name = hashlib.sha256("".join(jobs).encode()).hexdigest()[:20]
        write_tensors(self.place.path / f"{name}.safetensors", _KIND, {"measured": measured}, record)

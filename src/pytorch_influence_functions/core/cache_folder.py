"""The place of one fingerprint in a folder that several results share."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Final, final

from .files import make_folder, remove_leftovers, write_new
from .fingerprint import Fingerprint

_RECORD: Final = "fingerprint.json"
# Fingerprints that are read to name what a new one differs in.
_COMPARED: Final = 100


@final
@dataclass(frozen=True)
class CacheFolder:
    """Where results of one fingerprint lie.

    Args:
        path: a folder of their own; `fingerprint.json` there says what they were made from.
        identity: what each file in it carries.
        differs: where nothing was made from the same: what the nearest fingerprint in the folder differs in.
    """

    path: Path
    identity: str
    differs: tuple[str, ...] = ()

    @staticmethod
    def of(folder: str | os.PathLike[str], fingerprint: Fingerprint) -> CacheFolder:
        """The place under `folder` of this fingerprint; made if it is not there, cleared of half-written files.

        Raises:
            InvalidInput: the folder cannot be made.
        """
        base = make_folder(folder)
        content = (json.dumps(fingerprint.to_dict(), indent=1) + "\n").encode()
        for number in count():
            # The same digests with other probes: the numbers a model gives have changed and its code has not.
            place = base / (f"{fingerprint.key}-{number}" if number else fingerprint.key)
            differs = () if (place / _RECORD).exists() else _nearest(base, fingerprint)
            write_new(place / _RECORD, content)
            # Read back, also by the one who wrote it: processes that start together all go by the first record.
            stored = _read(place / _RECORD)
            if stored is not None and not fingerprint.differences(stored):
                remove_leftovers(place)
                return CacheFolder(place, stored.identity, differs)
        raise AssertionError("count() has no end")

    @property
    def notes(self) -> tuple[str, ...]:
        """What is different from earlier results in the folder, in words; none where nothing is."""
        if not self.differs:
            return ()
        names = ", ".join(self.differs)
        return (f"{str(self.path.parent)!r} had results of other {names}; they were left aside and all was made anew",)


def _read(path: Path) -> Fingerprint | None:
    try:
        return Fingerprint.from_dict(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError):
        return None


def _nearest(base: Path, fingerprint: Fingerprint) -> tuple[str, ...]:
    """What the most similar record differs in; nothing where there is none."""
    stored = [_read(path) for path in sorted(base.glob(f"*/{_RECORD}"))[:_COMPARED]]
    return min((fingerprint.differences(other) for other in stored if other is not None), key=len, default=())

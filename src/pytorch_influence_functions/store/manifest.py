"""The record of an index on disk: one JSON file that lists every whole shard."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Final, final

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from .._version import __version__
from ..core.digest import digest
from ..core.errors import InvalidInput
from ..core.files import write_bytes
from ..core.fingerprint import Fingerprint

MANIFEST: Final = "index.json"
KIND: Final = "gradient index"
FORMAT: Final = 3
"""Version of the layout of the folder. A reader refuses folders of another one, but for the one before, which differs
in the numbers of a sketch alone."""
_BEFORE: Final = 2
_SKETCHED: Final = "Sketch"


@final
@dataclass(frozen=True)
class StoredFile:
    """One file of the folder, and what it must be.

    Args:
        name: of the file.
        bytes: its size.
        sha256: of its contents.
    """

    name: str
    bytes: int
    sha256: str

    @staticmethod
    def from_dict(stored: Mapping[str, Any]) -> StoredFile:
        # A name, not a path: a manifest from elsewhere must not point out of its folder.
        return StoredFile(Path(str(stored["name"])).name, int(stored["bytes"]), str(stored["sha256"]))


@final
@dataclass(frozen=True)
class Shard:
    """One file of rows.

    Args:
        file: which one.
        first: the example at its start.
        stop: one after the example at its end.
        kept: the examples whose rows it holds, as ranges; None: all between `first` and `stop`.
        sample: (place behind `first`, digest) of some examples; empty in what an earlier version wrote.
    """

    file: StoredFile
    first: int
    stop: int
    kept: tuple[tuple[int, int], ...] | None = None
    sample: tuple[tuple[int, str], ...] = ()

    @property
    def ids(self) -> Int[Tensor, " n"]:
        """The examples whose rows it holds."""
        ranges = ((self.first, self.stop),) if self.kept is None else self.kept
        return torch.cat([torch.arange(0), *(torch.arange(first, stop) for first, stop in ranges)])

    def to_dict(self) -> dict[str, Any]:
        """As plain values."""
        return {**vars(self.file), "first": self.first, "stop": self.stop, "kept": self.kept, "sample": self.sample}

    @staticmethod
    def from_dict(stored: Mapping[str, Any]) -> Shard:
        """What `to_dict` gave."""
        kept = None if stored["kept"] is None else tuple((int(first), int(stop)) for first, stop in stored["kept"])
        sample = tuple((int(place), str(digest)) for place, digest in stored.get("sample", ()))
        return Shard(StoredFile.from_dict(stored), int(stored["first"]), int(stored["stop"]), kept, sample)


@final
@dataclass(frozen=True)
class GraphRecord:
    """A graph of nearest neighbours over stored rows.

    Args:
        file: which one.
        rows: the digest of what it was built on.
        stop: it tells of the examples before this one.
        left: how many of them are not in it, because their rows are small.
        largest_left: the size of the largest of these rows.
    """

    file: StoredFile
    rows: str
    stop: int
    left: int
    largest_left: float

    def to_dict(self) -> dict[str, Any]:
        """As plain values."""
        return {**vars(self), "file": vars(self.file)}

    @staticmethod
    def from_dict(stored: Mapping[str, Any]) -> GraphRecord:
        """What `to_dict` gave."""
        file, rows = StoredFile.from_dict(stored["file"]), str(stored["rows"])
        return GraphRecord(file, rows, int(stored["stop"]), int(stored["left"]), float(stored["largest_left"]))


@final
@dataclass(frozen=True)
class Manifest:
    """What `index.json` says.

    Args:
        fingerprint: what the index was made from.
        facts: its settings, as plain values: what is needed to read it and to tell about it.
        basis: the file with eigenbasis and projection.
        shards: the whole ones, in the order of their examples.
        parts: the first example of the data that the index was built from and of everything appended, and what each
            part holds; the last one may not be whole yet.
        removed: examples that do not count, as ranges (first, one after the last).
        complete: whether the last build or append came to its end.
        columns: files of what else is known of the examples, one part of them after the other.
        graph: that names candidates; None: there is none.
    """

    fingerprint: Fingerprint
    facts: Mapping[str, Any]
    basis: StoredFile
    shards: tuple[Shard, ...] = ()
    parts: tuple[int, ...] = (0,)
    removed: tuple[tuple[int, int], ...] = ()
    complete: bool = False
    notes: tuple[str, ...] = field(default=())
    columns: tuple[StoredFile, ...] = ()
    graph: GraphRecord | None = None

    @property
    def examples(self) -> int:
        """How many examples have been given, removed ones included."""
        return self.shards[-1].stop if self.shards else 0

    @property
    def bytes(self) -> int:
        """Of all files together."""
        return sum(file.bytes for file in self.files) + (0 if self.graph is None else self.graph.file.bytes)

    @property
    def files(self) -> tuple[StoredFile, ...]:
        """All files of tensors that count."""
        return (self.basis, *(shard.file for shard in self.shards), *self.columns)

    def mask(self) -> Bool[Tensor, " n"]:
        """Which examples count."""
        mask = torch.ones(self.examples, dtype=torch.bool)
        for first, stop in self.removed:
            mask[first:stop] = False
        return mask

    def without(self, ids: Iterable[int]) -> Manifest:
        """The same index with more examples removed."""
        mask = self.mask()
        mask[torch.tensor(sorted(set(ids)), dtype=torch.long)] = False
        return replace(self, removed=ranges_of((~mask).nonzero().flatten().tolist()))

    def digest_rows(self, stop: int) -> str:
        """Of the rows of all examples before this one, and of what they are coordinates in.

        Args:
            stop: the first example of another part.
        """
        return digest(self.basis.sha256, [shard.file.sha256 for shard in self.shards if shard.stop <= stop])

    def with_shards(self, shards: tuple[Shard, ...]) -> Manifest:
        """The same rows in other files.

        Args:
            shards: in their order; some rows of removed examples may be missing.
        """
        changed = replace(self, shards=shards)
        if self.graph is None or self.graph.rows != self.digest_rows(self.graph.stop):
            return changed
        return replace(changed, graph=replace(self.graph, rows=changed.digest_rows(self.graph.stop)))

    @staticmethod
    def read(folder: Path) -> Manifest:
        """Read it.

        Raises:
            InvalidInput: there is none, it is damaged, or another version wrote it.
        """
        path = folder / MANIFEST
        if not path.exists():
            raise InvalidInput(
                f"{os.fspath(folder)!r} holds no index ({MANIFEST} is missing); build one there with ptif.Index.build."
            )
        try:
            text = path.read_text(encoding="utf-8")
        except (OSError, ValueError) as cause:
            raise _unreadable(path, cause) from cause
        return Manifest.parse(text, path)

    @staticmethod
    def parse(text: str, path: Path) -> Manifest:
        """What `text` gave.

        Args:
            text: the content of the file.
            path: where it lies, for messages.

        Raises:
            InvalidInput: it is damaged, or another version wrote it.
        """
        try:
            stored = json.loads(text)
            kind, version = stored["kind"], stored["format"]
            readable = version == FORMAT or (version == _BEFORE and _kept(stored) != _SKETCHED)
            if kind == KIND and not readable:
                what = f"format {version}" if version != _BEFORE else f"sketches of format {version}"
                raise InvalidInput(
                    f"The index in {os.fspath(path.parent)!r} has {what} and this version reads {FORMAT}; "
                    f"read it with pytorch_influence_functions {stored['versions']['pytorch_influence_functions']}, or "
                    "build it anew."
                )
            fingerprint = Fingerprint.from_dict(stored["fingerprint"])
            if kind != KIND or fingerprint is None:
                raise ValueError(f"it is of kind {kind!r}")
            return Manifest(
                fingerprint,
                dict(stored["facts"]),
                StoredFile.from_dict(stored["basis"]),
                tuple(Shard.from_dict(entry) for entry in stored["shards"]),
                tuple(int(first) for first in stored["parts"]),
                tuple((int(first), int(stop)) for first, stop in stored["removed"]),
                bool(stored["complete"]),
                tuple(map(str, stored["notes"])),
                tuple(StoredFile.from_dict(entry) for entry in stored.get("columns", [])),
                None if stored.get("graph") is None else GraphRecord.from_dict(stored["graph"]),
            )
        except (ValueError, KeyError, TypeError, AttributeError) as cause:
            if isinstance(cause, InvalidInput):
                raise
            raise _unreadable(path, cause) from cause

    def write(self, folder: Path) -> None:
        """Put it in its place, whole or not at all."""
        write_bytes(folder / MANIFEST, self.text().encode())

    def text(self) -> str:
        """The content of its file."""
        content = {
            "kind": KIND,
            "format": FORMAT,
            "versions": {"pytorch_influence_functions": __version__, "torch": torch.__version__},
            "fingerprint": self.fingerprint.to_dict(),
            "facts": self.facts,
            "basis": vars(self.basis),
            "shards": [shard.to_dict() for shard in self.shards],
            "parts": self.parts,
            "removed": self.removed,
            "complete": self.complete,
            "notes": self.notes,
            "columns": [vars(file) for file in self.columns],
        }
        if self.graph is not None:
            content["graph"] = self.graph.to_dict()
        return json.dumps(content, indent=1, sort_keys=True) + "\n"


def _kept(stored: Mapping[str, Any]) -> str:
    """What is kept of a gradient."""
    return str(stored["facts"]["representation"]["kind"])


def _unreadable(path: Path, cause: Exception) -> InvalidInput:
    reason = " ".join(str(cause).split()) or type(cause).__name__
    return InvalidInput(
        f"{os.fspath(path)!r} cannot be read as the record of an index ({reason}); build the index anew."
    )


def ranges_of(ids: Sequence[int]) -> tuple[tuple[int, int], ...]:
    """Increasing whole numbers as ranges (first, one after the last).

    >>> ranges_of([2, 3, 4, 9])
    ((2, 5), (9, 10))
    """
    ranges: list[tuple[int, int]] = []
    for number in ids:
        if ranges and ranges[-1][1] == number:
            ranges[-1] = (ranges[-1][0], number + 1)
        else:
            ranges.append((number, number + 1))
    return tuple(ranges)

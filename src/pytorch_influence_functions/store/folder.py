"""The folder of an index: who may write, which files count, and what a killed process left."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, final

from torch import Tensor

from ..core.distributed import alone, current
from ..core.errors import InvalidInput
from ..core.files import cannot_write, locked, make_folder, remove_leftovers
from .manifest import MANIFEST, Manifest, Shard, StoredFile
from .shard_files import MappedFile, map_bytes, map_file, write_file

_BASIS, _ROWS, _COLUMNS, GRAPH = "basis", "rows", "columns", "graph"
# Files of tensors, and the graph in the format of its library.
_OWN = (*(f"{stem}-*.safetensors" for stem in (_BASIS, _ROWS, _COLUMNS)), f"{GRAPH}-*.faiss")


@final
@dataclass(eq=False)
class IndexFolder:
    """One index on disk.

    Args:
        path: the folder.
        manifest: what its record says.
        check: compare the digest of every file when it is first read.
    """

    path: Path
    manifest: Manifest
    check: bool = True
    _verified: set[str] = field(default_factory=set)
    _graphs: dict[str, Any] = field(default_factory=dict)

    @staticmethod
    def open(path: str | os.PathLike[str], check: bool = True) -> IndexFolder:
        """Read the record.

        Raises:
            InvalidInput: there is none, it is damaged, or another version wrote it.
        """
        return IndexFolder(Path(path), Manifest.read(Path(path)), check)

    def read(self, stored: StoredFile) -> MappedFile:
        """One of the files; its contents are verified the first time.

        Raises:
            InvalidInput: it is missing, cut off or damaged.
        """
        mapped = map_file(self.path, stored, self.check and stored.name not in self._verified)
        self._verified.add(stored.name)
        return mapped

    def open_graph(self, stored: StoredFile, restore: Callable[[Path], Any]) -> Any:
        """The graph, opened once; its contents are verified before.

        Args:
            stored: its file.
            restore: opens it.

        Raises:
            InvalidInput: it is missing, cut off or damaged.
        """
        if stored.name not in self._graphs:
            map_bytes(self.path, stored, self.check).close()
            self._graphs[stored.name] = restore(self.path / stored.name)
        return self._graphs[stored.name]

    def glance(self, stored: StoredFile) -> MappedFile:
        """One of the files, of which little will be read: its contents are not verified for that."""
        return map_file(self.path, stored, verify=False)

    def write_shard(
        self,
        first: int,
        stop: int,
        tensors: Mapping[str, Tensor | Sequence[Tensor]],
        record: Mapping[str, Any],
        sample: Sequence[tuple[int, str]],
    ) -> Shard:
        """Write a shard, which is to be listed next: killed in between, it does not count and is written again."""
        stored = write_file(self.path, f"{_ROWS}-{first:012d}-{stop:012d}", tensors, record)
        self._verified.add(stored.name)
        return Shard(stored, first, stop, sample=tuple(sample))

    def list_shards(self, written: Sequence[Shard]) -> None:
        """Let shards count that follow those that are listed.

        Args:
            written: those of this process; under `distributed()` the others' belong in between.
        """
        world = current()
        if world.size > 1:
            told = world.exchange(json.dumps([shard.to_dict() for shard in written]))
            everyones = (Shard.from_dict(entry) for text in told for entry in json.loads(text))
            written = sorted(everyones, key=lambda shard: shard.first)
        if written:
            self.write(replace(self.manifest, shards=(*self.manifest.shards, *written)))

    def write(self, manifest: Manifest) -> None:
        """Make another record count; of processes that share the work, the first one writes it."""
        if current().rank == 0:
            manifest.write(self.path)
        self.manifest = manifest

    def check_shared(self) -> None:
        """Make sure that this process sees what the first one wrote.

        Raises:
            InvalidInput: its folder is another one.
        """
        world = current()
        if world.size > 1 and not (self.path / self.manifest.basis.name).exists():
            raise InvalidInput(
                f"Process {world.rank} does not find in {os.fspath(self.path)!r} what process 0 has written there; "
                "give every process the same folder, on a disk that all of them see."
            )

    def check_all(self) -> None:
        """Read every file and compare its digest.

        Raises:
            InvalidInput: one is missing, cut off or damaged.
        """
        for stored in self.manifest.files:
            map_file(self.path, stored, verify=True)
            self._verified.add(stored.name)
        if self.manifest.graph is not None:
            map_bytes(self.path, self.manifest.graph.file, verify=True)

    def drop_unlisted(self) -> None:
        """Remove files of an index that do not count: a killed process left them, or they were replaced."""
        listed = {file.name for file in self.manifest.files}
        if self.manifest.graph is not None:
            listed.add(self.manifest.graph.file.name)
        for path in own_files(self.path):
            if path.name not in listed:
                with suppress(OSError):
                    path.unlink()


def own_files(folder: Path) -> list[Path]:
    """All files of an index but its record, whether they count or not."""
    return [path for pattern in _OWN for path in folder.glob(pattern)]


def write_basis(path: Path, tensors: Mapping[str, Tensor], record: Mapping[str, Any]) -> StoredFile:
    """The file with eigenbasis and projection, which is written before any row."""
    return write_file(path, _BASIS, tensors, record)


def write_columns(path: Path, tensors: Mapping[str, Tensor], record: Mapping[str, Any]) -> StoredFile:
    """A file with what else is known of some examples."""
    return write_file(path, _COLUMNS, tensors, record)


@contextmanager
def writing(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Keep the folder for this process while it writes; it is made if it is not there.

    Of processes that share the work the first one keeps it, for all of them.

    Raises:
        InvalidInput: another process writes there, or the folder cannot be written to.
    """
    if not os.fspath(path):
        raise InvalidInput("The folder of the index is named ''; give the path of a folder of its own.")
    if current().rank > 0:
        yield Path(path)
        return
    folder = make_folder(path)
    if not os.access(folder, os.W_OK | os.X_OK):
        raise cannot_write(folder, PermissionError(13, "Permission denied"))
    with locked(folder):
        remove_leftovers(folder)
        yield folder


def clear(folder: Path) -> None:
    """Remove an index: its record first, so that what is left does not count."""
    with suppress(OSError):
        (folder / MANIFEST).unlink()
    for path in own_files(folder):
        with suppress(OSError):
            path.unlink()


def check_room(folder: Path, wanted: int) -> None:
    """Refuse to start what will not fit on the disk.

    Raises:
        InvalidInput: there is less room.
    """
    free = shutil.disk_usage(folder).free
    if wanted > free:
        raise InvalidInput(
            f"The index would take {wanted / 1e9:.3g} GB and the disk of {os.fspath(folder)!r} has {free / 1e9:.3g} GB "
            "free; give another folder, or a smaller representation= or dtype=."
        )


def by_first(path: Path, check: bool, work: Callable[[], IndexFolder | None]) -> IndexFolder | None:
    """What the first of the processes that share the work does alone; its record travels to the others.

    Args:
        path: the folder.
        check: compare the digest of every file when it is first read.
        work: gives the index after it; None where there is none.
    """
    world = current()
    if world.size == 1:
        return work()
    opened = None
    if world.rank == 0:
        with alone():
            opened = work()
    text = world.exchange("" if opened is None else opened.manifest.text())[0]
    if world.rank == 0 or not text:
        return opened
    return IndexFolder(path, Manifest.parse(text, path / MANIFEST), check)

"""The original package's files: JSON with names that never collide, and vectors that load without running code."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any, overload

import torch
from torch import Tensor

from ..core.errors import InvalidInput, name_ids
from ..core.files import replacing, write_bytes
from ..store.manifest import MANIFEST
from ..store.stored_gradients import StoredGradients
from .config import DEFAULTS
from .console import log
from .engine import lists_of

Vectors = list[Tensor]
FolderPath = str | os.PathLike[str]

S_TEST: str = DEFAULTS["s_test_pattern"]
GRAD_Z: str = DEFAULTS["grad_z_pattern"]


# --------------------------------------------------------------------------- JSON


def save_json(
    json_obj: Any,
    json_path: str | os.PathLike[str],
    append_if_exists: bool = False,
    overwrite_if_exists: bool = False,
    unique_fn_if_exists: bool = True,
) -> Path:
    """Write `json_obj` to `json_path`, whole or not at all, and return where it went.

    If the file exists, the first of these decides: `overwrite_if_exists` replaces it; `append_if_exists` makes it one
    JSON list of what it holds and the object (a list in the file gets the object at its end); `unique_fn_if_exists`
    writes to `name_YEAR-MONTH-DAY-HOUR-MINUTE-SECOND.json` instead; otherwise it is refused.

    Args:
        json_obj: what is written.
        json_path: the file.
        append_if_exists: make the file one list, the object its last element.
        overwrite_if_exists: replace the file.
        unique_fn_if_exists: write to a name with the time in it.

    Raises:
        InvalidInput: the object holds something that JSON cannot hold, NaN included, or the file to append to is not
            JSON; nothing is written.
        FileExistsError: the file exists and no flag says what to do.
    """
    path = Path(json_path)
    try:
        text = json.dumps(json_obj, allow_nan=False)
    except (TypeError, ValueError) as cause:
        raise InvalidInput(f"{path.name} cannot be written as JSON: {cause}.") from cause
    if path.exists() and not overwrite_if_exists:
        if append_if_exists:
            text = json.dumps([*_read_documents(path), json_obj])
        elif unique_fn_if_exists:
            path = _unused_path(path)
        else:
            raise FileExistsError(f"{path} exists; pass overwrite_if_exists=True, or another name.")
    write_bytes(path, text.encode("utf-8"))
    return path


def _read_documents(path: Path) -> list[Any]:
    """What a file holds that objects are appended to: the elements of its list, else its one document.

    Raises:
        InvalidInput: the file is not JSON.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8").strip() or "[]")
    except ValueError as cause:
        raise InvalidInput(
            f"{path} is not one JSON document ({cause}), so nothing can be appended; give another name."
        ) from cause
    return content if isinstance(content, list) else [content]


def _unused_path(path: Path) -> Path:
    stamp = datetime.now().strftime("_%Y-%m-%d-%H-%M-%S")
    candidate, count = path.with_name(f"{path.stem}{stamp}{path.suffix}"), 1
    while candidate.exists():  # two files within one second
        count += 1
        candidate = path.with_name(f"{path.stem}{stamp}-{count}{path.suffix}")
    return candidate


@dataclass(eq=False)
class ResultFiles:
    """The files of one run's results. `num` comes from the config; where it is 0, the file names say "all"."""

    outdir: Path
    start: int
    num: int
    results_name: str | None = None
    keep_tmp: bool = False
    _last: Path | None = field(default=None, init=False)

    @property
    def _num(self) -> str:
        return str(self.num) if self.num else "all"

    def meta(self, content: Any) -> Path:
        """Write the meta file."""
        return save_json(content, self.outdir / f"influences_results_meta_{self.start}-{self._num}.json")

    def partial(self, content: Any, i: int) -> Path:
        """Write the results up to item `i`, then remove the file written before."""
        path = self.outdir / f"influence_results_tmp_{self.start}_{self._num}_last-i_{i}.json"
        save_json(content, path, overwrite_if_exists=True)
        before, self._last = self._last, path
        if before is not None and before != path and not self.keep_tmp:
            before.unlink(missing_ok=True)
        return path

    def result(self, content: Any, all_at_once: bool = False) -> Path:
        """Write the results and remove the partial file."""
        name = "influence_results.json" if all_at_once else f"influence_results_{self.start}_{self._num}.json"
        if self.results_name is not None:
            name = self.results_name.replace("{start}", str(self.start)).replace("{num}", self._num)
            name = name if name.endswith(".json") else name + ".json"
        path = save_json(content, self.outdir / name)
        if self._last is not None and not self.keep_tmp:
            self._last.unlink(missing_ok=True)
        return path


# --------------------------------------------------------------------------- vectors


def vector_file_name(pattern: str, i: int, d: int = 0, r: int = 0) -> str:
    """A file name from a pattern with the fields {i}, {d} (recursion depth) and {r}.

    >>> vector_file_name("{i}_recdep{d}_r{r}.s_test", 3, 5000, 1)
    '3_recdep5000_r1.s_test'
    """
    return pattern.replace("{i}", str(i)).replace("{d}", str(d)).replace("{r}", str(r))


def _file_name_regex(pattern: str) -> re.Pattern[str]:
    parts = re.split(r"(\{[idr]\})", pattern)
    fields: set[str] = set()
    regex = ""
    for part in parts:
        if part in ("{i}", "{d}", "{r}"):
            regex += rf"(?P={part[1]})" if part in fields else rf"(?P<{part[1]}>\d+)"
            fields.add(part)
        else:
            regex += re.escape(part)
    return re.compile(regex + r"\Z")


def save_vectors(vectors: Sequence[Tensor], path: Path) -> None:
    """Write a list of tensors, on the CPU and each with memory of its own, for `torch.load(weights_only=True)`."""
    # The files are not synced one by one, because there is one per training example.
    with replacing(path, sync=False) as aside:
        torch.save([v.detach().cpu().contiguous().clone() for v in vectors], aside)


def load_vectors(path: Path) -> Vectors:
    """Read a list of tensors.

    Raises:
        InvalidInput: the file is damaged or holds something else.
    """
    try:
        vectors = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise
    except Exception as cause:
        raise InvalidInput(f"{path} cannot be read as a list of tensors ({type(cause).__name__}).") from cause
    if not isinstance(vectors, list) or not all(isinstance(v, Tensor) for v in vectors):
        raise InvalidInput(f"{path} holds {type(vectors).__name__}, expected a list of tensors.")
    return vectors


@dataclass(frozen=True)
class StoredVectors(Sequence[Vectors]):
    """Lists of tensors on disk, each read when it is used: a folder may be larger than memory."""

    paths: tuple[Path, ...]

    def __len__(self) -> int:
        return len(self.paths)

    @overload
    def __getitem__(self, index: int) -> Vectors: ...
    @overload
    def __getitem__(self, index: slice) -> StoredVectors: ...
    def __getitem__(self, index: int | slice) -> Vectors | StoredVectors:
        return StoredVectors(self.paths[index]) if isinstance(index, slice) else load_vectors(self.paths[index])

    def __iter__(self) -> Iterator[Vectors]:
        return map(load_vectors, self.paths)


@dataclass(frozen=True, eq=False)
class IndexedVectors(Sequence[Vectors]):
    """The gradients of an index as lists of tensors, each read when it is used."""

    stored: StoredGradients
    positions: range

    def __len__(self) -> int:
        return len(self.positions)

    @overload
    def __getitem__(self, index: int) -> Vectors: ...
    @overload
    def __getitem__(self, index: slice) -> IndexedVectors: ...
    def __getitem__(self, index: int | slice) -> Vectors | IndexedVectors:
        if isinstance(index, slice):
            return IndexedVectors(self.stored, self.positions[index])
        row = self.stored.row(self.positions[index])
        return lists_of(row, self.stored.space, self.stored.names)[0]


def _find_vectors(folder: FolderPath, pattern: str) -> list[tuple[dict[str, int], Path]]:
    path = Path(folder)
    if not path.is_dir():
        raise InvalidInput(f"There is no folder {str(path)!r}; give the one the vectors were saved in.")
    regex = _file_name_regex(pattern)
    matches = [(regex.match(p.name), p) for p in path.iterdir()]
    files = [({k: int(v) for k, v in m.groupdict().items()}, p) for m, p in matches if m is not None]
    return sorted(files, key=lambda pair: (*pair[0].values(), pair[1].name))


def load_grad_z(
    grad_z_dir: FolderPath = "grad_z", train_dataset_size: int = -1, *, pattern: str = GRAD_Z
) -> StoredVectors | IndexedVectors:
    """The training gradients saved in a folder, by index: a sequence of lists of tensors, each read when used.

    Args:
        grad_z_dir: the folder of files, or of the index that `calc_all_grad_then_test` keeps.
        train_dataset_size: how many are expected, -1 for as many as there are.
        pattern: how they are named.

    Raises:
        InvalidInput: no folder, no file, or missing indices (named).
    """
    if (Path(grad_z_dir) / MANIFEST).exists():
        return _indexed_vectors(grad_z_dir, train_dataset_size)
    by_index = {fields["i"]: path for fields, path in _find_vectors(grad_z_dir, pattern)}
    size = train_dataset_size if train_dataset_size != -1 else max(by_index, default=-1) + 1
    missing = [i for i in range(size) if i not in by_index]
    if missing or not size:
        fault = f"lacks training gradients {name_ids(missing)}" if missing else f"holds no file like {pattern!r}"
        raise InvalidInput(f"The folder {str(grad_z_dir)!r} {fault}; save them with calc_grad_z(..., save_pth=folder).")
    return StoredVectors(tuple(by_index[i] for i in range(size)))


def _indexed_vectors(folder: FolderPath, size: int) -> IndexedVectors:
    stored = StoredGradients.open(folder)
    if size not in (-1, len(stored)):
        raise InvalidInput(
            f"The index in {os.fspath(folder)!r} holds {len(stored):,} training gradients and {size:,} were expected; "
            "give the folder of that data set."
        )
    return IndexedVectors(stored, range(len(stored)))


def load_s_test(
    s_test_dir: FolderPath = "s_test",
    s_test_id: int = 0,
    r_sample_size: int = 10,
    train_dataset_size: int = -1,
    *,
    pattern: str = S_TEST,
) -> tuple[Vectors, list[Vectors]]:
    """The saved s_test vectors of one test example.

    Each file already is a mean over its `r` runs. Files of the greatest recursion depth are used, at most
    `r_sample_size` of them.

    Args:
        s_test_dir: the folder.
        s_test_id: index of the test example.
        r_sample_size: the most files to read.
        train_dataset_size: kept for old calls; s_test vectors do not depend on it.
        pattern: how the files are named.

    Returns:
        `(mean, list)`: the mean over the files, and each of them.

    Raises:
        InvalidInput: there is none for this example.
    """
    matching = [(f, p) for f, p in _find_vectors(s_test_dir, pattern) if f["i"] == s_test_id]
    if not matching:
        raise InvalidInput(
            f"The folder {str(s_test_dir)!r} holds no s_test of test example {s_test_id} (named like {pattern!r}); "
            "save it with calc_s_test(..., save=folder)."
        )
    deepest = max(f.get("d", 0) for f, _ in matching)
    used = [p for f, p in matching if f.get("d", 0) == deepest][:r_sample_size]
    if len(used) < len(matching):
        log.info("load_s_test: %d of %d files of test example %d are used.", len(used), len(matching), s_test_id)
    solutions = list(map(load_vectors, used))
    return [torch.stack(parts).mean(0) for parts in zip(*solutions, strict=True)], solutions

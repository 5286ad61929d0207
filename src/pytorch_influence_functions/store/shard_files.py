"""Files of tensors that are written whole with a digest of their contents, and read by mapping them into memory."""

from __future__ import annotations

import hashlib
import json
import mmap
import os
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, final

import torch
from torch import Tensor

from ..core.digest import tensor_bytes
from ..core.errors import InvalidInput
from ..core.files import write_bytes
from .manifest import StoredFile

_KEY: Final = "pytorch_influence_functions"
_DTYPES: Final = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I8": torch.int8,
    "U8": torch.uint8,
}
# Bytes that are read at once.
_PIECE: Final = 1 << 22
_NAMES: Final = {dtype: name for name, dtype in _DTYPES.items()}


@final
@dataclass(frozen=True, eq=False)
class MappedFile:
    """The tensors of one file, which are read from the disk where they are used, and its record."""

    tensors: Mapping[str, Tensor]
    record: Mapping[str, Any]


def write_file(
    folder: Path, stem: str, tensors: Mapping[str, Tensor | Sequence[Tensor]], record: Mapping[str, Any]
) -> StoredFile:
    """Write tensors and a record of plain values as a safetensors file, whole or not at all.

    Equal contents are equal bytes under an equal name, which ends with a part of their digest.

    Args:
        folder: where to.
        stem: how its name begins.
        tensors: by name; several of one name are put together along their first axis, as they are written.
        record: plain values.

    Raises:
        InvalidInput: a full disk, a read-only folder and the like, in one sentence.
    """
    parts = {name: [value] if isinstance(value, Tensor) else list(value) for name, value in tensors.items()}
    # The widest types first, so that every tensor begins at a multiple of its own.
    names = sorted(parts, key=lambda name: (-parts[name][0].element_size(), name))
    header: dict[str, Any] = {"__metadata__": {_KEY: json.dumps(record, sort_keys=True)}}
    stop = 0
    for name in names:
        first = parts[name][0]
        shape = [sum(len(part) for part in parts[name]), *first.shape[1:]] if first.ndim else []
        start, stop = stop, stop + sum(part.numel() for part in parts[name]) * first.element_size()
        header[name] = {"dtype": _NAMES[first.dtype], "shape": shape, "data_offsets": [start, stop]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    pieces: list[bytes | memoryview] = [struct.pack("<Q", len(text)), text]
    pieces += [tensor_bytes(part) for name in names for part in parts[name] if part.numel()]
    sha256 = hashlib.sha256()
    for piece in pieces:
        sha256.update(piece)
    name = f"{stem}-{sha256.hexdigest()[:8]}.safetensors"
    write_bytes(folder / name, *pieces)
    return StoredFile(name, 8 + len(text) + stop, sha256.hexdigest())


def map_file(folder: Path, stored: StoredFile, verify: bool) -> MappedFile:
    """Map a file of tensors into memory.

    Args:
        folder: where it lies.
        stored: what it must be.
        verify: read it once and compare its digest.

    Raises:
        InvalidInput: it is not there, cut off, or its contents have changed.
    """
    return _parse(map_bytes(folder, stored, verify), os.fspath(folder / stored.name))


def map_bytes(folder: Path, stored: StoredFile, verify: bool) -> mmap.mmap:
    """Map any file into memory; the arguments and refusals are those of `map_file`."""
    path = folder / stored.name
    where = os.fspath(path)
    try:
        with open(path, "rb") as file:
            size = os.fstat(file.fileno()).st_size
            if size != stored.bytes:
                raise InvalidInput(
                    f"{where!r} has {size:,} bytes and was written with {stored.bytes:,}, so it was cut off or "
                    "replaced; restore it, or remove the folder and build the index anew."
                )
            # A private copy of a page is made where somebody writes to it; the file never changes.
            mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
    except FileNotFoundError as cause:
        raise InvalidInput(
            f"{where!r} is missing from the index; open the index again if it was changed meanwhile, else restore the "
            "file or build the index anew."
        ) from cause
    except OSError as cause:
        raise InvalidInput(f"{where!r} cannot be read ({cause.strerror}); make it readable.") from cause
    if hasattr(mmap, "MADV_SEQUENTIAL"):
        mapped.madvise(mmap.MADV_SEQUENTIAL)
    if verify and hashlib.sha256(mapped).hexdigest() != stored.sha256:
        raise InvalidInput(
            f"{where!r} is damaged: its contents are not those that were written; restore it, or remove the folder and "
            "build the index anew."
        )
    return mapped


def describe_file(folder: Path, name: str) -> StoredFile:
    """What a file is that lies in the folder."""
    sha256, size = hashlib.sha256(), 0
    with open(folder / name, "rb") as file:
        while piece := file.read(_PIECE):
            sha256.update(piece)
            size += len(piece)
    return StoredFile(name, size, sha256.hexdigest())


def _parse(mapped: mmap.mmap, where: str) -> MappedFile:
    try:
        (length,) = struct.unpack("<Q", mapped[:8])
        header = json.loads(mapped[8 : 8 + length])
        record = json.loads(header.pop("__metadata__")[_KEY])
        tensors = {}
        for name, entry in header.items():
            dtype, shape, (start, stop) = _DTYPES[entry["dtype"]], entry["shape"], entry["data_offsets"]
            count = (stop - start) // dtype.itemsize
            if count == 0:
                tensors[name] = torch.empty(shape, dtype=dtype)
                continue
            flat = torch.frombuffer(mapped, dtype=dtype, count=count, offset=8 + length + start)
            tensors[name] = flat.reshape(shape)
    except (ValueError, KeyError, struct.error, TypeError) as cause:
        raise InvalidInput(
            f"{where!r} is not a file of an index, or is damaged ({' '.join(str(cause).split())}); restore it, or "
            "build the index anew."
        ) from cause
    return MappedFile(tensors, record)

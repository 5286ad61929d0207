"""Files of tensors that are written whole with a digest of their contents, and read by mapping them into memory."""

from __future__ import annotations

import hashlib
import json
import mmap
import os
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, final

import torch
from safetensors.torch import save
from torch import Tensor

from ..core.errors import InvalidInput
from ..core.files import write_bytes
from .manifest import StoredFile

# One key only: the library writes several keys in random order, and equal results must be equal bytes.
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


@final
@dataclass(frozen=True, eq=False)
class MappedFile:
    """The tensors of one file, which are read from the disk where they are used, and its record."""

    tensors: Mapping[str, Tensor]
    record: Mapping[str, Any]


def write_file(folder: Path, stem: str, tensors: Mapping[str, Tensor], record: Mapping[str, Any]) -> StoredFile:
    """Write tensors and a record of plain values as a safetensors file, whole or not at all.

    Equal contents are equal bytes under an equal name, which ends with a part of their digest.

    Raises:
        InvalidInput: a full disk, a read-only folder and the like, in one sentence.
    """
    copies = {name: value.detach().cpu().contiguous() for name, value in tensors.items()}
    content = save(copies, {_KEY: json.dumps(record, sort_keys=True)})
    digest = hashlib.sha256(content).hexdigest()
    name = f"{stem}-{digest[:8]}.safetensors"
    write_bytes(folder / name, content)
    return StoredFile(name, len(content), digest)


def map_file(folder: Path, stored: StoredFile, verify: bool) -> MappedFile:
    """Map a file into memory.

    Args:
        folder: where it lies.
        stored: what it must be.
        verify: read it once and compare its digest.

    Raises:
        InvalidInput: it is not there, cut off, or its contents have changed.
    """
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
    return _parse(mapped, where)


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

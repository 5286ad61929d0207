"""Result files: safetensors, no pickle; written aside, synced, renamed; equal results are equal bytes."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from typing import Any

import safetensors.torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ..core.errors import InvalidInput
from ..core.files import write_bytes

FORMAT = 1
"""Version of the file layout. A reader refuses files of a later one."""
# One key only: the library writes several keys in random order, and equal results must be equal bytes.
_KEY = "pytorch_influence_functions"


def write(path: str | os.PathLike[str], kind: str, tensors: Mapping[str, Tensor], record: Mapping[str, Any]) -> None:
    """Write named tensors and one record of plain values as a file of the given kind.

    Raises:
        InvalidInput: the record holds something that is not a number, word, list or dictionary of these.
    """
    try:
        header = json.dumps({"format": FORMAT, "kind": kind, "record": dict(record)}, sort_keys=True)
    except TypeError as cause:
        raise InvalidInput(
            f"These {kind} cannot be saved: {cause}; labels and names must be numbers, words or lists."
        ) from cause
    # Copies: tensors may be views that share memory, which the format refuses.
    copies = {name: value.detach().cpu().contiguous().clone() for name, value in tensors.items()}
    write_bytes(path, safetensors.torch.save(copies, metadata={_KEY: header}))


def read(path: str | os.PathLike[str], kind: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors and the record of a file of the given kind.

    Raises:
        InvalidInput: no such file, another kind of file, a damaged one, or one of a later version.
    """
    name = os.fspath(path)
    if not os.path.exists(name):
        raise InvalidInput(f"There is no file {name!r}; give the path that save() wrote.")
    try:
        with safe_open(name, framework="pt") as file:
            text = (file.metadata() or {}).get(_KEY)
            header = None if text is None else json.loads(text)
            if header is not None:
                _check(header, name, kind)
            tensors = {key: file.get_tensor(key).clone() for key in file.keys()}  # noqa: SIM118 (not a mapping)
    except (SafetensorError, json.JSONDecodeError, OSError) as cause:
        raise InvalidInput(f"{name!r} is not a file of saved {kind}, or is damaged ({cause}); save it anew.") from cause
    if header is None:
        raise InvalidInput(
            f"{name!r} is a safetensors file, but not one of saved {kind}; give a file written by save()."
        )
    return tensors, header["record"]


def _check(header: Any, name: str, kind: str) -> None:
    if not isinstance(header, dict) or header.get("kind") != kind or not isinstance(header.get("record"), dict):
        other = header.get("kind") if isinstance(header, dict) else type(header).__name__
        raise InvalidInput(f"{name!r} holds {other}, not {kind}; give a file written by their save().")
    if header.get("format") != FORMAT:
        raise InvalidInput(
            f"{name!r} has file format {header.get('format')} and this version reads {FORMAT}; "
            "read it with the version of pytorch_influence_functions that wrote it."
        )

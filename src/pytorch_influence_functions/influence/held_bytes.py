"""How much memory what was made takes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..problem.problem import Problem

_PACKAGE = __name__.partition(".")[0]


def bytes_held(*parts: Any) -> int:
    """Bytes of all tensors in records of this package, each memory once; models and what is on disk not counted."""
    storages: dict[int, int] = {}
    _collect(parts, storages, set())
    return sum(storages.values())


def _collect(value: Any, storages: dict[int, int], visited: set[int]) -> None:
    if isinstance(value, Tensor):
        if not isinstance(value, nn.Parameter) and value.layout is torch.strided:
            storage = value.untyped_storage()
            storages[storage.data_ptr()] = storage.nbytes()
        return
    if id(value) in visited or isinstance(value, (nn.Module, Problem, type)):
        return
    visited.add(id(value))
    # Other mappings read from disk.
    if isinstance(value, dict):
        parts: Any = list(value.values())
    elif isinstance(value, (list, tuple)):
        parts = value
    elif type(value).__module__.partition(".")[0] == _PACKAGE and not isinstance(value, Mapping):
        slots = [name for kind in type(value).__mro__ for name in getattr(kind, "__slots__", ())]
        parts = [*getattr(value, "__dict__", {}).values(), *(getattr(value, name, None) for name in slots)]
    else:
        return
    for part in parts:
        _collect(part, storages, visited)

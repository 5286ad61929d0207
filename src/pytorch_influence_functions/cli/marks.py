"""What a run was made from, as hashes: the same weights, data and settings give the same marks."""

import hashlib
import re
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .._version import __version__
from ..core.progress import track
from ..influence.method import AbstractMethod
from ..problem.checkpoints import load_checkpoint
from ..problem.data import Source
from ..problem.problem import Problem
from .task import Task

# The address of a function: other in every process.
_ADDRESS = re.compile(r" at 0x[0-9a-fA-F]+")

Settings = dict[str, Any]


def marks(task: Task, method: AbstractMethod, settings: Mapping[str, Any], queries: Source | None) -> dict[str, str]:
    """Hashes of weights, training data, queries, settings and the task file's text; reads all the data once."""
    found = {"weights": _weights(task.problem)} | data_marks(task.problem.data, queries)
    # What the model and the loss compute is told by the text they are made in, as well as by weights and names.
    text = hashlib.sha256(task.path.read_bytes()).hexdigest()
    return found | {"settings": _hash(words(task, method, settings)), "task file": text}


def data_marks(train: Source, queries: Source | None) -> dict[str, str]:
    """Hashes of the training data and of the queries."""
    found = {"training data": _data(train, "training data")}
    return found if queries is None else found | {"queries": _data(queries, "queries")}


def words(task: Task, method: AbstractMethod, settings: Mapping[str, Any]) -> Settings:
    """Everything but tensors that the scores depend on, in words."""
    p = task.problem
    found: Settings = {
        "version": __version__,
        "method": repr(method),
        "objective": repr(p.objective),
        "measure": repr(task.measure),
        "parameters": [[b.name, list(b.parameters)] for b in p.space.blocks.values()],
        "weight_decay": repr(p.weight_decay),
        "batch_size": p.batch_size,
    } | dict(settings)
    return {k: _ADDRESS.sub("", v) if isinstance(v, str) else v for k, v in found.items()}


def _hash(found: Settings) -> str:
    made = hashlib.sha256()
    absorb(made, found)
    return made.hexdigest()


def _weights(problem: Problem) -> str:
    made = hashlib.sha256()
    states = [load_checkpoint(c) for c in problem.checkpoints] or [problem.model.state_dict()]
    for state in states:
        absorb(made, dict(sorted(state.items())))
    return made.hexdigest()


def _data(source: Source, label: str) -> str:
    made = hashlib.sha256()
    for ids, batch in track(source.batches(), len(source), f"reading {label}", lambda pair: len(pair[0]), "ex"):
        absorb(made, [ids, batch])
    return made.hexdigest()


def absorb(made: Any, value: Any) -> None:
    """Add a nested value to a hash; containers and kinds count, so that no two read the same."""
    if isinstance(value, np.ndarray) and value.dtype.kind in "biufc":
        value = torch.from_numpy(np.ascontiguousarray(value))
    if isinstance(value, Tensor):
        flat = value.detach().cpu().contiguous()
        made.update(f"tensor {flat.dtype} {tuple(flat.shape)};".encode())
        made.update(flat.reshape(-1).view(torch.uint8).numpy().tobytes())
    elif isinstance(value, Mapping):
        made.update(f"mapping {len(value)};".encode())
        for key, one in value.items():
            absorb(made, str(key))
            absorb(made, one)
    elif isinstance(value, (list, tuple)):
        made.update(f"list {len(value)};".encode())
        for one in value:
            absorb(made, one)
    else:
        text = _ADDRESS.sub("", repr(value))
        made.update(f"{type(value).__name__} {len(text)};{text}".encode())

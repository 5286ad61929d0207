"""The second mode's gradients: kept in an index, which an interrupted or later run finds again."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from ..core.distributed import alone
from ..core.files import InUse
from ..core.progress import track
from ..linalg.blocks import Dense
from ..linalg.chunks import chunks
from ..linalg.rows import Rows
from ..store.build import IndexDiffers, Plan, build
from ..store.stored_gradients import StoredGradients
from .console import log
from .engine import Engine, lists_of
from .files import Vectors, save_vectors, vector_file_name

# Numbers of s_test vectors that are in memory at once.
_NUMBERS_AT_ONCE = 1 << 26
# Seconds between two looks at a folder that another run is writing to.
_PAUSE = 0.5


def index_gradients(engine: Engine, folder: Path) -> StoredGradients:
    """The gradients of all training items, exactly, computed unless the folder holds them already.

    What an interrupted run stored is used; what was stored of another model, loss or other data is replaced. Runs that
    share a folder compute them once: the others wait.
    """
    plan = Plan.of_gradients(engine.derivatives, engine.problem)
    waits = False
    while True:
        try:
            with alone():  # whoever comes first writes, and the others wait
                return _indexed(plan, folder, len(engine))
        except InUse as cause:
            if not waits:
                log.info("%s This run waits.", cause)
            waits = True
            time.sleep(_PAUSE)


def _indexed(plan: Plan, folder: Path, n: int) -> StoredGradients:
    try:
        manifest = build(plan, folder, None, overwrite=False)
        whole = manifest.examples == n and not manifest.removed
    except IndexDiffers as cause:
        log.info("The gradients are computed anew: %s", cause)
        whole = False
    if not whole:
        build(plan, folder, None, overwrite=True)
    return StoredGradients.open(folder)


def write_gradient_files(stored: StoredGradients, folder: Path, pattern: str) -> None:
    """One file of tensors per training item."""
    names = stored.names
    for ids, rows in track(stored.stream(), len(stored), "files of gradients", lambda part: len(part[0])):
        for chunk in chunks(len(ids), stored.space.size):
            lists = lists_of(rows.take(chunk), stored.space, names)
            for i, vectors in zip(ids[chunk].tolist(), lists, strict=True):
                save_vectors(vectors, folder / vector_file_name(pattern, i))


def indexed_products(engine: Engine, stored: StoredGradients, solved: Sequence[Vectors]) -> Tensor:
    """(1/N) <s_test, gradient>, [queries, N], from both as they are stored."""
    count, n = max(1, _NUMBERS_AT_ONCE // stored.space.size), len(stored)
    blocks = []
    for start in range(0, len(solved), count):
        queries = Rows.cat([engine.from_list(vectors) for vectors in solved[start : start + count]])
        queries = queries.map(lambda _, block: Dense(block.dense().cpu()))
        values = torch.empty(len(queries), n, dtype=torch.promote_types(queries.dtype, torch.float32))
        for ids, rows in stored.stream():
            values[:, ids] = rows.inner(queries).T.cpu() / n
        blocks.append(values)
    return torch.cat(blocks)

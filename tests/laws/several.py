"""Programs that several processes of one machine run together, and what each of them gave."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

_LONGEST = timedelta(minutes=10)
"""That a process waits for another, on a busy machine."""


def run_on(size: int, program: Callable[..., Any], folder: Path, *arguments: Any) -> list[Any]:
    """What `program(rank, *arguments)` returned on each of `size` processes of a gloo group, by rank.

    One that raises or ends ends the others: the wait is over, with its traceback.
    """
    folder.mkdir(parents=True, exist_ok=True)
    # A copy of this process has everything imported, which takes a fresh one five seconds; where it may have threads
    # (of sums in parallel, of a GPU's autograd) a copy could wait for them for ever.
    copies = sys.platform == "linux" and torch.get_num_threads() == 1 and not torch.cuda.is_available()
    method = "fork" if copies else "spawn"
    mp.start_processes(_process, args=(size, program, folder, arguments), nprocs=size, start_method=method)
    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(size)]


def _process(rank: int, size: int, program: Callable[..., Any], folder: Path, arguments: tuple[Any, ...]) -> None:
    torch.set_num_threads(1)
    os.environ["PTIF_PROGRESS"] = "0"
    # A file, so that no port has to be free; as a store, because a path in an address has its spaces quoted, and torch
    # waits for ever for a file of that name.
    store = dist.FileStore(os.fspath(folder / "meeting"), size)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=size, timeout=_LONGEST)
    torch.save(program(rank, *arguments), folder / f"{rank}.pt")
    dist.destroy_process_group()


def message_of(program: Callable[[], Any]) -> str:
    """The kind and words of what a program raises; empty where it ends."""
    try:
        program()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return ""

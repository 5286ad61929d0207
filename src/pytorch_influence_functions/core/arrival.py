"""How the processes of a job come together before any group is made, and how they part."""

from __future__ import annotations

import atexit
import logging
import os
import time
from contextlib import suppress
from datetime import timedelta
from typing import Any, Final

import torch.distributed as dist

from .errors import ProcessFailed

log = logging.getLogger("pytorch_influence_functions")

_PATIENCE: Final = 20.0
"""Seconds after which a process that waits says so."""
_GLOO_WAITS: Final = 1800.0
_LOOKS: Final = 5.0
"""Seconds in which the store is found where it is still there."""
_made: list[Any] = []
"""The groups that this library made."""
_joined = [0]
"""How often all processes have come together."""


def restarts() -> int:
    """How often torchrun has started this job again."""
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"))


def under_torchrun() -> bool:
    """Whether torchrun started this process, and keeps a store for all of them."""
    return os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"


def agents_store(timeout: float = 300.0) -> Any:
    """The store that torchrun's agent keeps; it is looked for as many seconds as `timeout` says."""
    host, port, size = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), int(os.environ["WORLD_SIZE"])
    limit = timedelta(seconds=timeout)
    return dist.TCPStore(host, port, size, is_master=False, timeout=limit)  # type: ignore[attr-defined]


def wait_for_all(rank: int, size: int, timeout: float | None, cure: str) -> None:
    """Wait until every process is here. What makes groups would wait as long without a word.

    Args:
        rank: of this process.
        size: how many there are.
        timeout: seconds; None: as long as gloo does.
        cure: what to do where one does not come.

    Raises:
        ProcessFailed: one has ended, or did not come in time.
    """
    if (board := _board()) is None:
        return
    here = [f"here {_joined[0]} {other}" for other in range(size)]
    board.set(here[rank], "")
    began, told, pause = time.monotonic(), False, 0.001
    while missing := [other for other in range(size) if not board.check([here[other]])]:
        waited = time.monotonic() - began
        if gone := [other for other in missing if board.check([f"ended {other}"])]:
            raise ProcessFailed(f"Process {gone[0]} of {size} ended without coming to ptif.distributed(); {cure}.")
        if waited > (timeout or _GLOO_WAITS):
            raise ProcessFailed(f"Process {missing[0]} of {size} did not come to ptif.distributed() in time; {cure}.")
        if waited > _PATIENCE and not told:
            log.warning(
                "Process %d of %d waits for process %d to come to ptif.distributed(); %s.", rank, size, missing[0], cure
            )
            told = True
        time.sleep(pause)
        pause = min(0.2, 2 * pause)
    _joined[0] += 1


def leave_in_order(group: Any) -> None:
    """End a group with this process: torch aborts a program that ends with groups beside the first one open.

    Args:
        group: one that this library made.
    """
    _made.append(group)


def _board() -> Any:
    """A store in which all processes of the job can read and write; None where there is none."""
    with suppress(RuntimeError, ValueError, KeyError, OSError):
        if under_torchrun():
            return dist.PrefixStore(f"ptif {restarts()}", agents_store(_LOOKS))  # type: ignore[attr-defined]
        if dist.is_initialized():
            from torch.distributed.distributed_c10d import _get_default_store

            return dist.PrefixStore("ptif", _get_default_store())  # type: ignore[attr-defined]
    return None


@atexit.register
def _leave() -> None:
    """Tell those who still wait that this process has ended, and end the groups of this library."""
    if not dist.is_available():
        return
    if int(os.environ.get("WORLD_SIZE", "1")) > 1 or dist.is_initialized():
        rank = dist.get_rank() if dist.is_initialized() else int(os.environ.get("RANK", "0"))
        with suppress(RuntimeError, ValueError):
            if (board := _board()) is not None:
                board.set(f"ended {rank}", "")
    while _made:
        group = _made.pop()
        with suppress(RuntimeError, ValueError, AssertionError):
            dist.destroy_process_group(group)

"""How the processes of a job come together before any group is made, and how they part."""

from __future__ import annotations

import atexit
import logging
import os
import time
from contextlib import suppress
from dataclasses import dataclass
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
_ALL: Final = "all are here"
_PROCESS: Final = "PTIF_PROCESS"
"""The variable in which the process that torchrun started names itself to those that it starts."""
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


def _rank_of_the_job() -> str:
    """The process that torchrun started: the first to import this library, as those that it starts inherit variables.

    What else is started within a job may be another job, with an address of its own.
    """
    own = str(os.getpid())
    if not under_torchrun():
        return own
    job = " ".join(os.environ.get(name, "") for name in ("MASTER_ADDR", "MASTER_PORT", "RANK")) + f" {restarts()}"
    known, _, process = os.environ.get(_PROCESS, "").rpartition(" ")
    if known == job:
        return process
    os.environ[_PROCESS] = f"{job} {own}"
    return own


_rank_is = [_rank_of_the_job()]
"""The process that is this rank: the one that torchrun started, or that came to the others."""


def wait_for_all(rank: int, size: int, timeout: float | None, cure: str) -> None:
    """Wait until every process is here. What makes groups would wait as long without a word.

    Args:
        rank: of this process.
        size: how many there are.
        timeout: seconds; None: as long as gloo does.
        cure: what to do where one does not come.

    Raises:
        ProcessFailed: one has ended, or did not come in time; on every process, also on one that comes later.
    """
    _rank_is[:] = [str(os.getpid())]
    if (board := _board()) is None:
        return
    meeting = _Meeting(board, _joined[0], size)
    _joined[0] += 1
    board.set(meeting.here[rank], "")
    began, told, pause = time.monotonic(), False, 0.001
    while not (outcome := meeting.outcome(time.monotonic() - began > (timeout or _GLOO_WAITS))):
        if time.monotonic() - began > _PATIENCE and not told:
            log.warning(
                "Process %d of %d waits for process %d to come to ptif.distributed(); %s.",
                rank,
                size,
                meeting.missing(),
                cure,
            )
            told = True
        time.sleep(pause)
        pause = min(0.2, 2 * pause)
    if outcome != _ALL:
        raise ProcessFailed(f"{outcome}; {cure}.")


@dataclass(frozen=True)
class _Meeting:
    """One coming together of all processes, as it stands on the board; all of them take it to have ended alike."""

    board: Any
    number: int
    size: int

    @property
    def here(self) -> list[str]:
        return [f"here {self.number} {rank}" for rank in range(self.size)]

    def missing(self) -> int:
        """The first process that is not here; 0 where all are."""
        return next((rank for rank, key in enumerate(self.here) if not self.board.check([key])), 0)

    def outcome(self, late: bool) -> str:
        """What became of it: `_ALL`, or why it failed; empty while it is open.

        Args:
            late: whether this process waits no longer.
        """
        key = f"outcome {self.number}"
        ended = next((rank for rank in range(self.size) if self.board.check([f"ended {rank}"])), None)
        if ended is not None:
            came = self.board.check([self.here[ended]])
            return f"Process {ended} of {self.size} ended " + (
                "as the others came to ptif.distributed()" if came else "without coming to ptif.distributed()"
            )
        if self.board.check(self.here):
            own = _ALL
        elif late:
            own = f"Process {self.missing()} of {self.size} did not come to ptif.distributed() in time"
        else:
            own = ""
        if not own and not self.board.check([key]):
            return ""
        # Whoever is first writes it down. One that comes just as another gives up is thereby told of it.
        written: bytes = self.board.compare_set(key, "", own)
        return written.decode()


def leave_in_order(group: Any) -> None:
    """End a group with this process: torch aborts a program that ends with groups beside the first one open.

    Args:
        group: one that this library made.
    """
    _rank_is[:] = [str(os.getpid())]
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
    """Tell those who still wait that this process has ended, and end the groups of this library.

    A process that another started, as a `DataLoader` does, is not the one that they wait for.
    """
    if _rank_is != [str(os.getpid())] or not dist.is_available():
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

"""World: which share of the work is ours. One process does everything, unless `distributed()` shares it out.

Work is shared out only where it was asked for: a process that computes alone while others wait for it, as in
`if rank == 0:`, must not be drawn into sums that nobody else takes part in.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Final, ParamSpec, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from .arrival import agents_store, leave_in_order, restarts, under_torchrun, wait_for_all
from .errors import InvalidInput, ProcessFailed, first_line
from .processes import Link

P = ParamSpec("P")
R = TypeVar("R")


@dataclass(frozen=True)
class World:
    """One of `size` processes, number `rank`; every one runs the same code on its own share of the examples.

    Args:
        rank: which one this is, counted from 0.
        size: how many there are.
        link: how they talk to each other; `None`: not at all, as for one alone.
        among: how many processes are at the same work, each by itself; those that share it out are `size`.
        apart: whether what this one does differs from what the others do.

    Example:
        >>> [World(rank, 3).share(7) for rank in range(3)]
        [slice(0, 2, None), slice(2, 4, None), slice(4, 7, None)]
    """

    rank: int = 0
    size: int = 1
    link: Link | None = field(default=None, repr=False, compare=False)
    among: int = field(default=1, repr=False)
    apart: bool = field(default=False, repr=False)

    def __post_init__(self) -> None:
        if not 0 <= self.rank < self.size:
            raise InvalidInput(f"A world needs 0 <= rank < size, got rank {self.rank} of size {self.size}.")

    def share(self, count: int) -> slice:
        """This process's part of `count` items: neighbours, and over all processes each item exactly once."""
        return slice(self.rank * count // self.size, (self.rank + 1) * count // self.size)

    def sum_into(self, tensor: Tensor) -> Tensor:
        """Replace the tensor by the sum of every process's, and return it; nothing more is held.

        Args:
            tensor: of the same shape and dtype on every process, on any device.

        Raises:
            InvalidInput: the world has several processes that are not joined.
            ProcessFailed: another process failed, ended, or does something else.
        """
        if self.size > 1:
            self._joined.reduce(tensor, dist.ReduceOp.SUM)
        return tensor

    def all_sum(self, tensor: Tensor) -> Tensor:
        """The sum of every process's tensor, on every process; the argument is left as it is.

        Raises: as `sum_into`.
        """
        return tensor if self.size == 1 else self.sum_into(tensor.detach().clone())

    def all_max(self, tensor: Tensor) -> Tensor:
        """The largest of every process's numbers, place by place, on every process.

        Raises: as `sum_into`.
        """
        if self.size == 1:
            return tensor
        largest = tensor.detach().clone()
        self._joined.reduce(largest, dist.ReduceOp.MAX)
        return largest

    def largest(self, number: float) -> float:
        """The largest of every process's numbers, on every process: for what each measures of its own machine (seconds,
        bytes, room on a disk) and what all of them have to plan by.

        Raises: as `sum_into`.
        """
        return number if self.size == 1 else float(self.all_max(torch.tensor(number, dtype=torch.float64)))

    def gather(self, tensor: Tensor) -> list[Tensor]:
        """Every process's tensor by rank, on every process; shapes may differ, dtypes may not.

        Raises: as `sum_into`.
        """
        return [tensor] if self.size == 1 else self._joined.gather(tensor)

    def broadcast(self, tensor: Tensor, source: int) -> Tensor:
        """Replace the tensor by that of process `source`, which has the same shape and dtype, and return it.

        Raises: as `sum_into`.
        """
        if self.size > 1:
            self._joined.broadcast(tensor, source)
        return tensor

    def decided(self, decision: Tensor) -> Tensor:
        """What process 0 decides, on every process: rounding differs between machines, and who stops a step before the
        others leaves them without its part of the next sum.

        Args:
            decision: booleans or integers, of the same shape on every process.

        Raises: as `sum_into`.
        """
        return decision if self.size == 1 else self.broadcast(decision.long().clone(), 0).to(decision.dtype)

    def decides(self, decision: bool) -> bool:
        """One boolean of process 0, on every process; see `decided`.

        Raises: as `sum_into`.
        """
        return decision if self.size == 1 else bool(self.decided(torch.tensor(decision)))

    def exchange(self, text: str) -> list[str]:
        """Every process's text by rank, on every process.

        Raises: as `sum_into`.
        """
        return [text] if self.size == 1 else self._joined.exchange(text)

    def meet(self, doing: str) -> None:
        """Wait until every process is about to do this: one that failed before is heard of here.

        Raises: as `sum_into`.
        """
        if self.link is not None:
            self.link.meet(doing)

    @contextmanager
    def unheard(self) -> Iterator[None]:
        """What fails inside ends this process at once: the others are in exchanges of the model's own, and cannot
        be told."""
        try:
            yield
        except Exception as error:
            error._told = self.link  # type: ignore[attr-defined]
            raise

    def agree(self, facts: Callable[[], Mapping[str, str]]) -> None:
        """Make sure that every process has the same `facts`, by name; they are worked out only if there are several.

        Raises:
            InvalidInput: they differ; on every process, with the name and the first two that differ.
        """
        if self.size > 1:
            self._joined.agree(facts())

    @property
    def _joined(self) -> Link:
        if self.link is None:
            raise InvalidInput(
                f"A world of {self.size} cannot compute together: its processes are not joined; open one with "
                "`with ptif.distributed():`."
            )
        return self.link


_OPEN: Final = "open the block on every process, or leave it out where one computes alone, as under `if rank == 0:`"
_ALONE = World()
_world: ContextVar[World] = ContextVar("world", default=_ALONE)
_links: list[tuple[object, float | None, Link]] = []
"""The link of the running process group, with what it was made for: groups are made once."""


def running() -> bool:
    """Whether a process group of `torch.distributed` exists."""
    return dist.is_available() and dist.is_initialized()


def process_rank() -> int:
    """This process's rank in the running group, shared out or not: who writes files that all would write."""
    return dist.get_rank() if running() else 0


def process_count() -> int:
    """How many processes the running group has, shared out or not; without a group, how many torchrun started."""
    if running():
        return dist.get_world_size()
    return int(os.environ["WORLD_SIZE"]) if under_torchrun() else 1


def current() -> World:
    """The world of the `distributed()` block that is open, or a world of one."""
    return _world.get()


@contextmanager
def distributed(timeout: float | None = None) -> Iterator[World]:
    """Share the work of every call within this block out over the processes of `torch.distributed`.

    Every process opens the block and makes the same calls in it, with the same model, data and settings; each call
    compares them first. Every process computes on its share of the training examples and has the whole result. Where
    torchrun started the processes and no group exists, one is made and left running; in a single process the block
    changes nothing, so that the same script runs on a laptop. Without the block, every process computes alone.

    Args:
        timeout: seconds that a process waits for the others; `None`: 30 minutes, as gloo does.

    Raises:
        InvalidInput: the processes do not make the same calls, or ask with different models, data or settings.
        ProcessFailed: another process failed, ended, or did not come within `timeout`. Every process raises.

    Example:
        >>> with distributed() as world:
        ...     world
        World(rank=0, size=1)
    """
    if current().link is not None:
        yield current()
        return
    world = _join(timeout)
    token = _world.set(world)
    try:
        if world.link is None:
            yield world
        else:
            with world.link.call("the block of distributed()"):
                yield world
    finally:
        _world.reset(token)


@contextmanager
def alone(apart: bool = True) -> Iterator[None]:
    """Within this block the process computes everything itself.

    Args:
        apart: whether the work differs from process to process.
    """
    among = current().size if current().link is not None else current().among
    token = _world.set(World(among=among, apart=apart and among > 1))
    try:
        yield
    finally:
        _world.reset(token)


def together(function: Callable[P, R]) -> Callable[P, R]:
    """A public call that all processes of a `distributed()` block begin together, and end together or not at all."""

    @functools.wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        link = current().link
        if link is None:
            return function(*args, **kwargs)
        with link.call(f"{function.__name__.lstrip('_')}()"):
            return function(*args, **kwargs)

    return call


def _join(timeout: float | None) -> World:
    """The world of the running process group; of one that is made, where torchrun started us."""
    if not dist.is_available():
        return _ALONE
    try:
        if not dist.is_initialized():
            if int(os.environ.get("WORLD_SIZE", "1")) == 1 or "RANK" not in os.environ:
                return _ALONE
            wait_for_all(int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"]), timeout, _OPEN)
            _make_group(timeout)
            leave_in_order(dist.group.WORLD)
        rank, size = dist.get_rank(), dist.get_world_size()
        return _ALONE if size == 1 else World(rank, size, _link(rank, size, timeout), size)
    except ProcessFailed:
        raise
    except (RuntimeError, ValueError) as cause:
        raise ProcessFailed(
            f"Not every process came to ptif.distributed() in time ({first_line(cause)}); {_cure()}."
        ) from cause


def _make_group(timeout: float | None) -> None:
    """The process group that torchrun's variables describe.

    A restart of torchrun finds the addresses of the earlier attempt in the store that its agent kept; each attempt
    therefore has keys of its own.
    """
    limit = None if timeout is None else timedelta(seconds=timeout)
    if not under_torchrun():
        dist.init_process_group(timeout=limit)
        return
    keys = agents_store() if timeout is None else agents_store(timeout)
    store = dist.PrefixStore(f"attempt {restarts()}", keys)  # type: ignore[attr-defined]
    rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    dist.init_process_group(store=store, rank=rank, world_size=size, timeout=limit)


def _cure() -> str:
    if restarts() and under_torchrun():
        return (
            "after a restart torchrun hands out addresses of the attempt before: let ptif.distributed() make the "
            "process group, or start torchrun with TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 in its environment"
        )
    return _OPEN


def _link(rank: int, size: int, timeout: float | None) -> Link:
    group = dist.group.WORLD
    for known, seconds, link in _links:
        if known is group and seconds == timeout:
            return link
    wait_for_all(rank, size, timeout, _OPEN)
    limit = None if timeout is None else timedelta(seconds=timeout)
    # Groups of our own: what the user's own group sends at the same time cannot be taken for ours.
    control = dist.new_group(backend="gloo", timeout=limit)
    on_devices = torch.cuda.is_available() and "nccl" in dist.get_backend_config()
    devices = dist.new_group(backend="nccl", timeout=limit) if on_devices else None
    for made in (control, devices):
        if made is not None:
            leave_in_order(made)
    link = Link(rank, size, control, devices)
    _links[:] = [entry for entry in _links if entry[0] is group]
    _links.append((group, timeout, link))
    return link

"""World: which share of the work is ours. One worker by default; `torch.distributed` when it is running."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch.distributed as dist
from torch import Tensor

from .errors import InvalidInput

T = TypeVar("T")


@dataclass(frozen=True)
class World:
    """One of `size` workers, number `rank`; every worker runs the same code on its own share.

    Example:
        >>> World(rank=1, size=3).shard(range(7))
        [1, 4]
    """

    rank: int = 0
    size: int = 1

    def __post_init__(self) -> None:
        if not 0 <= self.rank < self.size:
            raise InvalidInput(f"A world needs 0 <= rank < size, got rank {self.rank} of size {self.size}.")

    def shard(self, items: Sequence[T]) -> list[T]:
        """Every `size`-th item from `rank` on: over all ranks, each item exactly once."""
        return list(items[self.rank :: self.size])

    def all_sum(self, tensor: Tensor) -> Tensor:
        """The sum of every worker's tensor, on every worker; the argument is left as it is.

        Raises:
            InvalidInput: the world has several workers but `torch.distributed` is not running.
        """
        if self.size == 1:
            return tensor
        if not running():
            raise InvalidInput(
                f"A world of {self.size} cannot sum: torch.distributed is not initialised; "
                "call torch.distributed.init_process_group first."
            )
        total = tensor.detach().clone()
        dist.all_reduce(total)
        return total


def running() -> bool:
    """Whether a process group of `torch.distributed` exists."""
    return dist.is_available() and dist.is_initialized()


def current() -> World:
    """This process's place in the running process group, or a world of one."""
    return World(dist.get_rank(), dist.get_world_size()) if running() else World()

"""At which steps a training run is recorded."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Protocol, final

from ..core.errors import InvalidInput
from ..core.validate import finite_number, whole_number

SHARES = (0.02, 0.05, 0.1, 0.2, 0.4, 0.7, 1.0)
"""Shares of the run at which it is recorded, where its length is known: early steps change a model most."""
# Between two doublings a run of unknown length is recorded so many times.
_PER_DOUBLING = 4


class Schedule(Protocol):
    """At which steps checkpoints are written, and which of them stay."""

    def wants(self, step: int) -> bool:
        """Whether a checkpoint is written after this step."""

    def keep(self, steps: Sequence[int]) -> list[int]:
        """Which of the written steps, in ascending order, stay."""

    @property
    def most(self) -> int:
        """The most checkpoints that stay."""


@final
@dataclass(frozen=True)
class SharesOfRun:
    """At given shares of a run of known length.

    >>> SharesOfRun((0.02, 0.5, 1.0), 200).targets
    (4, 100, 200)
    """

    shares: tuple[float, ...]
    steps: int

    @cached_property
    def targets(self) -> tuple[int, ...]:
        """The steps after which a checkpoint is written; 0 stands for the weights before the first one."""
        return tuple(sorted({min(self.steps, max(int(s > 0), round(s * self.steps))) for s in self.shares}))

    @property
    def most(self) -> int:
        # The last step of a run that ended early, or late, is kept besides.
        return len(self.targets) + 1

    def wants(self, step: int) -> bool:
        return step in self.targets

    def keep(self, steps: Sequence[int]) -> list[int]:
        return list(steps)


@final
@dataclass(frozen=True)
class Doubling:
    """At doubling distances, whatever the length of the run will be.

    Four checkpoints are written per doubling; one goes as soon as its two neighbours lie within a factor of two of each
    other. So the powers of two stay, and the latest one. Beyond `most` the earliest goes.

    >>> steps: list[int] = []
    >>> for step in range(1, 101):
    ...     if Doubling(6).wants(step):
    ...         steps = Doubling(6).keep([*steps, step])
    >>> steps
    [4, 8, 16, 32, 64, 91]
    """

    most: int

    def wants(self, step: int) -> bool:
        if step < 1:
            return False
        nearest = (step.bit_length() - 1) * _PER_DOUBLING
        return any(round(2 ** (k / _PER_DOUBLING)) == step for k in range(nearest, nearest + _PER_DOUBLING + 1))

    def keep(self, steps: Sequence[int]) -> list[int]:
        kept = list(steps)
        for k in reversed(range(1, len(kept) - 1)):
            if kept[k + 1] <= 2 * kept[k - 1]:
                del kept[k]
        return kept[-self.most :]


def make_schedule(at: Iterable[float] | None, steps: int | None, most: int) -> Schedule:
    """The schedule of a run of so many `steps`, or of unknown length where that is None.

    Raises:
        InvalidInput: a share outside 0 to 1, shares without the number of steps, or numbers that are none.
    """
    whole_number("most", most, 2, owner="Recorder", hint="8 is usual")
    if steps is None:
        if at is not None:
            raise InvalidInput(
                "Recorder(at=...) gives shares of a run whose length is not known; give steps= too, or leave at= out."
            )
        return Doubling(most)
    whole_number("steps", steps, owner="Recorder", hint="the optimiser steps of the whole run, or None")
    try:
        shares = tuple(SHARES if at is None else at)
    except TypeError as cause:
        raise InvalidInput(f"Recorder(at={at!r}) must be shares of the run, such as (0.1, 0.5, 1.0).") from cause
    for share in shares:
        finite_number("A share in at=", share, least=0, most=1)
    if not shares:
        raise InvalidInput("Recorder(at=()) records nothing; give at least one share of the run, such as 1.0.")
    return SharesOfRun(tuple(float(s) for s in shares), steps)

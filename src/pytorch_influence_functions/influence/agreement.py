"""In which units the scores of several checkpoints are averaged, and how alike the checkpoints were."""

from __future__ import annotations

import enum
import math
from dataclasses import dataclass, field

import torch

from ..core.errors import InvalidInput


class Units(enum.Enum):
    """In which units the scores of several checkpoints are averaged."""

    RAW = "raw"
    """As they are: the checkpoint with the largest scores weighs most."""
    SPREAD = "spread"
    """Each in units of its own spread; the average is in units of the geometric mean of the spreads."""
    FINAL = "final"
    """Each in units of its own spread; the average is in units of the last checkpoint's spread."""

    @classmethod
    def of(cls, value: Units | str) -> Units:
        """Units from their name, such as `"spread"`.

        Args:
            value: units or their name.

        Raises:
            InvalidInput: there are none of this name.
        """
        try:
            return cls(value)
        except ValueError:
            known = ", ".join(repr(u.value) for u in cls)
            raise InvalidInput(f"units={value!r} are none; choose one of {known}.") from None


@dataclass(frozen=True)
class CheckpointAgreement:
    """How alike the scores of several checkpoints are: one number per query in each list; empty where not measured."""

    correlations: list[float] = field(default_factory=list)
    """The mean correlation between the rows of two checkpoints."""
    ranges: list[float] = field(default_factory=list)
    """The largest spread over the smallest one."""
    shares: list[float] = field(default_factory=list)
    """The spread of the average, in units of its checkpoints'."""

    def __add__(self, other: CheckpointAgreement) -> CheckpointAgreement:
        return CheckpointAgreement(
            self.correlations + other.correlations, self.ranges + other.ranges, self.shares + other.shares
        )

    def notes(self, units: Units) -> tuple[str, ...]:
        """What should be read with the average, in one sentence."""
        if not self.correlations:
            return ()
        correlation, size, share = (_median(v) for v in (self.correlations, self.ranges, self.shares))
        named = "the geometric mean of their spreads" if units is Units.SPREAD else "the last one's spread"
        return (
            f"averaged in units of each checkpoint's spread and given in units of {named}: rows of two checkpoints "
            f"correlate {correlation:.2f}, spreads differ by a factor of up to {size:.2g} and averaging leaves "
            f"{share:.0%} of them (medians over queries); so trust the order within a query, and the size of a score "
            "no further than such a factor until verify() has checked it",
        )


def _median(values: list[float]) -> float:
    return float(torch.tensor(values, dtype=torch.float64).median()) if values else math.nan

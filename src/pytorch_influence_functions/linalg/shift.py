"""D = damping + weight decay per block: what is added to the curvature before a system is solved."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from ..core.errors import InvalidInput
from ..core.validate import finite_number
from .rows import Rows


@dataclass(frozen=True)
class Shift:
    """The diagonal `D = damping + decay[block]` that is added to the curvature.

    `decay` names every block of the space, or is empty when there is no weight decay. `blocks`, where given, is the
    damping of each block, and `damping` only their mean, for the record. Raises `InvalidInput` for a negative or
    non-finite number.

    >>> Shift(0.1, {"a": 0.5, "b": 0.5}).uniform
    0.6
    >>> Shift(0.1, {"a": 0.5, "b": 0.0}).uniform is None
    True
    >>> Shift(0.2, blocks={"a": 0.1, "b": 0.3}).over(["a", "b"])
    {'a': 0.1, 'b': 0.3}
    """

    damping: float
    decay: Mapping[str, float] = field(default_factory=dict)
    blocks: Mapping[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        finite_number("The damping", self.damping, least=0)
        for name, value in self.blocks.items():
            finite_number(f"The damping of {name!r}", value, least=0)
        for name, value in self.decay.items():
            finite_number(f"The weight decay of {name!r}", value, least=0)
        if self.decay and self.blocks and set(self.decay) != set(self.blocks):
            odd = sorted(set(self.decay) ^ set(self.blocks))
            raise InvalidInput(f"Damping and weight decay must name the same blocks; check {odd[:5]}.")

    @property
    def _per_block(self) -> dict[str, float]:
        """D block by block; empty when one number is for all and no block is named."""
        names = self.decay or self.blocks
        return {k: self.blocks.get(k, self.damping) + self.decay.get(k, 0.0) for k in names}

    @property
    def uniform(self) -> float | None:
        """The one number on the diagonal, or `None` when blocks differ."""
        values = set(self._per_block.values()) or {self.damping}
        return values.pop() if len(values) == 1 else None

    @property
    def smallest(self) -> float:
        """The smallest number on the diagonal."""
        return min(self._per_block.values(), default=self.damping)

    @property
    def largest(self) -> float:
        """The largest number on the diagonal."""
        return max(self._per_block.values(), default=self.damping)

    def over(self, names: Iterable[str]) -> dict[str, float]:
        """`D` block by block; raises `InvalidInput` unless what is named are exactly these blocks, or none."""
        names, numbers = list(names), self._per_block
        if numbers and set(numbers) != set(names):
            odd = sorted(set(numbers) ^ set(names))
            raise InvalidInput(f"The weight decay must name every block of the space or none; check {odd[:5]}.")
        return {name: numbers.get(name, self.damping) for name in names}

    def apply(self, rows: Rows) -> Rows:
        """`D x` for every row."""
        return rows.scaled(self.over(rows.blocks))

    def inverse(self, rows: Rows) -> Rows:
        """`D^-1 x` for every row; raises `InvalidInput` where D is zero."""
        if self.smallest <= 0:
            raise InvalidInput("D has a zero on its diagonal and cannot be inverted; use a positive damping.")
        return rows.scaled({name: 1.0 / d for name, d in self.over(rows.blocks).items()})

    def only(self, names: Iterable[str]) -> Shift:
        """The same numbers on some blocks."""
        names = list(names)
        some = [{k: numbers[k] for k in names} if numbers else {} for numbers in (self.decay, self.blocks)]
        return Shift(self.damping, *some)

    def with_damping(self, damping: float) -> Shift:
        """The same weight decay under another damping, one number for all blocks."""
        return Shift(damping, self.decay)

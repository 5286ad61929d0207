"""How much is added to the curvature before it is inverted.

`D = damping + weight decay` is diagonal. Damping keeps the answer near the trained weights and makes an
indefinite or singular curvature invertible; weight decay is part of the objective's own curvature. The two
are held apart in `Shift`, because only the first is a choice.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Protocol, runtime_checkable

from .errors import InvalidInput, NonFinite
from .rows import Rows


@runtime_checkable
class HasMeanEigenvalue(Protocol):
    """All that a damping rule asks of an operator."""

    def mean_eigenvalue(self) -> float: ...

    def block_means(self) -> dict[str, float]: ...


class AbstractDamping(ABC):
    """A rule that gives lambda, in units of the curvature, for an operator."""

    @abstractmethod
    def of(self, operator: HasMeanEigenvalue) -> float:
        """Lambda for this operator: finite and not negative; where blocks differ, their size-weighted mean."""

    def blocks(self, operator: HasMeanEigenvalue) -> dict[str, float]:
        """Lambda block by block where this rule tells blocks apart; empty where one number is for all."""
        return {}

    def resolved(self, fitted: object) -> AbstractDamping:
        """The rule to use for one fitted curvature, model and data in view; most rules need no more than `operator`."""
        return self


def _finite_number(name: str, value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise InvalidInput(f"{name} is {value!r}; it must be a number.")
    if not math.isfinite(value):
        raise InvalidInput(f"{name} is {value}; it must be finite.")
    return float(value)


@dataclass(frozen=True)
class Relative(AbstractDamping):
    """`lambda = share * mean eigenvalue of C`: the same share means the same thing for any loss or scale.

    `mean eigenvalue = trace(C) / P`. With `per_block`, every block of parameters (a layer's weight with its bias, a
    norm's scale) gets the share of the mean eigenvalue of its own diagonal block: layers whose gradients are small are
    then damped less. A block without any curvature gets the share of the overall mean. Raises `InvalidInput` for
    `share <= 0`, and where the mean eigenvalue is not positive, for there "relative to the curvature" says nothing.

    >>> class Ten:
    ...     def mean_eigenvalue(self): return 10.0
    ...     def block_means(self): return {"a": 5.0, "b": 15.0}
    >>> Relative(0.1).of(Ten())
    1.0
    >>> Relative(0.1, per_block=True).blocks(Ten())
    {'a': 0.5, 'b': 1.5}
    """

    share: float | int = 0.1
    per_block: bool = False

    def __post_init__(self) -> None:
        if _finite_number("Relative's share", self.share) <= 0:
            raise InvalidInput(f"Relative(share={self.share}) must be positive; 0.1 is a good start.")

    def of(self, operator: HasMeanEigenvalue) -> float:
        mean = operator.mean_eigenvalue()
        if not math.isfinite(mean):
            raise NonFinite(f"The mean eigenvalue of the curvature is {mean}; look for NaN in weights or data.")
        if mean <= 0:
            raise InvalidInput(
                f"Relative() scales the mean eigenvalue of the curvature, which is {mean:.3g} here; "
                "use GGN() instead of Hessian(), or Absolute(value)."
            )
        return self.share * mean

    def blocks(self, operator: HasMeanEigenvalue) -> dict[str, float]:
        if not self.per_block:
            return {}
        overall = self.of(operator)
        # A block that no example moves (a padding row, a dead layer) has no scale of its own.
        return {k: self.share * mean if mean > 0 else overall for k, mean in operator.block_means().items()}


@dataclass(frozen=True)
class Absolute(AbstractDamping):
    """`lambda = value`, in the units of the loss per squared parameter.

    `value = 0` is allowed: the solvers then refuse any curvature that is not positive definite by itself.

    >>> class Ten:
    ...     def mean_eigenvalue(self): return 10.0
    ...     def block_means(self): return {"a": 10.0}
    >>> Absolute(0.01).of(Ten())
    0.01
    """

    value: float

    def __post_init__(self) -> None:
        if _finite_number("Absolute's value", self.value) < 0:
            raise InvalidInput(f"Absolute(value={self.value}) must not be negative.")

    def of(self, operator: HasMeanEigenvalue) -> float:
        return float(self.value)


@dataclass(frozen=True)
class FromTraining(AbstractDamping):
    """`lambda = (1 - momentum) / (lr * steps)`: what stopping after `steps` of gradient descent amounts to.

    Directions with an eigenvalue well below this lambda have not been fitted yet, so removing an example
    cannot move the weights along them. `lr` is the mean learning rate over the run.

    >>> class Ten:
    ...     def mean_eigenvalue(self): return 10.0
    ...     def block_means(self): return {"a": 10.0}
    >>> round(FromTraining(lr=0.1, steps=1000, momentum=0.9).of(Ten()), 6)
    0.001
    """

    lr: float
    steps: int
    momentum: float = 0.0

    def __post_init__(self) -> None:
        if _finite_number("FromTraining's lr", self.lr) <= 0:
            raise InvalidInput(f"FromTraining(lr={self.lr}) must be positive: the mean learning rate of the run.")
        if _finite_number("FromTraining's steps", self.steps) < 1:
            raise InvalidInput(f"FromTraining(steps={self.steps}) must be at least 1: the optimiser's steps.")
        if not 0 <= _finite_number("FromTraining's momentum", self.momentum) < 1:
            raise InvalidInput(f"FromTraining(momentum={self.momentum}) must lie in [0, 1).")

    def of(self, operator: HasMeanEigenvalue) -> float:
        return (1.0 - self.momentum) / (self.lr * self.steps)


def as_damping(value: AbstractDamping | float) -> AbstractDamping:
    """A damping rule; a plain number is `Absolute`.

    >>> as_damping(0.5)
    Absolute(value=0.5)
    """
    return value if isinstance(value, AbstractDamping) else Absolute(value)


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
        for what, value in [
            ("The damping", self.damping),
            *((f"The damping of {k!r}", v) for k, v in self.blocks.items()),
        ]:
            if _finite_number(what, value) < 0:
                raise InvalidInput(f"{what} is {value}; it must not be negative.")
        for name, value in self.decay.items():
            if _finite_number(f"The weight decay of {name!r}", value) < 0:
                raise InvalidInput(f"The weight decay of {name!r} is {value}; it must not be negative.")
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
        names, known = list(names), self._per_block
        if known and set(known) != set(names):
            odd = sorted(set(known) ^ set(names))
            raise InvalidInput(f"The weight decay must name every block of the space or none; check {odd[:5]}.")
        return {name: known.get(name, self.damping) for name in names}

    def apply(self, rows: Rows) -> Rows:
        """`D x` for every row."""
        return rows.scaled(self.over(rows.blocks))

    def inverse(self, rows: Rows) -> Rows:
        """`D^-1 x` for every row; raises `InvalidInput` where D is zero."""
        if self.smallest <= 0:
            raise InvalidInput("D has a zero on its diagonal and cannot be inverted; use a positive damping.")
        return rows.scaled({name: 1.0 / d for name, d in self.over(rows.blocks).items()})

    def redamped(self, damping: float) -> Shift:
        """The same weight decay under another damping, one number for all blocks."""
        return Shift(damping, self.decay)

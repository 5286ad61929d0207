"""How much is added to the curvature before it is inverted.

`D = damping + weight decay` is diagonal. Damping keeps the answer near the trained weights and makes an
indefinite or singular curvature invertible; weight decay is part of the objective's own curvature. `Shift` keeps the
two apart, because only the first is a choice.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Protocol, runtime_checkable

from ..core.errors import InvalidInput, NonFinite
from ..core.records import ALWAYS_SHOWN, Record
from ..core.validate import finite_number, whole_number
from ..gradients.per_example import Derivatives
from ..linalg.operator import has_scale
from .adam import adam_denominators


@runtime_checkable
class HasMeanEigenvalue(Protocol):
    """All that a damping rule asks of an operator."""

    def mean_eigenvalue(self) -> float: ...

    def mean_determined(self) -> float: ...

    def block_means(self) -> dict[str, float]: ...


class AbstractDamping(Record, ABC):
    """A rule that gives lambda, in units of the curvature, for an operator."""

    @abstractmethod
    def of(self, operator: HasMeanEigenvalue) -> float:
        """Lambda for this operator: finite and not negative; where blocks differ, their size-weighted mean.

        Args:
            operator: the curvature, of which only the mean eigenvalue is asked.
        """

    def blocks(self, operator: HasMeanEigenvalue) -> dict[str, float]:
        """Lambda block by block where this rule tells blocks apart; empty where one number is for all.

        Args:
            operator: as for `of`.
        """
        return {}

    @property
    def expected_share(self) -> float | None:
        """Lambda in mean eigenvalues of the curvature, where that is known before there is a curvature."""
        return None

    @property
    def measures_gradients(self) -> bool:
        """Whether it asks for more than an operator, and so for a fitted model whose gradients it can measure."""
        return False

    def resolved(self, fitted: object) -> AbstractDamping:
        """The rule to use for one fitted curvature, model and data in view; most rules need no more than `operator`.

        Args:
            fitted: the fitted member of an attribution: its operator, derivatives and choice.
        """
        return self


@dataclass(frozen=True, repr=False)
class Relative(AbstractDamping):
    """`lambda = share * mean eigenvalue of C`: the same share means the same thing for any loss or scale.

    `mean eigenvalue = trace(C) / P`. With `per_block`, every block of parameters (a layer's weight with its bias, a
    norm's scale) gets the share of the mean eigenvalue of its own diagonal block: layers whose gradients are small are
    then damped less. A block without any curvature gets the share of the overall mean. Raises `InvalidInput` for
    `share <= 0`, and where the mean eigenvalue is not positive, for there "relative to the curvature" says nothing.

    Args:
        share: of the mean eigenvalue.
        per_block: take every block's own mean eigenvalue instead of the overall one.

    >>> class Ten:
    ...     def mean_eigenvalue(self): return 10.0
    ...     def block_means(self): return {"a": 5.0, "b": 15.0}
    >>> Relative(0.1).of(Ten())
    1.0
    >>> Relative(0.1, per_block=True).blocks(Ten())
    {'a': 0.5, 'b': 1.5}
    """

    share: float | int = field(default=0.1, metadata=ALWAYS_SHOWN)
    per_block: bool = False

    def __post_init__(self) -> None:
        finite_number("share", self.share, above=0, owner=self, hint="0.1 is a good start")

    @property
    def expected_share(self) -> float:
        return float(self.share)

    def of(self, operator: HasMeanEigenvalue) -> float:
        return self.share * _scale(operator.mean_eigenvalue(), self)

    def blocks(self, operator: HasMeanEigenvalue) -> dict[str, float]:
        if not self.per_block:
            return {}
        overall = _scale(operator.mean_eigenvalue(), self)
        means = operator.block_means()
        return {k: self.share * (mean if has_scale(mean, overall) else overall) for k, mean in means.items()}


def _scale(mean: float, rule: AbstractDamping) -> float:
    """A mean eigenvalue that a share can be taken of."""
    if not math.isfinite(mean):
        raise NonFinite(f"The mean eigenvalue of the curvature is {mean}; look for NaN in weights or data.")
    if mean <= 0:
        # Exactly 0 where the model is so sure of every example that its loss is flat.
        fisher = "EmpiricalFisher() for a loss that has no GGN()"
        way_out = "train with weight decay" if mean == 0 else f"take GGN() instead of Hessian() ({fisher})"
        raise InvalidInput(
            f"{type(rule).__name__}() scales the mean eigenvalue of the curvature, which is {mean:.3g} here; "
            f"use Absolute(value), or {way_out}."
        )
    return mean


@dataclass(frozen=True, repr=False)
class PerDirection(AbstractDamping):
    """`lambda = share * trace(C) / directions`: a share of the mean over those eigenvalues that the examples can make.

    A Gauss-Newton matrix of N examples with k output directions each (classes less one, tokens times that, targets)
    has at most N k eigenvalues that are not zero. Of a model with more parameters the mean over all P,
    which `Relative` takes, is the smaller for it: directions = min(P, N k) does not let the number of parameters
    decide. One lambda is for all layers: a layer whose gradients are small is not followed further than the others.

    N k is counted over the data that the curvature is made from, without padding and ignored labels; given labels count
    one for each example. Where it is not known (products with the data, as `CG` takes, or blocks that are solved
    apart), directions = P. Measured by retraining ([how much damping](../trust.md#how-much-damping)).
    Raises `InvalidInput` for `share <= 0`, and where the mean eigenvalue is not positive.

    Args:
        share: of that mean.

    >>> class Ten:
    ...     def mean_eigenvalue(self): return 10.0
    ...     def mean_determined(self): return 40.0
    ...     def block_means(self): return {"a": 10.0}
    >>> PerDirection(0.2).of(Ten())
    8.0
    """

    share: float | int = field(default=0.2, metadata=ALWAYS_SHOWN)

    def __post_init__(self) -> None:
        finite_number("share", self.share, above=0, owner=self, hint="0.2 is a good start")

    def of(self, operator: HasMeanEigenvalue) -> float:
        return self.share * _scale(operator.mean_determined(), self)


@dataclass(frozen=True, repr=False)
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
        finite_number("value", self.value, least=0, owner=self)

    def of(self, operator: HasMeanEigenvalue) -> float:
        return float(self.value)


@dataclass(frozen=True, repr=False)
class ByBlock(AbstractDamping):
    """A lambda for every block of parameters, as numbers.

    Args:
        values: by block's name.
        mean: what stands for all of them in a record.
    """

    values: Mapping[str, float]
    mean: float

    def of(self, operator: HasMeanEigenvalue) -> float:
        return self.mean

    def blocks(self, operator: HasMeanEigenvalue) -> dict[str, float]:
        return dict(self.values)


@runtime_checkable
class HasDerivatives(Protocol):
    """All that a rule asks of a fitted model to look at its gradients."""

    @property
    def derivatives(self) -> Derivatives: ...


@dataclass(frozen=True, repr=False)
class FromTraining(AbstractDamping):
    r"""`lambda = (1 - momentum) / (lr * steps)`: what stopping after `steps` of gradient descent amounts to.

    Directions with an eigenvalue well below this lambda have not been fitted yet, so removing an example
    cannot move the weights along them.

    Adam divides its steps by the root of the gradients' second moment, so that after Adam or AdamW the same argument
    gives `lambda = sqrt(v) / (lr * steps)`, v being the mean square of an entry of a batch's gradient. With
    `adam_batch` it is measured at the final weights, block by block: for adapters this is the rule that says how far
    training has come. Adam's own v is an average over the last steps, some of them earlier and larger, so lambda is
    rather too small than too large: far too small after a long training with all of the data in a batch, whose mean
    gradient has nearly vanished by then. It is meant for short fine-tunings in batches small beside the data.

    Args:
        lr: the mean learning rate over the run.
        steps: the optimiser steps of the run.
        momentum: SGD's.
        adam_batch: training was by Adam or AdamW, with so many examples to a step; `None`: by SGD.

    Raises:
        InvalidInput: a number is out of range, or momentum is given beside `adam_batch`.

    >>> class Ten:
    ...     def mean_eigenvalue(self): return 10.0
    ...     def block_means(self): return {"a": 10.0}
    >>> round(FromTraining(lr=0.1, steps=1000, momentum=0.9).of(Ten()), 6)
    0.001
    """

    lr: float
    steps: int
    momentum: float = 0.0
    adam_batch: int | None = None

    def __post_init__(self) -> None:
        finite_number("lr", self.lr, above=0, owner=self, hint="it is the mean learning rate of the run")
        finite_number("steps", self.steps, least=1, owner=self, hint="they are the optimiser's steps")
        finite_number("momentum", self.momentum, least=0, below=1, owner=self)
        if self.adam_batch is not None:
            whole_number("adam_batch", self.adam_batch, 1, owner=self)
            if self.momentum:
                raise InvalidInput(
                    f"{self!r} has both momentum and adam_batch, and momentum is SGD's; leave it out for Adam, whose "
                    "first moment does not change how far it goes."
                )

    def of(self, operator: HasMeanEigenvalue) -> float:
        if self.adam_batch is not None:
            raise InvalidInput(
                "FromTraining(adam_batch=) measures gradients of the training data, which this operator does not give; "
                "make it the damping of a method that is fitted, or take PerDirection() or Absolute(value) here."
            )
        return (1.0 - self.momentum) / (self.lr * self.steps)

    @property
    def measures_gradients(self) -> bool:
        return self.adam_batch is not None

    def resolved(self, fitted: object) -> AbstractDamping:
        if self.adam_batch is None:
            return self
        assert isinstance(fitted, HasDerivatives)
        space = fitted.derivatives.space
        divisors = adam_denominators(fitted.derivatives, self.adam_batch)
        values = {name: divisor / (self.lr * self.steps) for name, divisor in divisors.items()}
        return ByBlock(values, sum(v * space.numel(name) for name, v in values.items()) / space.size)


def as_damping(value: AbstractDamping | float) -> AbstractDamping:
    """A damping rule; a plain number is `Absolute`.

    >>> as_damping(0.5)
    Absolute(value=0.5)
    """
    return value if isinstance(value, AbstractDamping) else Absolute(value)

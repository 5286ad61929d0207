"""From the losses of a batch's examples to the one number that a step of training makes smaller, as torch does it.

An objective has one loss per example, and its mean over the examples is what scores are about. A training step by
torch's own loss may minimise another number: divided by the class weights of the batch's labels, or by how many labels
count, or not divided at all. Beside a weight decay, or with batches that differ, that trains another model.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, ClassVar, final

import torch
from jaxtyping import Float, Shaped
from torch import Tensor

from ..core.records import Record
from .base import Batch, tensor_targets


class AbstractBatchLoss(Record, ABC):
    """How the losses of a batch's examples become one number."""

    words: ClassVar[str] = ""
    """What is done, where it is not the mean over the examples."""

    @property
    def differs(self) -> bool:
        """Whether it is another number than the mean over the examples, whatever these are."""
        return True

    @abstractmethod
    def factor(self, batch: Batch, losses: Float[Tensor, "*m n"]) -> Float[Tensor, "*m"] | float:
        """What the mean over the examples is multiplied by.

        Args:
            batch: the examples, of one model or of several along the first axis.
            losses: of them, one per example.
        """


@final
@dataclass(frozen=True, repr=False)
class MeanOfExamples(AbstractBatchLoss):
    """The mean over the examples."""

    @property
    def differs(self) -> bool:
        return False

    def factor(self, batch: Batch, losses: Float[Tensor, "*m n"]) -> float:
        return 1.0


@final
@dataclass(frozen=True, repr=False)
class SumOfExamples(AbstractBatchLoss):
    """The sum over the examples.

    Args:
        positions: whether the loss of an example is a mean over its positions, whose sum is meant.
    """

    positions: bool = False
    words: ClassVar[str] = "the losses of a batch are summed, as the loss does"

    def factor(self, batch: Batch, losses: Float[Tensor, "*m n"]) -> float:
        return float(losses.shape[-1] * (_positions(tensor_targets(batch), losses) if self.positions else 1))


@final
@dataclass(frozen=True, repr=False)
class MeanOfLabels(AbstractBatchLoss):
    """The sum over all labels that count, divided by their number, or by the sum of their class weights.

    A batch in which no label counts moves nothing, where torch's mean is NaN.

    Args:
        weight: of each class; `None`: 1.
        ignore_index: the class number of labels that do not count.
    """

    weight: Float[Tensor, " c"] | None = None
    ignore_index: int = -100
    words: ClassVar[str] = "the losses of a batch are divided by its labels' class weights, as torch does"

    @property
    def differs(self) -> bool:
        return self.weight is not None

    def factor(self, batch: Batch, losses: Float[Tensor, "*m n"]) -> Float[Tensor, "*m"] | float:
        targets = tensor_targets(batch)
        if targets.dtype.is_floating_point:
            return 1.0  # of probabilities torch takes the plain mean
        labels = targets.reshape(*losses.shape, -1).long()
        counts = (labels != self.ignore_index).to(losses.dtype)
        if self.weight is not None:
            counts = counts * self.weight.to(losses)[torch.where(counts > 0, labels, 0)]
        total = counts.sum((-2, -1))
        everything = labels.shape[-2] * labels.shape[-1]
        return torch.where(total > 0, everything / total, torch.zeros_like(total))


def _positions(targets: Shaped[Tensor, "*t"], losses: Float[Tensor, "*m n"]) -> int:
    """How many positions an example has."""
    inner = targets.shape[losses.dim() :]
    return math.prod(inner[1:] if targets.dtype.is_floating_point else inner)


def combine_losses(
    reduction: AbstractBatchLoss, losses: Float[Tensor, "*m n"], batch: Any, weights: Float[Tensor, "*m n"] | None
) -> Float[Tensor, "*m"]:
    """What a step makes smaller; `weights` of 0 leave examples out and change no divisor.

    Args:
        reduction: how the losses become one number.
        losses: of the examples.
        batch: the examples.
        weights: of the examples; None: 1.
    """
    mean = (losses if weights is None else losses * weights.to(losses.dtype)).mean(-1)
    return mean * reduction.factor(batch, losses.detach())

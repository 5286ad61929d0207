"""The share of right answers: what a retraining is judged by where there are classes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, final

from jaxtyping import Float
from torch import Tensor

from ..core.validate import finite_number
from ..objectives.base import AbstractObjective, Batch, Model, measured_outputs, tensor_targets
from ..objectives.margins import check_class_labels, class_labels, is_single


@final
@dataclass(frozen=True)
class Accuracy(AbstractObjective):
    """1 where the model's class is the label, else 0: a measure for `retrain`; it has no gradient to score with.

    Outputs are [n, C] with class numbers [n], or one number per example ([n] or [n, 1]) with targets 0 or 1, which
    above `threshold` means class 1.

    Args:
        threshold: 0 for a logit, 0.5 for a probability; not used where there is an output for every class.

    Example:
        >>> import torch
        >>> Accuracy().losses(torch.tensor([[2.0, 0.5], [1.0, 0.0]]), (None, torch.tensor([0, 1])))
        tensor([1., 0.])
    """

    lower_is_better: ClassVar[bool] = False
    threshold: float = 0.0

    def __post_init__(self) -> None:
        finite_number("threshold", self.threshold, owner=self)

    def outputs(self, model: Model, batch: Batch) -> Tensor:
        return measured_outputs(self, model, batch)

    def losses(self, outputs: Float[Tensor, "n *out"], batch: Batch) -> Float[Tensor, " n"]:
        labels = class_labels(outputs, tensor_targets(batch), "Accuracy()")
        predicted = (outputs.reshape(-1) > self.threshold).long() if is_single(outputs) else outputs.argmax(1)
        return (predicted == labels).to(outputs.dtype)

    def check(self, outputs: Tensor, batch: Batch, ids: Tensor) -> None:
        check_class_labels(outputs, batch, ids, "Accuracy()")

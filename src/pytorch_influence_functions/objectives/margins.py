"""Measures of one decision per example: the margin and the logit of the target's class."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, final

import torch
from jaxtyping import Float
from torch import Tensor

from ..core.errors import InvalidInput
from .base import (
    AbstractObjective,
    Batch,
    Model,
    check_batch,
    check_labels,
    inputs_and_targets,
    is_integer,
    measured_outputs,
    offenders,
    tensor_targets,
)

_MEASURE_THE_LOSS = "measure the loss (measure=None, of TRAK trak(measure=None))"


@final
@dataclass(frozen=True, eq=False, repr=False)
class Margin(AbstractObjective):
    """f_y - log Σ_{c≠y} exp f_c = log(p_y / (1 - p_y)), the log-odds of the target: TRAK's output function.

    Unlike a loss it does not flatten where the model is sure. Outputs are [n, C] with class numbers [n], or
    one logit per example ([n] or [n, 1]) with targets 0 or 1, where the log-odds are -f or f. (Park et al.
    2023, "TRAK: Attributing Model Behavior at Scale".)

    Example:
        >>> Margin().losses(torch.tensor([[2.0, 0.5]]), (None, torch.tensor([0])))
        tensor([1.5000])
    """

    lower_is_better: ClassVar[bool] = False
    reads_logits: ClassVar[bool] = True

    def outputs(self, model: Model, batch: Batch) -> Tensor:
        return measured_outputs(self, model, batch)

    def losses(self, outputs: Float[Tensor, "n *out"], batch: Batch) -> Float[Tensor, " n"]:
        y = class_labels(outputs, tensor_targets(batch), "Margin()")
        if is_single(outputs):
            return _apply_label_sign(outputs, y)
        # The target is masked out before logsumexp: log(1 - p) from p would lose all digits where p is near 1.
        own = torch.arange(outputs.shape[1], device=y.device) == y[:, None]
        others = torch.where(own, torch.full_like(outputs, -torch.inf), outputs)
        return _target_outputs(outputs, y) - others.logsumexp(1)

    def check(self, outputs: Tensor, batch: Batch, ids: Tensor) -> None:
        check_class_labels(outputs, batch, ids, "Margin()")


@final
@dataclass(frozen=True, eq=False, repr=False)
class Logit(AbstractObjective):
    """f_y, the target's own output: [n, C] with class numbers [n], or ±f for one logit per example.

    Example:
        >>> Logit().losses(torch.tensor([[2.0, 0.5]]), (None, torch.tensor([0])))
        tensor([2.])
    """

    lower_is_better: ClassVar[bool] = False
    reads_logits: ClassVar[bool] = True

    def outputs(self, model: Model, batch: Batch) -> Tensor:
        return measured_outputs(self, model, batch)

    def losses(self, outputs: Float[Tensor, "n *out"], batch: Batch) -> Float[Tensor, " n"]:
        y = class_labels(outputs, tensor_targets(batch), "Logit()")
        return _apply_label_sign(outputs, y) if is_single(outputs) else _target_outputs(outputs, y)

    def check(self, outputs: Tensor, batch: Batch, ids: Tensor) -> None:
        check_class_labels(outputs, batch, ids, "Logit()")


def is_single(outputs: Tensor) -> bool:
    """Whether outputs are one number per example, [n] or [n, 1], rather than one for every class."""
    return outputs.dim() == 1 or (outputs.dim() == 2 and outputs.shape[1] == 1)


def _apply_label_sign(outputs: Tensor, y: Tensor) -> Tensor:
    return outputs.reshape(-1) * (2 * y - 1).to(outputs.dtype)


def _target_outputs(outputs: Tensor, y: Tensor) -> Tensor:
    return outputs.gather(1, y[:, None])[:, 0]


def class_labels(outputs: Tensor, targets: Tensor, name: str) -> Tensor:
    """Class numbers [n], if outputs and targets are one decision per example."""
    shape, target_shape, n = tuple(outputs.shape), tuple(targets.shape), outputs.shape[0]
    if len(shape) > 2:
        raise InvalidInput(
            f"{name} got outputs of shape {shape}, expected [n, C] or one logit per example; for tokens or dense "
            f"outputs {_MEASURE_THE_LOSS}, or write FromFunction(...)."
        )
    single = is_single(outputs)
    if target_shape != (n,) and not (single and target_shape == (n, 1)):
        raise InvalidInput(
            f"{name} got targets of shape {target_shape} for outputs of shape {shape}, expected one class number per "
            f"example, ({n},); use argmax on one-hot targets, and where they are several answers {_MEASURE_THE_LOSS}."
        )
    if not single and not is_integer(targets):
        raise InvalidInput(
            f"{name} got targets of type {targets.dtype}, expected integer class numbers; convert them with .long()."
        )
    return targets.long().reshape(-1)


def check_class_labels(outputs: Tensor, batch: Batch, ids: Tensor, name: str) -> None:
    """Refuse outputs and targets that are not one decision per example; `name` is the measure, for messages."""
    targets = check_batch(outputs, inputs_and_targets(batch)[2], ids)
    y = class_labels(outputs, targets, name)
    single = is_single(outputs)
    if single and bool((bad := targets.reshape(-1) != y).any()):
        raise InvalidInput(
            f"{name} got soft targets for one logit per example ({float(targets.reshape(-1)[bad][0]):g} at "
            f"{offenders(bad, ids)}), expected 0 or 1; round them, or for a regression measure the loss (measure=None)."
        )
    instead = (
        f"relabel from 0 or widen the last layer, and where the outputs are no score for each class (ordinal, counts) "
        f"{_MEASURE_THE_LOSS}"
    )
    check_labels(y, 2 if single else outputs.shape[1], ids, instead=instead)

"""Whether outputs are a score for each class, so that the largest is a prediction; and which of them are."""

from __future__ import annotations

from typing import Any, Final

import torch
from jaxtyping import Float
from torch import Tensor

from ..core.errors import InvalidInput, first_line
from .base import AbstractObjective, Batch, inputs_and_targets, with_targets
from .outputs import describe_outputs, main_output, without_weights

# Under how many labels a loss is looked at: it costs a backward pass for each.
_LOOKED_AT: Final = 4
# What rounding may add to a slope, as a share of the largest one.
_ROUNDING: Final = 1e-4


def class_scores(objective: AbstractObjective, outputs: Float[Tensor, "n *out"]) -> Float[Tensor, "n c"]:
    """The score of each class, [n, C], or the one logit of yes or no, [n, 1], among the outputs of a model.

    Args:
        objective: that the outputs are of.
        outputs: from `objective.outputs`.

    Raises:
        InvalidInput: the model returned several outputs and none of them is marked, or one of more axes.
    """
    returned = without_weights(objective.as_returned(outputs))
    try:
        scores = main_output(returned)
    except InvalidInput:
        raise InvalidInput(f"the model returned {describe_outputs(returned)}, none of them called logits") from None
    if scores[0].numel() > 1 and scores.dim() != 2:
        raise InvalidInput(f"the model's outputs have shape {tuple(scores.shape)}")
    return scores.reshape(len(scores), -1)


def check_class_scores(objective: AbstractObjective, outputs: Tensor, batch: Batch) -> None:
    """Refuse outputs that the loss does not read as a score for each class.

    A loss of classes rewards a class's own output more where that class is the label than where another one is; one of
    a single logit falls with it under yes and rises under no, at 0. So it is asked what it would make of other labels.

    Args:
        objective: the training loss.
        outputs: from `objective.outputs`.
        batch: the batch that they came from.

    Raises:
        InvalidInput: they are no such scores; the message says why, as the end of a sentence.
    """
    scores = class_scores(objective, outputs.detach())
    targets = inputs_and_targets(batch)[2]
    if not isinstance(targets, Tensor):
        raise InvalidInput(f"the targets are of type {type(targets).__name__}, no class for each example")
    if scores.shape[1] == 1:
        _check_one_logit(objective, outputs, batch, targets)
    else:
        _check_several(objective, outputs, batch, targets, scores.shape[1])


def _check_one_logit(objective: AbstractObjective, outputs: Tensor, batch: Batch, targets: Tensor) -> None:
    if targets.numel() != len(outputs):
        raise InvalidInput(_describe_targets(targets))
    labels = targets.double()
    pairs = [(0, 1)] if bool(((labels >= 0) & (labels <= 1)).all()) else []
    pairs += [(-1, 1)] if bool((labels.abs() == 1).all()) else []
    if not pairs:
        raise InvalidInput(
            f"the model gives one number for each example and the targets run from {float(labels.min()):g} to "
            f"{float(labels.max()):g}, not over yes and no"
        )
    at_zero, direction = _without_logit(objective, outputs)
    for no, yes in pairs:
        slopes = [
            _along(_gradient(objective, at_zero, with_targets(batch, torch.full_like(targets, label))), direction)
            for label in (no, yes)
        ]
        if bool((slopes[0] > 0).all() and (slopes[1] < 0).all()):
            return
    raise InvalidInput(f"under the loss {objective!r} the sign of the one output is no yes or no")


def _check_several(objective: AbstractObjective, outputs: Tensor, batch: Batch, targets: Tensor, classes: int) -> None:
    n = len(outputs)
    looked_at = list(range(min(classes, _LOOKED_AT)))
    if targets.numel() == n:
        if targets.is_floating_point() and bool((targets != targets.round()).any()):
            raise InvalidInput("the targets are no whole numbers, as those of classes are")
        labelled = [torch.full_like(targets, c) for c in looked_at]
    elif targets.shape == (n, classes) and bool(
        (targets >= 0).all() and (targets.double().sum(1) - 1).abs().max() < 1e-3
    ):
        labelled = [
            torch.zeros_like(targets).index_fill(1, torch.tensor([c], device=targets.device), 1) for c in looked_at
        ]
    else:
        raise InvalidInput(_describe_targets(targets))
    directions = [_direction(objective, outputs, c) for c in looked_at]
    # [label, output, n]
    gradients = [_gradient(objective, outputs, with_targets(batch, labels)) for labels in labelled]
    slopes = torch.stack([torch.stack([_along(gradient, d) for d in directions]) for gradient in gradients])
    # By output and example: a class that a network gives next to no probability may have a slope of 1 / p.
    rooms = _ROUNDING * slopes.abs().amax(0)
    for c, room in zip(looked_at, rooms, strict=True):
        others = [label for label in looked_at if label != c]
        gaps = slopes[c, c] - slopes[others, c]
        if bool((gaps > room).any()) or not bool((gaps < -room).any()):
            raise InvalidInput(f"under the loss {objective!r} output {c} is not what speaks for class {c}")


def _describe_targets(targets: Tensor) -> str:
    return (
        f"the targets of shape {tuple(targets.shape)} are no class, or probabilities of the classes, for each example"
    )


def _direction(objective: AbstractObjective, outputs: Tensor, c: int) -> Tensor:
    """How a class's score moves with the outputs."""
    with torch.enable_grad():
        leaf = outputs.detach().clone().requires_grad_()
        return torch.autograd.grad(class_scores(objective, leaf)[:, c].sum(), leaf)[0]


def _without_logit(objective: AbstractObjective, outputs: Tensor) -> tuple[Tensor, Tensor]:
    """The same outputs with 0 as the logit, and how the logit moves with them."""
    outputs = outputs.detach()
    direction = _direction(objective, outputs, 0)
    n = len(outputs)
    size = direction.reshape(n, -1).square().sum(1, keepdim=True)
    steps = class_scores(objective, outputs) / size * direction.reshape(n, -1)
    return outputs - steps.reshape(outputs.shape), direction


def _gradient(objective: AbstractObjective, outputs: Tensor, batch: Any) -> Tensor:
    """Of each example's loss in its outputs; of what is better larger, of its negative."""
    with torch.enable_grad():
        leaf = outputs.detach().clone().requires_grad_()
        try:
            losses = objective.losses(leaf, batch)
            gradient = torch.autograd.grad(losses.sum(), leaf)[0]
        except Exception as cause:  # a function of the user's own may take no other labels than it has seen
            raise InvalidInput(
                f"the loss {objective!r} cannot be taken at other labels ({type(cause).__name__}: {first_line(cause)})"
            ) from cause
    return gradient if objective.lower_is_better else -gradient


def _along(gradient: Tensor, direction: Tensor) -> Float[Tensor, " n"]:
    """Each example's slope along a direction of its outputs. A label that is ignored may give 0 / 0."""
    return (gradient * direction).nan_to_num().reshape(len(gradient), -1).sum(1)

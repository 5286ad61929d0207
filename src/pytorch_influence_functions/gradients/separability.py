"""Whether every example has an output and a loss of its own: nothing random, nothing shared with its neighbours."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any, Final

import torch
from torch import Tensor, nn

from ..core.batches import Collated, batch_slice, tensors_of
from ..core.distributed import World
from ..core.errors import InvalidInput, TrainingDataWarning, first_line, name_ids
from ..core.indexing import spread_sample
from ..core.warn import warn_caller
from ..objectives.base import AbstractObjective, inputs_and_targets
from ..objectives.measures import FromFunction
from ..objectives.model_loss import ModelLoss, returned_loss
from ..problem.labels import labels_of
from ..problem.own_loss import is_half, same_value
from ..problem.problem import Problem, first_batch, sweep

# Examples whose losses are taken together and apart, and at most how many pairs of them.
_GROUP, _PAIRS = 16, 6
# Of how many classes one more example is looked at, the rarest first, and the most class numbers that are counted.
_CLASSES, _CLASS_NUMBERS = 48, 1 << 12
# Examples among which one must have a loss that is not 0.
_ZEROS: Final = 128


def refuse_mixing(model: nn.Module, objective: AbstractObjective, batch: Any, outputs: Tensor, allowed: float) -> None:
    """An example's output must be the same in every pass, and must not depend on which others share its batch.

    Args:
        model: the model, in eval mode.
        objective: how outputs are taken from it.
        batch: a few examples.
        outputs: their outputs.
        allowed: the largest relative difference of two correct results.

    Raises:
        InvalidInput: it does not hold; the message says which of the two.
    """
    outputs = outputs.detach()  # forward may have enabled gradients again
    n = len(outputs)
    # Logits that are masked by -inf are as large as any number.
    room = allowed * (float(torch.where(outputs.isfinite(), outputs, 0.0).abs().max()) + 1e-6)
    versions = [tensor._version for _, tensor in tensors_of(batch)]
    with torch.no_grad():
        first, second = (objective.outputs(model, batch).detach() for _ in range(2))
    overwritten = versions != [tensor._version for _, tensor in tensors_of(batch)]
    gap = largest_gap(first, second)
    if not gap <= room:  # NaN is no agreement
        if overwritten:
            raise InvalidInput(
                f"The model gave different outputs for the same batch twice, by {gap:.2g}, because its forward changes "
                "its input in place; begin it with x = x.clone(), or write the operation without the underscore."
            )
        raise InvalidInput(
            f"The model gave different outputs for the same batch twice, by {gap:.2g}, although it is in eval mode: "
            "its forward draws random numbers, or keeps state from the call before, so a score would belong to one "
            "call; draw noise once per example in the dataset and give it to the model as an input, or leave it out "
            "where self.training is False, and begin every call with the same state."
        )
    for e in range(n):
        try:
            with torch.no_grad():
                alone = objective.outputs(model, batch_slice(batch, n, slice(e, e + 1))).detach()
        except (RuntimeError, ValueError, IndexError, TypeError) as failure:
            raise InvalidInput(
                f"The model runs on a batch of {n} examples but not on one alone "
                f"({first_line(failure.__cause__ or failure)}); every example needs an output of its "
                "own, so use running statistics or GroupNorm and keep the batch axis."
            ) from failure
        if alone.numel() != outputs[e].numel():
            raise InvalidInput(
                f"The model gave outputs of shape {tuple(alone.shape)} for one example and {tuple(outputs.shape)} for "
                f"{n}; the first axis must run over the examples, so return one output per example."
            )
        gap = largest_gap(alone.reshape(outputs[e].shape), outputs[e])
        if not gap <= room:
            raise InvalidInput(
                f"The model's output for one example {_describe_change(gap)} with the examples beside it in the "
                f"batch, so it has no gradient of its own; {_causes(batch)}."
            )


def largest_gap(a: Tensor, b: Tensor) -> float:
    """The largest difference; NaN where one of the two is NaN, and 0 where both are or both are the same infinity."""
    same = (a == b) | (a.isnan() & b.isnan())
    return float(torch.where(same, torch.zeros_like(a), (a - b).abs()).max()) if a.numel() else 0.0


def _describe_change(gap: float) -> str:
    return f"changes by {gap:.2g}" if math.isfinite(gap) else "changes between a number and NaN or infinity"


def _causes(batch: Any) -> str:
    if isinstance(batch, Collated):
        return (
            "the collate function or the model lets examples see each other, as a mean over the batch does; take such "
            "numbers once over the training data, or use running statistics or GroupNorm"
        )
    return (
        "the usual causes are batch normalisation without running statistics, x.std(0), an output that is one number "
        "for the whole batch, and noise from a generator that forward seeds anew; use running statistics or GroupNorm, "
        "return one number per example, and draw noise once per example in the dataset"
    )


def refuse_shared_losses(objective: AbstractObjective, batch: Any, outputs: Tensor) -> None:
    """The losses of a batch must be those of its examples alone.

    Raises:
        InvalidInput: an example's loss changes with its neighbours.
    """
    n = len(outputs)
    try:
        with torch.no_grad():
            together = objective.losses(outputs, batch)
            alone = [objective.losses(outputs[e : e + 1], batch_slice(batch, n, slice(e, e + 1))) for e in range(n)]
    except (InvalidInput, RuntimeError, IndexError):
        return  # refused in its own words, with the examples named, where the losses are used
    if together.shape != (n,) or any(loss.shape != (1,) for loss in alone):
        return
    _refuse_gap(type(objective).__name__, together, torch.cat(alone))


def refuse_batch_loss(problem: Problem, objective: FromFunction) -> None:
    """A function that is a loss of a whole batch, as contrastive losses are, has no loss per example.

    The function is called on pairs and on a group of examples, and on each of them alone. Alone, a contrastive loss is
    0 whatever the weights are, and so would all scores be.

    Args:
        problem: whose training examples are looked at.
        objective: the function, its reduction known.

    Raises:
        InvalidInput: the loss of a group is neither the mean nor the sum of its examples' own; or every example looked
            at has loss 0 and no slope.
    """
    classes = _one_of_each_class(problem)
    spread = spread_sample(len(problem), _GROUP)
    # Weights of classes cancel in the mean over one class, so a rare one must be among them.
    ids = torch.cat([classes, spread[~torch.isin(spread, classes)]])
    several = replace(problem.data, batch_size=min(len(ids), max(problem.batch_size, 4)))
    with first_batch(problem, several, ids) as (ids, batch), torch.no_grad():
        outputs = objective.outputs(problem.model, batch)
        n = len(ids)
        alone = torch.stack([objective.evaluate(outputs, batch, [e]).reshape(()) for e in range(n)])
        for group in _groups(n, len(classes)):
            value = objective.evaluate(outputs, batch, group)
            _refuse_group(objective, value, alone[group], ids[group].tolist())
    if not _any_slope(problem, objective):
        looked_at = min(len(problem), _ZEROS)
        raise InvalidInput(
            f"The loss {_name(objective)} is exactly 0, with no slope, for each of {looked_at} examples taken alone, "
            "so every score would be 0: a loss over a batch (contrastive) has no loss per example, so make one item of "
            "the dataset a whole group, or give a loss that each example has by itself."
        )


def warn_of_batch_loss(problem: Problem, objective: ModelLoss) -> None:
    """Say where what the model returns for several examples is no mean of what it returns for each alone.

    Args:
        problem: whose training examples are looked at.
        objective: the model's own loss.
    """
    ids = spread_sample(len(problem), _GROUP)
    several = replace(problem.data, batch_size=min(len(ids), max(problem.batch_size, 4)))
    with first_batch(problem, several, ids) as (ids, batch), torch.no_grad():
        alone = replace(objective, average=True).outputs(problem.model, batch)
        together, counts = returned_loss(problem.model, batch), objective.counts(batch).to(alone)
    means = (alone.mean(), (alone * counts).sum() / counts.sum())
    if together is None or any(same_value(float(together), float(mean), is_half(problem.model)) for mean in means):
        return
    warn_caller(
        f"The model returns the loss {float(together):.4g} for examples {name_ids(ids.tolist())} together, and for "
        f"each alone {float(means[0]):.4g} on average: it depends on which examples share a batch, and ModelLoss() "
        "takes each alone, so that weights of classes cancel (write loss=ptif.CrossEntropy(weight=...)) and a balance "
        "of experts is that of each example.",
        TrainingDataWarning,
    )


def _one_of_each_class(problem: Problem) -> Tensor:
    """An example of every class, of the rarest where there are many; none where labels do not lie in memory."""
    none = torch.arange(0)
    columns, index = problem.data.tensor_columns or (None, None)
    labels = None if columns is None else labels_of(columns, next(len(tensor) for _, tensor in tensors_of(columns)))
    if labels is None or labels.is_floating_point() or labels.is_complex():
        return none
    labels = (labels if index is None else labels[index]).long()
    labels = labels - labels.min()
    if int(labels.max()) >= _CLASS_NUMBERS:
        return none
    counts = torch.bincount(labels)
    places = torch.arange(len(labels))
    first = torch.zeros_like(counts).scatter_reduce_(0, labels, places, "amin", include_self=False)
    rarest_first = counts.argsort(stable=True)
    return first[rarest_first[counts[rarest_first] > 0][:_CLASSES]]


def _groups(n: int, classes: int) -> list[list[int]]:
    """All examples, and pairs of neighbours and of distant ones; of the first, of a class each, all are in a pair."""
    if n < 2:
        return []
    neighbours, distant = [[i, i + 1] for i in range(0, n - 1, 2)], [[i, n - 1 - i] for i in range(n // 2)]
    neighbours = neighbours[: max(_PAIRS // 2, (classes + 1) // 2)]
    return [list(range(n)), *neighbours, *distant[-(_PAIRS // 2) :]]


def loss_together(objective: AbstractObjective, outputs: Tensor, batch: Any) -> Tensor | None:
    """What a function gives for a whole batch, where it is the mean or the sum over it; else None.

    Args:
        objective: the loss.
        outputs: of the batch.
        batch: the examples.
    """
    if not isinstance(objective, FromFunction) or objective.reduction not in ("mean", "sum") or len(outputs) < 2:
        return None
    if objective.layouts.one_by_one:
        return None
    together: Tensor = objective.apply(outputs, inputs_and_targets(batch)[2])
    return together.reshape(()) if together.numel() == 1 else None


def refuse_sum(
    objective: AbstractObjective, read: Callable[[], Tensor], batch: Any, losses: Tensor, together: Tensor, ids: Tensor
) -> None:
    """A batch of any pass must have the mean or the sum of its examples' own losses, as the first look found.

    Weights of a rare class, or marks that few targets have, are met only here. What seems to differ is looked at again
    in small groups, where rounding cannot be mistaken for it.

    Args:
        objective: the loss.
        read: gives the outputs of the batch.
        batch: the examples.
        losses: [n] of each alone.
        together: what `loss_together` gave.
        ids: their dataset indices, for the message.

    Raises:
        InvalidInput: it has not.
    """
    if not isinstance(objective, FromFunction) or not _differs(losses, together):
        return
    n, outputs, losses = len(ids), read().detach(), losses.detach()
    for first in range(0, n, _GROUP):
        group = list(range(first, min(n, first + _GROUP)))
        if len(group) > 1:
            value = objective.evaluate(outputs, batch, group).detach()
            _refuse_group(objective, value, losses[group], ids[group].tolist())


def _differs(losses: Tensor, together: Tensor) -> bool:
    """Whether the whole is neither mean nor sum of its parts, to some roundings."""
    own, whole = losses.double(), float(together)
    if not math.isfinite(whole) or not bool(own.isfinite().all()):
        return False  # NaN is refused with its index
    precision = max((losses.dtype, together.dtype), key=lambda dtype: torch.finfo(dtype).eps)
    room = 100 * torch.finfo(precision).eps * float(own.abs().max())
    return min(abs(whole - float(own.mean())), abs(whole - float(own.sum())) / len(own)) > room


def _refuse_group(objective: FromFunction, value: Tensor, alone: Tensor, ids: list[int]) -> None:
    if value.numel() == len(alone) and value.dim() > 0:
        _refuse_gap(_name(objective), value.reshape(-1), alone)
        return
    room = _room(alone) * len(alone)
    whole, mean, total = float(value), float(alone.double().mean()), float(alone.double().sum())
    if abs(whole - mean) <= room or abs(whole - total) <= room:
        return
    raise InvalidInput(
        f"The loss {_name(objective)} of examples {name_ids(ids)} together is {whole:.4g}, and theirs alone have mean "
        f"{mean:.4g} and sum {total:.4g}: it depends on which examples share a batch, as contrastive losses and means "
        "weighted over a batch do, so no example has a loss of its own; make one item of the dataset a whole group, "
        "use TokenCrossEntropy() for a mean over tokens, CrossEntropy(weight=...) for class weights, or return one "
        "number per example."
    )


def _refuse_gap(name: str, together: Tensor, alone: Tensor) -> None:
    gap = largest_gap(together, alone)
    if not gap <= _room(alone) * len(alone):
        raise InvalidInput(
            f"The loss {name} of one example {_describe_change(gap)} with the examples beside it in the batch, as "
            "contrastive losses do, so no example has a loss of its own; make one item of the dataset a whole group."
        )


def _room(alone: Tensor) -> float:
    size = torch.where(alone.isfinite(), alone, torch.zeros_like(alone)).abs().max()
    return min(1e3 * torch.finfo(alone.dtype).eps, 2e-2) * float(size)


def _any_slope(problem: Problem, objective: FromFunction) -> bool:
    """Whether one of the examples looked at has a loss or a slope that is not 0."""
    for _, batch in sweep(
        problem, ids=spread_sample(len(problem), _ZEROS), label="looking at the losses", world=World()
    ):
        with torch.no_grad():
            leaf = objective.outputs(problem.model, batch)
        leaf.requires_grad_()
        with torch.enable_grad():
            losses = objective.losses(leaf, batch)
            (slope,) = torch.autograd.grad(losses.sum(), leaf, materialize_grads=True)
        # NaN is not 0: it is refused with its index where the losses are used.
        if bool((losses != 0).any()) or bool((slope != 0).any()):
            return True
    return False


def _name(objective: FromFunction) -> str:
    function = objective.function
    return str(getattr(function, "__name__", type(function).__name__))

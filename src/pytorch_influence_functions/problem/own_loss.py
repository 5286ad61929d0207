"""The loss that training itself computes for a batch, held against the objective that is taken for it."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Final

import torch
from torch import Tensor, nn

from ..core.batches import whole_batch
from ..core.errors import InvalidInput, TrainingDataWarning, name_ids
from ..core.warn import warn_caller
from ..objectives.base import AbstractObjective, inputs_and_targets, label_key, with_targets
from ..objectives.model_loss import returned_loss
from ..objectives.tokens import TokenCrossEntropy, attention_mask_of, labels_at_padding
from .model_state import preserved
from .wrappers import unwrap

# How far two computations of one loss may differ: relative, and beside losses near 0. Losses of half precision round.
_FULL: Final = (1e-3, 1e-5)
_HALF: Final = (1e-2, 1e-4)
# How far apart a mean over tokens and one over texts are told from each other: beyond what float32 rounds.
_TOLD: Final = 1e-5
_IGNORED: Final = -100


@dataclass(frozen=True)
class Gap:
    """A loss that training computes and the objective's, which differ.

    Args:
        theirs: the one of training.
        ours: the objective's.
        otherwise: the objective, weighing texts or moving labels in the other way, where that gives the one of
            training; else None.
    """

    theirs: float
    ours: float
    otherwise: TokenCrossEntropy | None = None


@dataclass(frozen=True)
class OwnLoss:
    """What training computes for a batch.

    Args:
        name: what computes it, in words: `"Trainer.compute_loss"`.
        value: from a batch to the mean loss; None where there is none.
        is_models: whether it is the loss that the model itself returns.
    """

    name: str
    value: Callable[[Any], float | None]
    is_models: bool = True

    @staticmethod
    def of(model: nn.Module) -> OwnLoss:
        """The loss that a model returns where it is given the labels.

        Args:
            model: the model; where it takes no labels there is no loss.
        """
        inside = unwrap(model)[0]
        names = inspect.signature(inside.forward).parameters
        takes = "labels" in names or any(p.kind is inspect.Parameter.VAR_KEYWORD for p in names.values())

        def value(batch: Any) -> float | None:
            if not takes:
                return None
            try:
                with preserved(model), torch.no_grad():
                    loss = returned_loss(model, batch)
            except InvalidInput:
                return None  # it takes other labels than these: what it returned was not what training minimised
            return None if loss is None else float(loss)

        return OwnLoss(f"{type(inside).__name__}(labels=...)", value)

    def gap(self, objective: AbstractObjective, batch: Any, outputs: Tensor, half: bool) -> Gap | None:
        """This loss of a batch and the objective's, where they differ; None: they agree, or one of them is none.

        Tokens that the objective leaves out, as what padding on the left predicts, are left out of both. Where texts
        have about the same loss, its mean over tokens is near the one over texts: they differ where that of training is
        by far nearer to the other.

        Args:
            objective: what is taken for it; of tokens the mean over those of the batch, unless it averages each text.
            batch: a batch with its labels.
            outputs: the model's outputs for it.
            half: whether weights are of half precision.
        """
        if isinstance(objective, TokenCrossEntropy):
            taught = objective.taught(batch)
            if not bool(taught.any()):
                return None
            targets = inputs_and_targets(batch)[2]
            batch = with_targets(batch, torch.where(taught, targets, torch.full_like(targets, _IGNORED)))
        theirs, (ours, total) = self.value(batch), mean_and_sum(objective, outputs, batch)
        if theirs is None or (not math.isfinite(theirs) and not math.isfinite(ours)):
            return None
        otherwise = _read_otherwise(theirs, ours, objective, outputs, batch, half)
        # A sum over the batch weighs examples as the mean does.
        same = same_value(theirs, total, half) or (otherwise is None and same_value(theirs, ours, half))
        return None if same else Gap(theirs, ours, otherwise)

    def refusal(self, objective: AbstractObjective, ids: Sequence[int], gap: Gap, why: str) -> InvalidInput:
        """The sentence where it differs from the objective: what was seen, and what to write.

        Args:
            objective: what was taken for it.
            ids: the examples that were looked at.
            gap: both values.
            why: where the objective comes from.
        """
        tokens = isinstance(objective, TokenCrossEntropy)
        settings = f"average=False, shift={objective.shift}" if isinstance(objective, TokenCrossEntropy) else ""
        own = f", or loss=ptif.objectives.ModelLoss({settings}), what the model returns for each example alone"
        weights = "" if tokens else " (for weights of classes ptif.CrossEntropy(weight=...))"
        what = f"example {ids[0]}" if len(ids) == 1 else f"examples {name_ids(ids)} together"
        theirs, ours = _apart(gap.theirs, gap.ours)
        seen = f"{self.name} gives {theirs} for {what} and {objective!r}, {why}, gives {ours}; "
        if gap.otherwise is not None:
            how = f"counts every {'text' if gap.otherwise.average else 'token'} alike"
            if isinstance(objective, TokenCrossEntropy) and gap.otherwise.shift != objective.shift:
                how = f"predicts {'the next token' if gap.otherwise.shift else 'each token itself'}"
            return InvalidInput(f"{seen}training {how}, so write loss={gap.otherwise!r}.")
        return InvalidInput(
            f"{seen}pass loss=, an objective{weights} or a function of (outputs, targets) that computes the loss of "
            f"each example{own if self.is_models else ''}."
        )


def _read_otherwise(
    theirs: float, ours: float, objective: AbstractObjective, outputs: Tensor, batch: Any, half: bool
) -> TokenCrossEntropy | None:
    """The loss of tokens, weighed or shifted in another way, that training computes; None: it is this, or no such."""
    # What training computed in half precision is a number of that precision.
    rounded = half and float(torch.tensor(theirs).to(torch.bfloat16)) == theirs
    told = _HALF[0] if rounded else _TOLD
    if not isinstance(objective, TokenCrossEntropy) or math.isclose(theirs, ours, rel_tol=told, abs_tol=told):
        return None
    alike = replace(objective, average=not objective.average)
    moved = [replace(objective, shift=not objective.shift), replace(alike, shift=not objective.shift)]
    for other in (alike, *([] if same_value(theirs, ours, half) else moved)):
        value = mean_and_sum(other, outputs, batch)[0]
        if 4 * abs(theirs - value) < abs(theirs - ours) and same_value(theirs, value, half):
            return other
    return None


def _apart(one: float, other: float) -> tuple[str, str]:
    """Two numbers, in as many digits as tell them apart."""
    shown = ((f"{one:.{digits}g}", f"{other:.{digits}g}") for digits in range(4, 18))
    return next((pair for pair in shown if pair[0] != pair[1]), (repr(one), repr(other)))


def same_value(theirs: float, ours: float, half: bool) -> bool:
    """Whether two computations of one loss agree.

    Args:
        theirs: one value.
        ours: the other.
        half: whether weights are of half precision.

    >>> same_value(1.0, 1.0005, False), same_value(1.0, 1.005, False), same_value(1.0, 1.005, True)
    (True, False, True)
    """
    relative, absolute = _HALF if half else _FULL
    return math.isclose(theirs, ours, rel_tol=relative, abs_tol=absolute)


def mean_and_sum(objective: AbstractObjective, outputs: Tensor, batch: Any) -> tuple[float, float]:
    """The loss of a batch as training means it: over all its tokens, where these are added up, else over its examples.

    Args:
        objective: an objective.
        outputs: the model's outputs.
        batch: the batch that they came from.
    """
    losses = objective.losses(outputs, batch)
    summed = isinstance(objective, TokenCrossEntropy) and not objective.average
    count = int(objective.taught(batch).sum()) if isinstance(objective, TokenCrossEntropy) and summed else len(losses)
    return float(losses.sum() / count), float(losses.sum())


def is_half(model: nn.Module) -> bool:
    """Whether a model has weights of half precision."""
    return any(p.dtype in (torch.float16, torch.bfloat16) for p in model.parameters())


def warn_of_taught_padding(batches: list[Any]) -> None:
    """Say how many labels stand at padding, where there are any: training teaches them, which is seldom meant.

    Args:
        batches: batches of texts with their labels.
    """
    taught = total = examples = 0
    for batch in batches:
        mask, labels = attention_mask_of(batch), _own_labels(batch)
        if mask is not None and labels is not None and labels.shape == mask.shape:
            taught += int(labels_at_padding(labels, mask).sum())
            total += int((labels != _IGNORED).sum())
            examples += len(labels)
    if taught:
        warn_caller(
            f"{taught:,} of the {total:,} labels of the {examples} examples looked at stand at padding "
            "(attention_mask 0): a loss over labels teaches all that are not -100, so they count here too; set them to "
            "-100, in training as here, if padding should not be learnt.",
            TrainingDataWarning,
        )


def _own_labels(batch: Any) -> Tensor | None:
    """The labels that a batch itself holds."""
    batch = whole_batch(batch)
    if isinstance(batch, Mapping) and (label_key(batch) is None or "decoder_input_ids" in batch):
        return None  # an attention mask beside a decoder's inputs is the encoder's
    targets = inputs_and_targets(batch)[2]
    return targets if isinstance(targets, Tensor) and not targets.is_floating_point() else None

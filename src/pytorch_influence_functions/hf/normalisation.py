"""How much each text counts: by its tokens, or each alike; read from a Trainer, and said."""

from __future__ import annotations

import inspect
from typing import Any, Final

from torch import nn

from ..core.errors import InvalidInput
from ..core.validate import choice
from ..objectives.base import AbstractObjective
from ..objectives.bernoulli import Bernoulli
from ..objectives.likelihoods import CrossEntropy, SquaredError
from ..objectives.tokens import TokenCrossEntropy
from .models import base_model, is_classifier, marks_answers, token_shift
from .spans import SpanCrossEntropy

NORMALISATIONS: Final = ("trainer", "sum", "mean")
# What a Trainer calls optimisers whose weight decay is added to the gradient.
_COUPLED: Final = ("sgd", "rmsprop", "adagrad")


def token_objective(model: nn.Module, normalisation: str, trainer: Any = None) -> TokenCrossEntropy:
    """The loss of a text: the sum over its tokens (`"trainer"`, `"sum"`), or their mean (`"mean"`).

    A Trainer divides the sum of all tokens' losses in a batch by their number, which is about the same for every batch:
    each text counts with the sum over its tokens, times one factor for all. The factor cancels in a score.

    Args:
        model: the model.
        normalisation: one of `NORMALISATIONS`.
        trainer: the Trainer, whose label smoothing is taken.

    Raises:
        InvalidInput: another normalisation, or a model whose loss is not one of tokens.
    """
    choice("normalisation", normalisation, NORMALISATIONS)
    shift = token_shift(model)
    if shift is None:
        raise InvalidInput(
            f"{type(base_model(model)).__name__} is no model that predicts tokens; pass loss=, the loss of its head."
        )
    return TokenCrossEntropy(
        average=normalisation == "mean", shift=shift, label_smoothing=0.0 if trainer is None else smoothing_of(trainer)
    )


def smoothing_of(trainer: Any) -> float:
    """The share of every label that a Trainer spreads over all classes."""
    return float(getattr(getattr(trainer, "label_smoother", None), "epsilon", 0.0))


def describe(normalisation: str, tokens: float | None) -> str:
    """How texts are weighed, in words."""
    each = "" if tokens is None else f", {tokens:.4g} of them on average"
    if normalisation == "mean":
        return f"every text counts alike, with the mean over its predicted tokens{each}"
    why = ", as in a Trainer's mean over the tokens of a batch" if normalisation == "trainer" else ""
    return f"a text counts with the sum over its predicted tokens{each}{why}"


def trainers_normalisation(trainer: Any) -> str:
    """`"trainer"` where it averages over the tokens of a batch; `"mean"` where its batches are single texts.

    Raises:
        InvalidInput: the Trainer computes another loss than the model's.
    """
    if getattr(trainer, "compute_loss_func", None) is not None:
        raise InvalidInput(
            "The Trainer has a compute_loss_func, whose loss is not the model's; pass loss=, an objective or a "
            "function of (outputs, targets) that computes it for each example."
        )
    single = getattr(trainer.args, "per_device_train_batch_size", None) == 1
    counts = getattr(trainer, "model_accepts_loss_kwargs", True) and _smooths_by_count(trainer)
    return "mean" if single and not counts else "trainer"


def describe_decay(trainer: Any) -> str:
    """What a Trainer's weight decay means for scores, in words; empty where it has none."""
    decay = float(getattr(trainer.args, "weight_decay", 0.0) or 0.0)
    if decay == 0:
        return ""
    kind = str(getattr(trainer.args.optim, "value", trainer.args.optim))
    said = f"the Trainer's weight_decay={decay:g} takes no part"
    if kind.startswith(_COUPLED):
        return f"{said}: with {kind} it is a term of its loss, so pass weight_decay=trainer.optimizer"
    return (
        f"{said}: with {kind} it is decoupled, no term of its loss, and damping=FromTraining(lr, steps) stands for it"
    )


def _smooths_by_count(trainer: Any) -> bool:
    """Whether labels that are smoothed are told the number of tokens of the whole batch, as of transformers 5.x."""
    smoother = getattr(trainer, "label_smoother", None)
    return smoother is None or "num_items_in_batch" in inspect.signature(type(smoother).__call__).parameters


def class_objective(model: nn.Module, trainer: Any = None) -> AbstractObjective | None:
    """The loss of marked answers, or of a classifier by its configuration; None where that does not say.

    Args:
        model: the model.
        trainer: the Trainer, whose label smoothing is taken.
    """
    if marks_answers(model):
        return SpanCrossEntropy()
    if not is_classifier(model):
        return None
    config: Any = base_model(model).config
    kind, count = getattr(config, "problem_type", None), int(getattr(config, "num_labels", 0))
    if kind == "regression" or (kind is None and count == 1):
        return SquaredError(average=True, half=False)
    if kind == "multi_label_classification":
        return Bernoulli(average=True)
    smoothing = 0.0 if trainer is None else smoothing_of(trainer)
    return CrossEntropy(label_smoothing=smoothing) if kind == "single_label_classification" or smoothing else None

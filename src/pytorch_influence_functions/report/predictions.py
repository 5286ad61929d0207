"""Predictions and self-influence handed in beside the scores: checked, and predictions turned into text."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, final

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from ..core.errors import InvalidInput, NonFinite, name_ids
from ..scores import indexing
from ..scores.scores import Labels, Scores
from .ranking import four_digits
from .target import Target

_LIKELIEST = 5


@final
@dataclass(frozen=True)
class Prediction:
    """The model's prediction for one example, beside its label.

    Attributes:
        text: the class, or the number with its unit.
        confidence: the share of the class; NaN for a number.
        wrong: whether the class is another than the label's; None without such a label.
        likeliest: the likeliest classes with their shares.
        error: predicted minus labelled number, in raw values; NaN for classes.
    """

    text: str
    confidence: float
    wrong: bool | None
    likeliest: tuple[tuple[str, float], ...]
    error: float = math.nan


@final
@dataclass(frozen=True, eq=False)
class Given:
    """What was handed in beside the scores.

    Attributes:
        target: what the labels are.
        predictions: of the queries, or None.
        train_predictions: of the training examples, or None.
        self_influence: [N], or None.
    """

    target: Target
    predictions: list[Prediction] | None = None
    train_predictions: list[Prediction] | None = None
    self_influence: Tensor | None = None

    @property
    def training_errors(self) -> Float[Tensor, " N"] | None:
        """How far the model is from the number of every training example; None for classes, and where unknown."""
        errors = torch.tensor([p.error for p in self.train_predictions or []], dtype=torch.float64)
        return errors if len(errors) and bool(torch.isfinite(errors).all()) else None


def as_finite(values: Any, name: str) -> Tensor:
    """Turn numbers into a float64 tensor and check that all are finite.

    Raises:
        InvalidInput: not numbers.
        NonFinite: NaN or infinity; the positions are named.
    """
    try:
        tensor = values.detach().cpu() if isinstance(values, Tensor) else torch.as_tensor(np.asarray(values))
        numbers = tensor.double()
    except (TypeError, ValueError, RuntimeError) as cause:
        raise InvalidInput(
            f"{name}= must be numbers, got {type(values).__name__}; give a tensor or an array."
        ) from cause
    finite = (
        torch.isfinite(numbers.reshape(len(numbers), -1)).all(1) if numbers.ndim else torch.ones(1, dtype=torch.bool)
    )
    bad = (~finite).nonzero()[:, 0]
    if len(bad):
        raise NonFinite(f"{name}= holds NaN or infinity at position {name_ids(bad.tolist())}; repair or leave it out.")
    return numbers


def collect_given(
    scores: Scores, target: Target, predictions: Any, train_predictions: Any, self_influence: Any
) -> Given:
    """Check what was handed in beside the scores.

    Raises:
        InvalidInput: sizes that do not fit the scores, or no probabilities.
        NonFinite: NaN or infinity.
    """
    queries, training = Side.queries(scores), Side.training(scores)
    return Given(
        target,
        None if predictions is None else as_predictions(scores, predictions, target, queries),
        None if train_predictions is None else as_predictions(scores, train_predictions, target, training),
        None if self_influence is None else as_self_influence(self_influence, scores.n_train),
    )


def as_self_influence(values: Any, size: int) -> Float[Tensor, " N"]:
    """Check that there is one finite number per training example.

    Raises:
        InvalidInput: another number of them.
        NonFinite: NaN or infinity.
    """
    numbers = as_finite(values, "self_influence")
    if numbers.shape != (size,):
        raise InvalidInput(
            f"self_influence= has shape {tuple(numbers.shape)} and there are {size} training examples; "
            "give one number each."
        )
    return numbers


@final
@dataclass(frozen=True)
class Side:
    """Whose predictions are read: the queries' or the training examples'.

    Attributes:
        name: of the argument, for messages.
        what: what its examples are called.
        labels: their labels, None where they are unknown.
        size: how many there are.
    """

    name: str
    what: str
    labels: Labels
    size: int

    @classmethod
    def queries(cls, scores: Scores) -> Side:
        """The queries of these scores."""
        return cls("predictions", "queries", scores.query_labels, len(scores))

    @classmethod
    def training(cls, scores: Scores) -> Side:
        """The training examples of these scores."""
        return cls("train_predictions", "training examples", scores.train_labels, scores.n_train)


def as_predictions(scores: Scores, values: Any, target: Target, side: Side) -> list[Prediction]:
    """Turn class probabilities [n, C], or one predicted number per example ([n] or [n, 1]), into predictions.

    Where labels are 0 and 1, one number from 0 to 1 is the probability of 1.

    Raises:
        InvalidInput: another shape, negative probabilities, or rows that do not sum to 1.
        NonFinite: NaN or infinity.
    """
    numbers = as_finite(values, side.name)
    if numbers.ndim not in (1, 2) or len(numbers) != side.size:
        raise InvalidInput(
            f"{side.name}= has shape {tuple(numbers.shape)} and there are {side.size} {side.what}; "
            f"give probabilities ({side.what}, classes), or one number for each."
        )
    if numbers.ndim == 2 and numbers.shape[1] == 1:
        numbers = numbers[:, 0]
    if numbers.ndim == 1 and _are_yes_or_no(side.labels) and bool(((numbers >= 0) & (numbers <= 1)).all()):
        numbers = torch.stack([1 - numbers, numbers], 1)
    if numbers.ndim == 1:
        return [
            _predicted_number(target, indexing.member_at(side.labels, i), x) for i, x in enumerate(numbers.tolist())
        ]
    if target.numeric:
        raise InvalidInput(
            f"{side.name}= has {numbers.shape[1]} numbers per example and the labels are one number each; give one "
            "predicted number for each."
        )
    bad = ((numbers < 0).any(1) | ((numbers.sum(1) - 1).abs() > 1e-2)).nonzero()[:, 0]
    if len(bad):
        raise InvalidInput(
            f"{side.name}= are no probabilities at position {name_ids(bad.tolist())}: a row has numbers of at least 0 "
            "that sum to 1; apply softmax to the outputs."
        )
    return [_predicted_class(scores, indexing.member_at(side.labels, i), row) for i, row in enumerate(numbers)]


def _are_yes_or_no(labels: Labels) -> bool:
    return labels is not None and all(label in (0, 1) for label in indexing.plain_values(labels))


def _predicted_number(target: Target, label: Any, value: float) -> Prediction:
    predicted, actual = target.raw(value), target.number(label)
    error = math.nan if actual is None else four_digits(predicted - actual)
    return Prediction(target.number_text(four_digits(predicted)), math.nan, None, (), error)


def _predicted_class(scores: Scores, label: Any, row: Float[Tensor, " C"]) -> Prediction:
    order = torch.argsort(row, descending=True, stable=True)[:_LIKELIEST].tolist()
    likeliest = tuple((scores.label_name(c), four_digits(float(row[c]))) for c in order)
    label = indexing.plain_value(label)
    wrong: bool | None = None
    if isinstance(label, (int, float)):
        wrong = label != order[0]
    elif isinstance(label, str):
        wrong = label != likeliest[0][0]
    return Prediction(likeliest[0][0], four_digits(float(row[order[0]])), wrong, likeliest)

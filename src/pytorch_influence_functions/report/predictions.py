"""Predictions and self-influence handed in beside the scores: checked, and predictions turned into text."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, final

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from ..core.errors import InvalidInput, NonFinite, name_ids
from ..scores import indexing
from ..scores.scores import Scores
from .ranking import four_digits

_LIKELIEST = 5


@final
@dataclass(frozen=True)
class Prediction:
    """The model's prediction for one query: its text, its confidence, whether it is wrong, and the likeliest classes.

    `confidence` is NaN for a predicted number; `wrong` is None if there is no label to compare with.
    """

    text: str
    confidence: float
    wrong: bool | None
    likeliest: tuple[tuple[str, float], ...]


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


def as_predictions(scores: Scores, values: Any) -> list[Prediction]:
    """Turn class probabilities [Q, C], or one predicted number per query [Q], into predictions.

    Raises:
        InvalidInput: another shape, negative probabilities, or rows that do not sum to 1.
        NonFinite: NaN or infinity.
    """
    numbers, queries = as_finite(values, "predictions"), len(scores)
    if numbers.ndim not in (1, 2) or len(numbers) != queries:
        raise InvalidInput(
            f"predictions= has shape {tuple(numbers.shape)} and there are {queries} queries; "
            "give probabilities (queries, classes), or one number per query."
        )
    if numbers.ndim == 1:
        return [Prediction(f"{value:.4g}", float("nan"), None, ()) for value in numbers.tolist()]
    bad = ((numbers < 0).any(1) | ((numbers.sum(1) - 1).abs() > 1e-2)).nonzero()[:, 0]
    if len(bad):
        raise InvalidInput(
            f"predictions= are no probabilities at position {name_ids(bad.tolist())}: a row has numbers of at least 0 "
            "that sum to 1; apply softmax to the outputs."
        )
    return [_prediction(scores, q, row) for q, row in enumerate(numbers)]


def _prediction(scores: Scores, q: int, row: Float[Tensor, " C"]) -> Prediction:
    order = torch.argsort(row, descending=True, stable=True)[:_LIKELIEST].tolist()
    likeliest = tuple((scores.label_name(c), four_digits(float(row[c]))) for c in order)
    label = indexing.plain_value(indexing.member_at(scores.query_labels, q))
    wrong: bool | None = None
    if isinstance(label, int):
        wrong = label != order[0]
    elif isinstance(label, str):
        wrong = label != likeliest[0][0]
    return Prediction(likeliest[0][0], four_digits(float(row[order[0]])), wrong, likeliest)

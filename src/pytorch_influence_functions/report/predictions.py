"""What the model says about the queries, where it is handed over: checked, and put in words."""

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
from .ranking import short

_SHOWN = 5


@final
@dataclass(frozen=True)
class Said:
    """The model's word on one query: what it said, how sure, whether that is wrong, the likeliest classes.

    `confidence` is NaN for a predicted number; `wrong` is None where there is no label to compare with.
    """

    words: str
    confidence: float
    wrong: bool | None
    likeliest: tuple[tuple[str, float], ...]


def side_input(values: Any, name: str) -> Tensor:
    """Numbers handed in beside the scores, as a float64 tensor.

    Raises:
        InvalidInput: not numbers.
        NonFinite: NaN or infinity; the positions are named.
    """
    try:
        held = values.detach().cpu() if isinstance(values, Tensor) else torch.as_tensor(np.asarray(values))
        found = held.double()
    except (TypeError, ValueError, RuntimeError) as cause:
        raise InvalidInput(
            f"{name}= must be numbers, got {type(values).__name__}; give a tensor or an array."
        ) from cause
    bad = (~torch.isfinite(found.reshape(len(found), -1)).all(1)).nonzero()[:, 0] if found.ndim else torch.zeros(0)
    if len(bad):
        raise NonFinite(f"{name}= holds NaN or infinity at position {name_ids(bad.tolist())}; repair or leave it out.")
    return found


def self_influence_of(values: Any, size: int) -> Float[Tensor, " N"]:
    """One number per training example, checked.

    Raises:
        InvalidInput: another number of them.
        NonFinite: NaN or infinity.
    """
    found = side_input(values, "self_influence")
    if found.shape != (size,):
        raise InvalidInput(
            f"self_influence= has shape {tuple(found.shape)} and there are {size} training examples; "
            "give one number each."
        )
    return found


def said_of(scores: Scores, values: Any) -> list[Said]:
    """`values`: class probabilities [Q, C], or one predicted number per query [Q].

    Raises:
        InvalidInput: another shape, negative probabilities, or rows that do not sum to 1.
        NonFinite: NaN or infinity.
    """
    found, queries = side_input(values, "predictions"), len(scores)
    if found.ndim not in (1, 2) or len(found) != queries:
        raise InvalidInput(
            f"predictions= has shape {tuple(found.shape)} and there are {queries} queries; "
            "give probabilities (queries, classes), or one number per query."
        )
    if found.ndim == 1:
        return [Said(f"{value:.4g}", float("nan"), None, ()) for value in found.tolist()]
    off = ((found < 0).any(1) | ((found.sum(1) - 1).abs() > 1e-2)).nonzero()[:, 0]
    if len(off):
        raise InvalidInput(
            f"predictions= are no probabilities at position {name_ids(off.tolist())}: a row has numbers of at least 0 "
            "that sum to 1; apply softmax to the outputs."
        )
    return [_said(scores, q, row) for q, row in enumerate(found)]


def _said(scores: Scores, q: int, row: Float[Tensor, " C"]) -> Said:
    order = torch.argsort(row, descending=True, stable=True)[:_SHOWN].tolist()
    likeliest = tuple((scores.label_name(c), short(float(row[c]))) for c in order)
    label = indexing.plain_value(indexing.member_at(scores.query_labels, q))
    wrong: bool | None = None
    if isinstance(label, int):
        wrong = label != order[0]
    elif isinstance(label, str):
        wrong = label != likeliest[0][0]
    return Said(likeliest[0][0], short(float(row[order[0]])), wrong, likeliest)

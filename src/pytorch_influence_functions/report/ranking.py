"""Sums over queries and the extremes of each row, fast enough for 1,000 queries x 100,000 examples."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, final

import torch
from jaxtyping import Float, Int
from torch import Tensor

from ..scores import indexing
from ..scores.scores import Scores

_MAX_CLASSES = 60  # labels of more kinds than this are values, not classes
_BINS = 60


@final
@dataclass(frozen=True, eq=False)
class Classes:
    """Labels as numbers 0 to C - 1, for queries and training examples alike.

    Attributes:
        names: the name of each class.
        train: [N], the class of each training example.
        query: [Q], the class of each query.
    """

    names: list[str]
    train: Int[Tensor, " N"]
    query: Int[Tensor, " Q"]

    @classmethod
    def of(cls, scores: Scores) -> Classes | None:
        """The classes of these scores, or None if labels are unknown, are real numbers, or are of too many kinds."""
        if scores.train_labels is None or scores.query_labels is None:
            return None
        train, query = indexing.plain_values(scores.train_labels), indexing.plain_values(scores.query_labels)
        if all(isinstance(label, float) and label in (0.0, 1.0) for label in (*train, *query)):
            train, query = list(map(int, train)), list(map(int, query))  # yes or no, as losses of one logit want it
        if not all(isinstance(label, (int, str)) for label in (*train, *query)):
            return None
        kinds = sorted({*train, *query}, key=lambda label: (isinstance(label, str), label))
        if len(kinds) > _MAX_CLASSES:
            return None
        number = {label: i for i, label in enumerate(kinds)}
        names = [scores.label_name(label) for label in kinds]
        return cls(names, torch.tensor([number[x] for x in train]), torch.tensor([number[x] for x in query]))


@final
@dataclass(frozen=True, eq=False)
class Sums:
    """The effect of each training example on all queries together. Scores that are not stored count as 0.

    Attributes:
        mean: [N], mean score over all queries.
        harm: [C, N], mean harm to the queries of each class (the score, with the sign that makes harm positive);
            None without classes.
        reach: [N], mean absolute score.
    """

    mean: Float[Tensor, " N"]
    harm: Float[Tensor, "C N"] | None
    reach: Float[Tensor, " N"]

    @classmethod
    def of(cls, scores: Scores, classes: Classes | None) -> Sums:
        """Sum the scores, query by query."""
        total, reach = torch.zeros(2, scores.n_train, dtype=torch.float64)
        harm = None if classes is None else torch.zeros(len(classes.names), scores.n_train, dtype=torch.float64)
        sign = harm_sign(scores)
        for q in range(len(scores)):
            row = scores.values[q].double()
            columns = slice(None) if scores.indices is None else scores.indices[q]
            total[columns] += row
            reach[columns] += row.abs()
            if harm is not None and classes is not None:
                harm[int(classes.query[q])][columns] += sign * row
        if harm is not None and classes is not None:
            harm /= torch.bincount(classes.query, minlength=len(classes.names)).clamp(min=1)[:, None]
        return cls(total / len(scores), harm, reach / len(scores))


def harm_sign(scores: Scores) -> float:
    """The factor that makes harm positive: removing a harmful example lowers a loss."""
    return -1.0 if scores.lower_is_better else 1.0


def extremes(scores: Scores, q: int, k: int) -> tuple[list[tuple[int, float]], list[tuple[int, float]]]:
    """The same as `(scores.helpful(q, k), scores.harmful(q, k))` without sorting the whole row.

    >>> s = Scores(torch.tensor([[0.1, -0.3, 0.2, 0.2]]))
    >>> extremes(s, 0, 2) == (s.helpful(0, 2), s.harmful(0, 2))
    True
    """
    values, index = score_row(scores, q)
    best = _extreme_columns(values, k, largest=scores.lower_is_better)
    worst = _extreme_columns(values, k, largest=not scores.lower_is_better)
    return _pair_up(index, values, best), _pair_up(index, values, worst)


def score_row(scores: Scores, q: int) -> tuple[Tensor, Int[Tensor, " m"]]:
    """The stored scores of query `q` in the order of training indices, and these indices."""
    if scores.indices is None:
        return scores.values[q], torch.arange(scores.shape[1])
    order = scores.indices[q].argsort()
    return scores.values[q][order], scores.indices[q][order]


def _pair_up(index: Tensor, values: Tensor, columns: Tensor) -> list[tuple[int, float]]:
    """(training index, score) of some columns."""
    return list(zip(index[columns].tolist(), values[columns].tolist(), strict=True))


def _extreme_columns(values: Tensor, k: int, largest: bool) -> Int[Tensor, " k"]:
    """The columns of the `k` extreme values; equal values by index, as `Scores` orders them."""
    k = min(k, len(values))
    bound = torch.topk(values, k, largest=largest).values[-1]
    columns = (values >= bound if largest else values <= bound).nonzero()[:, 0]
    return columns[torch.argsort(values[columns], descending=largest, stable=True)][:k]


def score_columns(scores: Scores, ids: Int[Tensor, " n"]) -> Float[Tensor, "Q n"]:
    """The scores of some training examples on every query; 0 where they are not stored."""
    if scores.indices is None:
        return scores.values[:, ids].double()
    place = torch.full((scores.n_train,), -1)
    place[ids] = torch.arange(len(ids))
    columns = torch.zeros(len(scores), len(ids), dtype=torch.float64)
    for q in range(len(scores)):
        column = place[scores.indices[q]]
        columns[q, column[column >= 0]] = scores.values[q][column >= 0].double()
    return columns


def histogram(values: Tensor) -> dict[str, Any]:
    """Counts in equal steps from the smallest to the largest score: `lo`, `hi`, `n`."""
    low, high = float(values.min()), float(values.max())
    if high <= low:
        return {"lo": low, "hi": high, "n": [len(values)]}
    steps = ((values.double() - low) * (_BINS / (high - low))).long().clamp_(0, _BINS - 1)
    return {"lo": four_digits(low), "hi": four_digits(high), "n": torch.bincount(steps, minlength=_BINS).tolist()}


def four_digits(value: float) -> float:
    """Round to four digits, which take a third of the space in the page."""
    return float(f"{value:.4g}")

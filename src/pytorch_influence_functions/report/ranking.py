"""Sums over queries and the ends of each row, fast enough for 1,000 queries x 100,000 examples."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, final

import torch
from jaxtyping import Float, Int
from torch import Tensor

from ..scores import indexing
from ..scores.scores import Scores

_CLASSES = 60  # more kinds of label than this are not classes but values
_BINS = 60


@final
@dataclass(frozen=True, eq=False)
class Classes:
    """Labels as numbers 0 to C - 1, for queries and training examples alike.

    Attributes:
        names: what to call them.
        train: [N], of each training example.
        query: [Q], of each query.
    """

    names: list[str]
    train: Int[Tensor, " N"]
    query: Int[Tensor, " Q"]

    @classmethod
    def of(cls, scores: Scores) -> Classes | None:
        """The classes of these scores, or None where labels are unknown, are numbers, or are too many kinds."""
        if scores.train_labels is None or scores.query_labels is None:
            return None
        train, query = indexing.plain_values(scores.train_labels), indexing.plain_values(scores.query_labels)
        if not all(isinstance(label, (int, str)) for label in (*train, *query)):
            return None
        found = sorted({*train, *query}, key=lambda label: (isinstance(label, str), label))
        if len(found) > _CLASSES:
            return None
        number = {label: at for at, label in enumerate(found)}
        names = [scores.label_name(label) for label in found]
        return cls(names, torch.tensor([number[x] for x in train]), torch.tensor([number[x] for x in query]))


@final
@dataclass(frozen=True, eq=False)
class Sums:
    """What each training example does to the queries taken together. Scores that are not held count as 0.

    Attributes:
        mean: [N], mean score over all queries.
        harm: [C, N], mean harm to the queries of each class: the score with the sign that makes harm positive.
            None without classes.
        reach: [N], mean absolute score.
    """

    mean: Float[Tensor, " N"]
    harm: Float[Tensor, "C N"] | None
    reach: Float[Tensor, " N"]

    @classmethod
    def of(cls, scores: Scores, classes: Classes | None) -> Sums:
        """One pass over the scores, a block of queries at a time."""
        total, reach = torch.zeros(2, scores.n_train, dtype=torch.float64)
        harm = None if classes is None else torch.zeros(len(classes.names), scores.n_train, dtype=torch.float64)
        sign = harm_sign(scores)
        for q in range(len(scores)):
            row = scores.values[q].double()
            at = slice(None) if scores.indices is None else scores.indices[q]
            total[at] += row
            reach[at] += row.abs()
            if harm is not None and classes is not None:
                harm[int(classes.query[q])][at] += sign * row
        if harm is not None and classes is not None:
            harm /= torch.bincount(classes.query, minlength=len(classes.names)).clamp(min=1)[:, None]
        return cls(total / len(scores), harm, reach / len(scores))


def harm_sign(scores: Scores) -> float:
    """What a score is multiplied by so that harm is positive: a harmful example's removal lowers a loss."""
    return -1.0 if scores.lower_is_better else 1.0


def ends(scores: Scores, q: int, k: int) -> tuple[list[tuple[int, float]], list[tuple[int, float]]]:
    """The same as `(scores.helpful(q, k), scores.harmful(q, k))` without sorting the whole row.

    >>> s = Scores(torch.tensor([[0.1, -0.3, 0.2, 0.2]]))
    >>> ends(s, 0, 2) == (s.helpful(0, 2), s.harmful(0, 2))
    True
    """
    values, index = row(scores, q)
    best = _end(values, k, largest=scores.lower_is_better)
    worst = _end(values, k, largest=not scores.lower_is_better)
    return pairs(index, values, best), pairs(index, values, worst)


def row(scores: Scores, q: int) -> tuple[Tensor, Int[Tensor, " m"]]:
    """The scores held for query `q` in the order of training indices, and these indices."""
    if scores.indices is None:
        return scores.values[q], torch.arange(scores.shape[1])
    order = scores.indices[q].argsort()
    return scores.values[q][order], scores.indices[q][order]


def pairs(index: Tensor, values: Tensor, at: Tensor) -> list[tuple[int, float]]:
    """(training index, score) of the columns `at`."""
    return list(zip(index[at].tolist(), values[at].tolist(), strict=True))


def _end(values: Tensor, k: int, largest: bool) -> Int[Tensor, " k"]:
    """Columns of the `k` extreme values; equal ones by index, as `Scores` orders them."""
    k = min(k, len(values))
    bound = torch.topk(values, k, largest=largest).values[-1]
    reached = (values >= bound if largest else values <= bound).nonzero()[:, 0]
    return reached[torch.argsort(values[reached], descending=largest, stable=True)][:k]


def histogram(values: Tensor) -> dict[str, Any]:
    """Counts in equal steps from the smallest to the largest score: `lo`, `hi`, `n`."""
    low, high = float(values.min()), float(values.max())
    if high <= low:
        return {"lo": low, "hi": high, "n": [len(values)]}
    steps = ((values.double() - low) * (_BINS / (high - low))).long().clamp_(0, _BINS - 1)
    return {"lo": short(low), "hi": short(high), "n": torch.bincount(steps, minlength=_BINS).tolist()}


def short(value: float) -> float:
    """Four digits: what a reader sees, and a third of the size in a page."""
    return float(f"{value:.4g}")

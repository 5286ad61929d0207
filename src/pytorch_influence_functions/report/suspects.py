"""Training examples to look at again: doubtful labels, near duplicates and contradictions."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from ..scores.scores import Scores
from .predictions import Prediction
from .ranking import Classes, Sums, four_digits, harm_sign, score_columns
from .thumbnails import ExampleReader, comparison_vector

_OPPONENTS = 3
_NEAR_SHARE = 0.25
"""Two inputs are nearly the same if they differ by at most this share of the difference of two random ones."""
_BLOCK = 1024


def label_queue(
    scores: Scores,
    classes: Classes | None,
    sums: Sums,
    self_influence: Tensor | None,
    size: int,
    errors: Float[Tensor, " N"] | None = None,
    doubt: Float[Tensor, " N"] | None = None,
    said: list[Prediction] | None = None,
) -> list[dict[str, Any]]:
    """The `size` training examples whose labels look most doubtful, worst first, each with its evidence.

    The order is by `doubt` if it is given, else by self-influence, else by the mean harm to all queries. With `errors`,
    how far the model is from the number of every example, that order and the largest errors give an example by turns.

    Keys: `i` index, `o` self-influence, `p` share of examples with a smaller one, `h` mean harm to all queries,
    `g` suggested class, by what the model `said` of each example where that is known; `gh` harm that a tenth of its
    queries suffer at least, where there is any; `q` opponents: (query row, score) of the queries of other classes that
    the example harms most.
    """
    harm = harm_sign(scores) * sums.mean
    suspicion = next(values for values in (doubt, self_influence, harm) if values is not None)
    order = torch.argsort(suspicion, descending=True, stable=True)
    if errors is not None:
        order = _take_turns(order, torch.argsort(errors.abs(), descending=True, stable=True))
    order = order[:size]
    columns = score_columns(scores, order)
    opponents = _opponents(scores, columns, classes, order)
    suggested = _suggestions(scores, columns, classes, order, said)
    ascending = None if self_influence is None else self_influence.sort().values
    queue: list[dict[str, Any]] = []
    for place, i in enumerate(order.tolist()):
        entry: dict[str, Any] = {"i": i, "h": four_digits(float(harm[i])), "q": opponents[place]}
        if self_influence is not None and ascending is not None:
            below = int(torch.searchsorted(ascending, self_influence[i]))
            entry |= {"o": four_digits(float(self_influence[i])), "p": four_digits(below / len(self_influence))}
        queue.append(entry | suggested[place])
    return queue


def _take_turns(first: Int[Tensor, " n"], second: Int[Tensor, " n"]) -> Int[Tensor, " n"]:
    """Both orders merged, one of each by turns, each example where it comes first."""
    both = torch.stack([first, second], 1).reshape(-1).tolist()
    return torch.tensor(list(dict.fromkeys(both)))


def _suggestions(
    scores: Scores,
    columns: Float[Tensor, "Q n"],
    classes: Classes | None,
    ids: Int[Tensor, " n"],
    said: list[Prediction] | None,
) -> list[dict[str, Any]]:
    """For each of `ids` the class it may be of: the model's likeliest but for its label, else the one it harms most.

    A wrong label harms queries of the right class. A class is measured by the harm that at least a tenth of its queries
    suffer. Only queries that look like the example are harmed much: a mean over the class would hide them, and a
    maximum would depend on a single one. What the model says is right more often.
    """
    if classes is None or len(classes.names) < 2:
        return [{} for _ in range(len(ids))]
    harm = torch.full((len(classes.names), len(ids)), -torch.inf, dtype=torch.float64)
    for c in sorted(set(classes.query.tolist())):
        harm[c] = (harm_sign(scores) * columns[classes.query == c]).quantile(0.9, dim=0)
    own = classes.train[ids]
    harm[own, torch.arange(len(ids))] = -torch.inf
    suggestions: list[dict[str, Any]] = []
    for place, (i, label) in enumerate(zip(ids.tolist(), own.tolist(), strict=True)):
        likely = None if said is None else _likeliest_other(said[i], classes.names, label)
        c = int(harm[:, place].argmax()) if likely is None else likely
        suffered = float(harm[c, place])
        words = {"g": classes.names[c]} if likely is not None or suffered > 0 else {}
        suggestions.append(words | ({"gh": four_digits(suffered)} if suffered > 0 else {}))
    return suggestions


def _likeliest_other(prediction: Prediction, names: list[str], label: int) -> int | None:
    """The likeliest class but for the label; None where it is none of the names."""
    likely = next((name for name, _ in prediction.likeliest if name != names[label]), None)
    return names.index(likely) if likely in names else None


def _opponents(
    scores: Scores, columns: Float[Tensor, "Q n"], classes: Classes | None, ids: Int[Tensor, " n"]
) -> list[list[tuple[int, float]]]:
    """For each of `ids` the queries of other classes that it harms most: [(query row, score), …]."""
    harm = harm_sign(scores) * columns
    if classes is not None:
        harm[classes.query[:, None] == classes.train[ids][None, :]] = -torch.inf
    values, rows = harm.topk(min(_OPPONENTS, len(scores)), 0)
    return [
        [
            (q, four_digits(float(columns[q, j])))
            for q, v in zip(rows[:, j].tolist(), values[:, j].tolist(), strict=True)
            if v > 0
        ]
        for j in range(len(ids))
    ]


# --------------------------------------------------------------------------- pairs


def close_pairs(
    scores: Scores, train: ExampleReader, sums: Sums, labels: list[str], among: int, size: int
) -> dict[str, list[dict[str, Any]]]:
    """Pairs of training examples with nearly equal inputs: `same` label (duplicates) and `other` label (conflicts).

    Only the `among` most influential examples are compared. Keys: `a`, `b` indices; `d` their difference as a share of
    that between two random examples; `c` the cosine of their scores over the queries, 1 if they act alike.
    """
    ids = torch.argsort(sums.reach, descending=True, stable=True)[:among].sort().values
    compared, features = _features(train, ids.tolist())
    if len(compared) < 2:
        return {"same": [], "other": []}
    numbers = {label: i for i, label in enumerate(dict.fromkeys(labels))}
    group = torch.tensor([numbers[labels[i]] for i in compared])
    effects = torch.nn.functional.normalize(score_columns(scores, torch.tensor(compared)), dim=0)
    pairs: dict[str, list[dict[str, Any]]] = {}
    for kind, alike in (("same", True), ("other", False)):
        pairs[kind] = [
            {
                "a": compared[x],
                "b": compared[y],
                "d": four_digits(d),
                "c": four_digits(float(effects[:, x] @ effects[:, y])),
            }
            for d, x, y in _closest(features, group, alike, size)
        ]
    return pairs


def _features(train: ExampleReader, ids: list[int]) -> tuple[list[int], Float[Tensor, "n d"]]:
    """The examples of the most common kind as vectors to compare; columns of tables are put on a common scale."""
    vectors = [(i, v) for i in ids if (v := comparison_vector(train, i)) is not None]
    kinds = [kind for _, (kind, _) in vectors]
    if not kinds:
        return [], torch.zeros(0, 1)
    common = max(sorted(set(kinds)), key=kinds.count)
    common_vectors = [(i, v) for i, (kind, v) in vectors if kind == common]
    features = torch.from_numpy(np.stack([v for _, v in common_vectors])).double()
    if common.startswith("row"):
        features = (features - features.mean(0)) / features.std(0, correction=0).clamp(min=1e-12)
    return [i for i, _ in common_vectors], features.float()


def _closest(
    features: Float[Tensor, "n d"], group: Int[Tensor, " n"], alike: bool, limit: int
) -> list[tuple[float, int, int]]:
    """The closest pairs within (`alike`) or across groups, at most `limit`: share of the typical difference, rows."""
    n = len(features)
    a, b = torch.randint(n, (2, 4000), generator=torch.Generator().manual_seed(0))
    typical = float((features[a] - features[b])[a != b].norm(dim=1).median()) if bool((a != b).any()) else 0.0
    pairs: list[tuple[float, int, int]] = []
    for start in range(0, n if typical > 0 else 0, _BLOCK):
        block = torch.cdist(features[start : start + _BLOCK], features)
        rows = torch.arange(start, start + len(block))
        block[(rows[:, None] >= torch.arange(n)) | ((group[rows][:, None] == group) != alike)] = torch.inf
        x, y = (block <= _NEAR_SHARE * typical).nonzero(as_tuple=True)
        order = torch.argsort(block[x, y], stable=True)[:limit]
        x, y = x[order] + start, y[order]
        # The differences are taken again by subtraction: cdist rounds, and equal inputs must differ by 0.
        exact = (features[x] - features[y]).norm(dim=1) / typical
        pairs += list(zip(exact.tolist(), x.tolist(), y.tolist(), strict=True))
    return sorted(pairs)[:limit]

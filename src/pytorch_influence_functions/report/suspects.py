"""Training examples worth a second look: doubtful labels, near duplicates, contradictions, the most influential."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from ..scores.scores import Scores
from .ranking import Classes, Sums, harm_sign, short
from .thumbnails import Lens, vector

_OPPONENTS = 3
_NEAR = 0.25
"""Two inputs are nearly the same when they differ by at most this share of what two random ones differ by."""
_BLOCK = 1024


def label_queue(
    scores: Scores, classes: Classes | None, sums: Sums, own: Tensor | None, size: int
) -> list[dict[str, Any]]:
    """The `size` training examples whose labels look most doubtful, worst first, each with its evidence.

    Order: by self-influence where it is given, else by the mean harm to all queries.

    Keys: `i` index, `o` self-influence, `p` share of examples with a smaller one, `h` mean harm to all queries,
    `g` suggested class, `gh` harm that a tenth of its queries suffer at least, `q` opponents: (query row, score) of
    the queries of other classes that the example harms most.
    """
    harm = harm_sign(scores) * sums.mean
    order = torch.argsort(harm if own is None else own, descending=True, stable=True)[:size]
    columns = columns_of(scores, order)
    against = _opponents(scores, columns, classes, order)
    suggested = _suggestions(scores, columns, classes, order)
    ranked = None if own is None else own.sort().values
    found: list[dict[str, Any]] = []
    for at, i in enumerate(order.tolist()):
        entry: dict[str, Any] = {"i": i, "h": short(float(harm[i])), "q": against[at]}
        if own is not None and ranked is not None:
            below = int(torch.searchsorted(ranked, own[i]))
            entry |= {"o": short(float(own[i])), "p": short(below / len(own))}
        found.append(entry | suggested[at])
    return found


def _suggestions(
    scores: Scores, columns: Float[Tensor, "Q n"], classes: Classes | None, ids: Int[Tensor, " n"]
) -> list[dict[str, Any]]:
    """For each of `ids` the other class whose queries it harms most: a wrong label denies the right one.

    Judged by the harm that a tenth of the queries of a class suffer at least: only queries that look like the example
    suffer much, so a mean over the class would drown them, and a maximum would listen to one.
    """
    if classes is None or len(classes.names) < 2:
        return [{} for _ in range(len(ids))]
    harm = torch.full((len(classes.names), len(ids)), -torch.inf, dtype=torch.float64)
    for c in sorted(set(classes.query.tolist())):
        harm[c] = (harm_sign(scores) * columns[classes.query == c]).quantile(0.9, dim=0)
    harm[classes.train[ids], torch.arange(len(ids))] = -torch.inf
    worst, suggested = harm.max(0)
    return [
        {"g": classes.names[c], "gh": short(h)} if h > 0 else {}
        for c, h in zip(suggested.tolist(), worst.tolist(), strict=True)
    ]


def _opponents(
    scores: Scores, columns: Float[Tensor, "Q n"], classes: Classes | None, ids: Int[Tensor, " n"]
) -> list[list[tuple[int, float]]]:
    """For each of `ids` the queries it harms most, among those of another class: [(query row, score), …]."""
    harm = harm_sign(scores) * columns
    if classes is not None:
        harm[classes.query[:, None] == classes.train[ids][None, :]] = -torch.inf
    values, at = harm.topk(min(_OPPONENTS, len(scores)), 0)
    return [
        [
            (q, short(float(columns[q, j])))
            for q, v in zip(at[:, j].tolist(), values[:, j].tolist(), strict=True)
            if v > 0
        ]
        for j in range(len(ids))
    ]


def columns_of(scores: Scores, ids: Int[Tensor, " n"]) -> Float[Tensor, "Q n"]:
    """The scores of some training examples on every query; 0 where they are not held."""
    if scores.indices is None:
        return scores.values[:, ids].double()
    place = torch.full((scores.n_train,), -1)
    place[ids] = torch.arange(len(ids))
    found = torch.zeros(len(scores), len(ids), dtype=torch.float64)
    for q in range(len(scores)):
        at = place[scores.indices[q]]
        found[q, at[at >= 0]] = scores.values[q][at >= 0].double()
    return found


# --------------------------------------------------------------------------- pairs


def close_pairs(
    scores: Scores, one: Lens, sums: Sums, labels: list[str], among: int, size: int
) -> dict[str, list[dict[str, Any]]]:
    """Pairs of training examples with nearly equal inputs: `same` label (duplicates) and `other` label (conflicts).

    Looked for among the `among` most influential examples. Keys: `a`, `b` indices; `d` their difference as a share
    of that between two random examples; `c` the cosine of their scores over the queries: 1, they act alike.
    """
    ids = torch.argsort(sums.reach, descending=True, stable=True)[:among].sort().values
    kept, features = _features(one, ids.tolist())
    if len(kept) < 2:
        return {"same": [], "other": []}
    numbers = {label: at for at, label in enumerate(dict.fromkeys(labels))}
    group = torch.tensor([numbers[labels[i]] for i in kept])
    acting = torch.nn.functional.normalize(columns_of(scores, torch.tensor(kept)), dim=0)
    found: dict[str, list[dict[str, Any]]] = {}
    for kind, alike in (("same", True), ("other", False)):
        found[kind] = [
            {"a": kept[x], "b": kept[y], "d": short(d), "c": short(float(acting[:, x] @ acting[:, y]))}
            for d, x, y in _closest(features, group, alike, size)
        ]
    return found


def _features(one: Lens, ids: list[int]) -> tuple[list[int], Float[Tensor, "n d"]]:
    """The examples of the most common kind, as vectors that compare; columns of tables on a common scale."""
    found = [(i, v) for i in ids if (v := vector(one, i)) is not None]
    kinds = [kind for _, (kind, _) in found]
    if not kinds:
        return [], torch.zeros(0, 1)
    common = max(sorted(set(kinds)), key=kinds.count)
    kept = [(i, v) for i, (kind, v) in found if kind == common]
    features = torch.from_numpy(np.stack([v for _, v in kept])).double()
    if common.startswith("row"):
        features = (features - features.mean(0)) / features.std(0, correction=0).clamp(min=1e-12)
    return [i for i, _ in kept], features.float()


def _closest(
    features: Float[Tensor, "n d"], group: Int[Tensor, " n"], alike: bool, limit: int
) -> list[tuple[float, int, int]]:
    """The closest pairs within (`alike`) or across groups, at most `limit`: share of the typical difference, rows."""
    n = len(features)
    a, b = torch.randint(n, (2, 4000), generator=torch.Generator().manual_seed(0))
    typical = float((features[a] - features[b])[a != b].norm(dim=1).median()) if bool((a != b).any()) else 0.0
    found: list[tuple[float, int, int]] = []
    for start in range(0, n if typical > 0 else 0, _BLOCK):
        block = torch.cdist(features[start : start + _BLOCK], features)
        rows = torch.arange(start, start + len(block))
        block[(rows[:, None] >= torch.arange(n)) | ((group[rows][:, None] == group) != alike)] = torch.inf
        x, y = (block <= _NEAR * typical).nonzero(as_tuple=True)
        order = torch.argsort(block[x, y], stable=True)[:limit]
        x, y = x[order] + start, y[order]
        # Once more by subtraction: the fast form above rounds, and equal inputs shall differ by 0.
        exact = (features[x] - features[y]).norm(dim=1) / typical
        found += list(zip(exact.tolist(), x.tolist(), y.tolist(), strict=True))
    return sorted(found)[:limit]

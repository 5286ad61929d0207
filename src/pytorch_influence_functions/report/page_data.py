"""What a report says, as plain lists and numbers: everything the page shows, nothing about how it looks."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, final

import torch
from torch import Tensor

from ..scores import indexing
from ..scores.scores import Scores
from .predictions import Said
from .ranking import Classes, Sums, ends, histogram, row, short
from .suspects import close_pairs, label_queue
from .thumbnails import QUERY_LETTERS, QUERY_SCALE, Detail, Lens

QUEUE, PAIRS, TOP = 200, 40, 50
"""Entries at most: of the label queue, of either list of pairs, of either end of the most influential."""
DOUBTED, FEWEST = 10, 20
"""One example in so many enters the label queue, but at least so many examples: not all labels can be doubtful."""
COMPARED = 4000
"""The most influential examples, among which near duplicates are looked for."""
EXAMPLES_PER_CHUNK, QUERIES_PER_CHUNK = 120, 20
"""Pieces of the page that are read when they are looked at."""


@final
@dataclass(frozen=True, eq=False)
class Contents:
    """All findings, without the examples themselves.

    Attributes:
        index: what the page reads first: names, labels and filters of queries, lists of the training set.
        lists: per query `{"help", "harm": [[index, score], …], "hist": {…}, "likely": [[class, share], …]}`.
        examples: the training indices that appear anywhere, ascending.
        own: [N], self-influence, or None.
    """

    scores: Scores
    index: dict[str, Any]
    lists: list[dict[str, Any]]
    examples: list[int]
    own: Tensor | None


def contents(scores: Scores, train: Lens, k: int, said: list[Said] | None, own: Tensor | None) -> Contents:
    """Every number of the page. Reads the data only to compare inputs (`close_pairs`)."""
    classes = Classes.of(scores)
    sums = Sums.of(scores, classes)
    lists = [_lists(scores, q, k, said) for q in range(len(scores))]
    doubted = min(QUEUE, max(FEWEST, scores.n_train // DOUBTED))
    queue = label_queue(scores, classes, sums, own, doubted)
    labels = (
        [scores.label_name(x) for x in indexing.plain_values(scores.train_labels)]
        if scores.train_labels is not None
        else []
    )
    compared = min(COMPARED, scores.n_train)
    pairs: dict[str, list[dict[str, Any]]] = {"same": [], "other": []}
    if train.source is not None:
        pairs = close_pairs(scores, train, sums, labels or [""] * scores.n_train, compared, PAIRS)
    mean = replace(
        scores, values=sums.mean[None], indices=None, query_ids=torch.tensor([-1]), query_labels=None, query_names=None
    )
    helpful, harmful = ends(mean, 0, min(TOP, scores.n_train))
    index = {
        "n": scores.n_train,
        "loss": scores.lower_is_better,
        "queries": _queries(scores, said),
        "queue": queue,
        "queueBy": "self" if own is not None else "mean",
        "pairs": pairs,
        "compared": compared if train.source is not None else 0,
        "top": {"help": _rounded(helpful), "harm": _rounded(harmful)},
        "classes": None if classes is None else _matrix(scores, classes, sums, queue, said),
        "held": scores.shape[1],
    }
    shown = {i for entry in lists for side in ("help", "harm") for i, _ in entry[side]}
    shown |= {entry["i"] for entry in queue} | {i for i, _ in helpful + harmful}
    shown |= {pair[side] for kind in pairs.values() for pair in kind for side in ("a", "b")}
    return Contents(scores, index, lists, sorted(shown), own)


def _rounded(found: list[tuple[int, float]]) -> list[tuple[int, float]]:
    return [(i, short(score)) for i, score in found]


def _lists(scores: Scores, q: int, k: int, said: list[Said] | None) -> dict[str, Any]:
    helpful, harmful = ends(scores, q, k)
    found: dict[str, Any] = {"help": _rounded(helpful), "harm": _rounded(harmful)}
    found["hist"] = histogram(row(scores, q)[0])
    if said is not None:
        found["likely"] = said[q].likeliest
    return found


def _queries(scores: Scores, said: list[Said] | None) -> dict[str, Any]:
    """Columns, one entry per query: position in the dataset, name, label, prediction, confidence, wrong (0, 1)."""
    labels = [None] * len(scores) if scores.query_labels is None else indexing.plain_values(scores.query_labels)
    found: dict[str, Any] = {
        "id": scores.query_ids.tolist(),
        "name": [clean(scores.describe_query(q)) for q in range(len(scores))],
        "label": [clean(scores.label_name(label)) for label in labels],
    }
    if said is not None:
        found["said"] = [clean(s.words) for s in said]
        found["sure"] = [None if math.isnan(s.confidence) else s.confidence for s in said]
        found["wrong"] = [None if s.wrong is None else int(s.wrong) for s in said]
    return found


def _matrix(
    scores: Scores, classes: Classes, sums: Sums, queue: list[dict[str, Any]], said: list[Said] | None
) -> dict[str, Any]:
    """Per class: sizes, doubtful labels, mistakes; and the mean score of class (row) on queries of class (column)."""
    count, size = len(classes.names), scores.n_train
    trained = torch.bincount(classes.train, minlength=count)
    asked = torch.bincount(classes.query, minlength=count)
    matrix = torch.zeros(count, count, dtype=torch.float64)
    if sums.harm is not None:
        sign = -1.0 if scores.lower_is_better else 1.0
        for column in range(count):
            total = torch.zeros(count, dtype=torch.float64).index_add_(0, classes.train, sign * sums.harm[column])
            matrix[:, column] = total / trained.clamp(min=1)
    doubtful = torch.bincount(classes.train[[e["i"] for e in queue]], minlength=count)
    found: dict[str, Any] = {
        "names": [clean(name) for name in classes.names],
        "train": trained.tolist(),
        "asked": asked.tolist(),
        "doubtful": doubtful.tolist(),
        "matrix": [
            [short(v) if trained[a] and asked[b] else None for b, v in enumerate(line)]
            for a, line in enumerate(matrix.tolist())
        ],
        "share": [short(float(n) / size) for n in trained],
    }
    if said is not None:
        wrong = torch.tensor([bool(s.wrong) for s in said])
        found["mistakes"] = torch.bincount(classes.query[wrong], minlength=count).tolist()
    return found


# --------------------------------------------------------------------------- the examples, in pieces


@final
@dataclass(frozen=True, eq=False)
class Writer:
    """Turns queries and examples into the records of the page, with as much detail as there is room for."""

    found: Contents
    train: Lens
    queries: Lens
    detail: Detail
    texts: dict[int, str] = field(default_factory=dict)  # per query row the beginning of its text, for search

    def example(self, index: int) -> dict[str, Any]:
        """One training example: what is seen, `i` index, `l` label, `n` name, `o` self-influence."""
        scores = self.found.scores
        record, inside = self.train.record(index, self.detail)
        label = inside if scores.train_labels is None else scores.train_labels[index]
        record |= {"i": index, "l": clean(scores.label_name(_labelled(label)))}
        if scores.train_names is not None:
            record["n"] = clean(str(scores.train_names[index]))[:200]
        if self.found.own is not None:
            record["o"] = short(float(self.found.own[index]))
        return record

    def query(self, q: int) -> dict[str, Any]:
        """One query: what is seen, and its lists."""
        at = int(self.found.scores.query_ids[q])
        large = Detail(self.detail.side * QUERY_SCALE, QUERY_LETTERS)
        record = {"k": "none", "t": ""} if at < 0 else self.queries.record(at, large)[0]
        if record["k"] == "text":
            self.texts[q] = record["t"][:160]
        return record | self.found.lists[q]

    def chunks(self) -> Iterator[tuple[str, list[dict[str, Any]]]]:
        """Named pieces: `q0`, `q1`, … of queries, then `e0`, `e1`, … of examples."""
        rows = range(len(self.found.scores))
        for at, part in enumerate(_parts(rows, QUERIES_PER_CHUNK)):
            yield f"q{at}", [self.query(q) for q in part]
        for at, some in enumerate(_parts(self.found.examples, EXAMPLES_PER_CHUNK)):
            yield f"e{at}", [self.example(i) for i in some]


def _parts(values: Sequence[int], size: int) -> Iterator[Sequence[int]]:
    return (values[i : i + size] for i in range(0, len(values), size))


def _labelled(label: Any) -> Any:
    """A label that fits on a card: single numbers and words; longer ones not at all."""
    label = indexing.plain_value(label)
    return label if isinstance(label, (int, float, str)) else None


def clean(text: str) -> str:
    """Text without lone surrogates, which no file can hold, at most 400 letters."""
    return text[:400].encode("utf-8", "replace").decode("utf-8")

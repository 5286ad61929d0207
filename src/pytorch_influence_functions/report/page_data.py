"""The contents of a report as plain lists and numbers: everything that the page shows, apart from its looks."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, final

import torch
from jaxtyping import Float
from torch import Tensor

from ..core.text import printable
from ..scores import indexing
from ..scores.scores import Scores
from .effects import Moved, choose_summed, effects_on_queries, moved_queries
from .predictions import Given, Prediction
from .ranking import Classes, Sums, extremes, four_digits, histogram, score_row
from .suspects import close_pairs, label_queue
from .target import Target
from .thumbnails import QUERY_LETTERS, QUERY_SCALE, Detail, ExampleReader
from .token_colours import LETTERS, Sources, TokenColours, token_record

QUEUE, PAIRS, TOP = 200, 40, 50
"""The most entries of the label queue, of either list of pairs, and of either list of the most influential."""
QUEUE_SHARE, SHORTEST_QUEUE = 10, 20
"""One example in 10 enters the label queue, but at least 20: not all labels can be doubtful."""
COMPARED = 4000
"""Near duplicates are looked for among so many of the most influential examples."""
EXAMPLES_PER_CHUNK, QUERIES_PER_CHUNK = 120, 20
"""Examples and queries in one piece of the page, which is read when it is first needed."""


@final
@dataclass(frozen=True, eq=False)
class Contents:
    """All contents of the page but the examples themselves.

    Attributes:
        index: read first by the page: names, labels and filters of queries, lists of the training set.
        lists: per query `{"help", "harm": [[index, score], …], "hist": {…}, "likely": [[class, share], …]}`.
        examples: the training indices that appear anywhere, ascending.
        given: what was handed in beside the scores.
        moved: for each of `examples` the queries that it helps and harms most.
        mean: [N], mean score over all queries.
        effects: for as many of `examples` as there is room for, the scores on all queries, to be summed by the page.
        colours: of the tokens of texts.
        sources: where the training examples come from; None where that is not known.
    """

    scores: Scores
    index: dict[str, Any]
    lists: list[dict[str, Any]]
    examples: list[int]
    given: Given
    moved: dict[int, tuple[Moved, Moved]]
    mean: Float[Tensor, " N"]
    effects: dict[int, tuple[float, str]]
    colours: TokenColours = field(default_factory=TokenColours)
    sources: Sources | None = None

    def with_texts(self, colours: TokenColours, sources: Sources | None, tokens: bool) -> Contents:
        """The same with what is known of texts: the colours of their tokens, where they come from, and whether they
        are shown token by token.
        """
        self.index["tokens"] = tokens
        # Texts that are their own targets have no label that could be wrong.
        self.index["labelled"] = not tokens or self.scores.train_labels is not None
        if sources is not None:
            self.index["sources"] = sources.table()
            for q, entry in enumerate(self.lists):
                entry["by"] = sources.sums(self.scores, q)
        return replace(self, colours=colours, sources=sources)


def collect_contents(scores: Scores, classes: Classes | None, train: ExampleReader, k: int, given: Given) -> Contents:
    """Compute every number of the page. The data are read only to compare inputs (`close_pairs`)."""
    predictions = given.predictions
    sums = Sums.of(scores, classes)
    lists = [_query_lists(scores, q, k, predictions) for q in range(len(scores))]
    queue_length = min(QUEUE, max(SHORTEST_QUEUE, scores.n_train // QUEUE_SHARE))
    errors = given.training_errors
    doubt = given.training_losses if given.doubt is None else given.doubt
    said = given.train_predictions
    queue = label_queue(scores, classes, sums, given.self_influence, queue_length, errors, doubt, said)
    labels = (
        [given.target.text(scores, x) for x in indexing.plain_values(scores.train_labels)]
        if scores.train_labels is not None
        else []
    )
    if train.token_text(0) is not None and all(x is None for x in (scores.train_labels, doubt, given.self_influence)):
        queue = [entry for entry in queue if entry["h"] > 0]  # in a text that helps is nothing to doubt
    for entry in queue:
        entry |= _train_words(scores, labels, entry["i"])
        text = train.token_text(entry["i"])
        entry |= {} if text is None else {"t": clean(text.text)}
        entry |= {} if said is None else _said(said[entry["i"]])
    compared = min(COMPARED, scores.n_train)
    pairs: dict[str, list[dict[str, Any]]] = {"same": [], "other": []}
    if train.source is not None:
        pairs = close_pairs(scores, train, sums, labels or [""] * scores.n_train, compared, PAIRS)
    # Examples without any stored score are not ranked among those that have one.
    ranked = None if scores.indices is None else torch.unique(scores.indices)
    mean = replace(
        scores,
        values=(sums.mean if ranked is None else sums.mean[ranked])[None],
        indices=None if ranked is None else ranked[None],
        query_ids=torch.tensor([-1]),
        query_labels=None,
        query_names=None,
    )
    helpful, harmful = extremes(mean, 0, min(TOP, mean.shape[1]))
    index = {
        "n": scores.n_train,
        "loss": scores.lower_is_better,
        "numeric": given.target.numeric,
        "target": clean(given.target.name),
        "unit": clean(given.target.unit),
        "queries": _query_columns(scores, given.target, predictions),
        "queue": queue,
        "queueBy": _queue_order(given),
        "suggestedBy": "harm" if said is None else "model",
        "pairs": pairs,
        "compared": compared if train.source is not None else 0,
        "top": {"help": _rounded(helpful), "harm": _rounded(harmful)},
        "classes": None if classes is None else _class_table(scores, classes, sums, queue, predictions),
        "held": scores.shape[1],
    }
    shown = {i for entry in lists for side in ("help", "harm") for i, _ in entry[side]}
    shown |= {entry["i"] for entry in queue} | {i for i, _ in helpful + harmful}
    shown |= {pair[side] for kind in pairs.values() for pair in kind for side in ("a", "b")}
    examples = sorted(shown)
    summed = choose_summed(scores, [entry["i"] for entry in queue], examples)
    index["summed"] = "all" if len(summed) == len(examples) else "queue"
    moved, effects = moved_queries(scores, examples), effects_on_queries(scores, summed)
    return Contents(scores, index, lists, examples, given, moved, sums.mean, effects)


def _train_words(scores: Scores, labels: list[str], index: int) -> dict[str, Any]:
    """`l` label and `n` name of a training example, where they are known."""
    words = {"l": clean(labels[index])} if labels else {}
    return words | ({} if scores.train_names is None else {"n": clean(str(scores.train_names[index]))[:200]})


def _said(prediction: Prediction) -> dict[str, Any]:
    """What the model says of a training example: `said`, and `sure` and `wrong`, or the error `err`."""
    words: dict[str, Any] = {"said": clean(prediction.text)}
    words |= {} if math.isnan(prediction.confidence) else {"sure": prediction.confidence}
    words |= {} if prediction.wrong is None else {"wrong": int(prediction.wrong)}
    return words | ({} if math.isnan(prediction.error) else {"err": prediction.error})


def _rounded(ranked: list[tuple[int, float]]) -> list[tuple[int, float]]:
    return [(i, four_digits(score)) for i, score in ranked]


def _query_lists(scores: Scores, q: int, k: int, predictions: list[Prediction] | None) -> dict[str, Any]:
    helpful, harmful = extremes(scores, q, k)
    lists: dict[str, Any] = {"help": _rounded(helpful), "harm": _rounded(harmful)}
    lists["hist"] = histogram(score_row(scores, q)[0])
    if predictions is not None:
        lists["likely"] = predictions[q].likeliest
    return lists


def _query_columns(scores: Scores, target: Target, predictions: list[Prediction] | None) -> dict[str, Any]:
    """Columns, one entry per query: position in the dataset, name, label, prediction, confidence, wrong, error."""
    labels = [None] * len(scores) if scores.query_labels is None else indexing.plain_values(scores.query_labels)
    columns: dict[str, Any] = {
        "id": scores.query_ids.tolist(),
        "name": [clean(scores.describe_query(q)) for q in range(len(scores))],
        "label": [clean(target.text(scores, label)) for label in labels],
    }
    if predictions is not None:
        columns["said"] = [clean(p.text) for p in predictions]
        columns["sure"] = [None if math.isnan(p.confidence) else p.confidence for p in predictions]
        columns["wrong"] = [None if p.wrong is None else int(p.wrong) for p in predictions]
        columns["err"] = [None if math.isnan(p.error) else p.error for p in predictions]
    return columns


def _class_table(
    scores: Scores, classes: Classes, sums: Sums, queue: list[dict[str, Any]], predictions: list[Prediction] | None
) -> dict[str, Any]:
    """Per class: sizes, doubtful labels, mistakes; and the mean score on queries of a class (row) of one training
    example of a class (column): as `plot_class_matrix` and the scores themselves, queries first.
    """
    count, size = len(classes.names), scores.n_train
    train_sizes = torch.bincount(classes.train, minlength=count)
    query_sizes = torch.bincount(classes.query, minlength=count)
    matrix = torch.zeros(count, count, dtype=torch.float64)
    if sums.harm is not None:
        sign = -1.0 if scores.lower_is_better else 1.0
        for asked in range(count):
            total = torch.zeros(count, dtype=torch.float64).index_add_(0, classes.train, sign * sums.harm[asked])
            matrix[asked] = total / train_sizes.clamp(min=1)
    doubtful = torch.bincount(classes.train[[e["i"] for e in queue]], minlength=count)
    table: dict[str, Any] = {
        "names": [clean(name) for name in classes.names],
        "train": train_sizes.tolist(),
        "asked": query_sizes.tolist(),
        "doubtful": doubtful.tolist(),
        "matrix": [
            [four_digits(v) if train_sizes[trained] and query_sizes[asked] else None for trained, v in enumerate(line)]
            for asked, line in enumerate(matrix.tolist())
        ],
        "share": [four_digits(float(n) / size) for n in train_sizes],
    }
    if predictions is not None:
        wrong = torch.tensor([bool(p.wrong) for p in predictions])
        table["mistakes"] = torch.bincount(classes.query[wrong], minlength=count).tolist()
    return table


# --------------------------------------------------------------------------- the examples, in pieces


@final
@dataclass(frozen=True, eq=False)
class Writer:
    """Turns queries and examples into the records of the page, with the given amount of detail."""

    contents: Contents
    train: ExampleReader
    queries: ExampleReader
    detail: Detail
    texts: dict[int, str] = field(default_factory=dict)  # the beginning of each query's text, for search

    def example(self, index: int) -> dict[str, Any]:
        """One training example: the record of its input, and `i` index, `l` label, `n` name, `o` self-influence, what
        the model says of it, `help`, `harm`: the queries that it helps and harms most, `e` its mean score, and `w` its
        score on every query, where there was room for it.
        """
        scores, given = self.contents.scores, self.contents.given
        record, own_label = self.train.record(index, self.detail)
        label = own_label if scores.train_labels is None else scores.train_labels[index]
        record |= {"i": index, "l": clean(given.target.text(scores, _card_label(label)))}
        if scores.train_names is not None:
            record["n"] = clean(str(scores.train_names[index]))[:200]
        tokens = self.train.token_text(index)
        if tokens is not None:
            letters = LETTERS * self.detail.letters
            record |= token_record(tokens, self.contents.colours.of_document(index), letters)
        if self.contents.sources is not None:
            record["f"] = int(self.contents.sources.numbers[index])
        if given.self_influence is not None:
            record["o"] = four_digits(float(given.self_influence[index]))
        if given.train_predictions is not None:
            prediction = given.train_predictions[index]
            record |= _said(prediction)
            record |= {"likely": prediction.likeliest} if prediction.likeliest else {}
        record["help"], record["harm"] = self.contents.moved[index]
        record["all"] = four_digits(float(self.contents.mean[index]))
        if index in self.contents.effects:
            record["each"] = self.contents.effects[index]
        return record

    def query(self, q: int) -> dict[str, Any]:
        """One query: the record of its input, and its lists."""
        index = int(self.contents.scores.query_ids[q])
        large = Detail(self.detail.side * QUERY_SCALE, QUERY_LETTERS)
        record = {"k": "none", "t": ""} if index < 0 else self.queries.record(index, large)[0]
        if record["k"] == "text":
            self.texts[q] = record["t"][:160]
        tokens = None if index < 0 else self.queries.token_text(index)
        if tokens is not None:
            colours = self.contents.colours.of_query(q)
            record |= colours | token_record(tokens, colours, QUERY_LETTERS)
        return record | self.contents.lists[q]

    def chunks(self) -> Iterator[tuple[str, list[dict[str, Any]]]]:
        """Named pieces: `q0`, `q1`, … of queries, then `e0`, `e1`, … of examples."""
        rows = range(len(self.contents.scores))
        for number, part in enumerate(_split(rows, QUERIES_PER_CHUNK)):
            yield f"q{number}", [self.query(q) for q in part]
        for number, part in enumerate(_split(self.contents.examples, EXAMPLES_PER_CHUNK)):
            yield f"e{number}", [self.example(i) for i in part]


def _split(values: Sequence[int], size: int) -> Iterator[Sequence[int]]:
    return (values[i : i + size] for i in range(0, len(values), size))


def _card_label(label: Any) -> Any:
    """A label that fits on a card: a single number or a string, else None."""
    label = indexing.plain_value(label)
    return label if isinstance(label, (int, float, str)) else None


def clean(text: str) -> str:
    """Text without lone surrogates, which no file can hold, at most 400 letters."""
    return printable(text[:400])


def _queue_order(given: Given) -> str:
    """By what the doubtful labels are ordered: the key of the sentence that the page says about it."""
    if given.training_errors is not None:
        return "turns"
    if given.doubt is not None:
        return "doubt"
    if given.training_losses is not None:
        return "loss"
    return "mean" if given.self_influence is None else "self"

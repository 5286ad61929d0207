"""`Scores`: what every training example does to every query, and how to ask it."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, TypeAlias, final

import numpy as np
import torch
from jaxtyping import Int
from numpy.typing import NDArray
from torch import Tensor

from ..core.errors import InvalidInput, NonFinite, name_ids, require
from ..core.files import write_bytes, write_tensors
from ..core.text import printable
from ..core.token_text import text_name_of
from . import difference, export, indexing
from .contents import contents_of, read_contents, rebuild
from .diagnostics import Diagnostics

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from ..evaluation.verification import Verification
    from ..report.page import Report
else:
    Figure = Report = Verification = Any  # optional, or of a folder above; annotations are evaluated all the same

Labels: TypeAlias = Tensor | NDArray[Any] | Sequence[Any] | None

MEAN = -1
"""The query index of a row that belongs to no single query: a mean, a group, a function of the model."""
_KIND = "scores"


@final
@dataclass(frozen=True, eq=False, repr=False)
class Scores:
    """Predicted change of the measure on each query when each training example is removed.

    `values[q, i] = (1/N) <(C + D)^-1 grad m(q), grad loss(i)>`: the predicted change of the measure of query
    q when example i is *removed* and the model retrained, in units of the measure. For a loss, positive means helpful.
    `helpful` and `harmful` follow the measure: helpful is what makes the measure worse when removed, so the largest
    scores of a loss and the smallest of a margin. They are the two ends of one order, not a filter by sign: where all
    examples help, `harmful` starts with the one that helps least. Equal scores are ordered by index.

    A training example is always named by its position in the training dataset. Where not all examples are held (`top=`,
    `scores[:, ids]`), `indices[q, j]` is the position of the example behind `values[q, j]`.

    Args:
        values: float [Q, N], or [Q, m] with `indices`.
        lower_is_better: whether a smaller measure is better (a loss).
        train_labels: one per training example (all N of them, whatever is held), tensor or list.
        query_labels: one per query.
        train_names, query_names: what to call them.
        class_names: what to call integer labels.
        query_ids: [Q] positions in the query dataset, by default 0 to Q - 1; -1 for a row of several queries.
        indices: [Q, m] positions in the training dataset, each once per row, or None: all in order.
        n_train: N, by default the number of columns; needed with `indices`.
        diagnostics: how the scores came about and how far to trust them.
        provenance: the method as it would be written, with versions; by default the diagnostics' method.
        train_source, query_source: the data, for pictures; not saved.
        measure: what was measured on the queries, an objective, for `verify`; not saved.

    Raises:
        NonFinite: a score is NaN or infinite; queries and training examples are named.
        InvalidInput: shapes that do not fit each other.

    >>> scores = Scores(torch.tensor([[0.1, -0.3, 0.2]]))
    >>> [index for index, score in scores.helpful(0, k=2)], scores.harmful(0, k=1)[0][0]
    ([2, 0], 1)
    """

    # Shapes are checked below, in words: these fields are filled by hand too.
    values: Tensor
    lower_is_better: bool = True
    train_labels: Labels = None
    query_labels: Labels = None
    train_names: Sequence[str] | None = None
    query_names: Sequence[str] | None = None
    class_names: Sequence[str] | None = None
    query_ids: Tensor = None  # type: ignore[assignment]  # filled in by __post_init__
    indices: Tensor | None = None
    n_train: int = None  # type: ignore[assignment]  # filled in by __post_init__
    diagnostics: Diagnostics = field(default_factory=Diagnostics)
    provenance: str = ""
    train_source: Any = None
    query_source: Any = None
    measure: Any = None

    def __post_init__(self) -> None:
        def set_field(name: str, value: Any) -> None:
            object.__setattr__(self, name, value)

        if self.values.ndim != 2 or not self.values.is_floating_point() or 0 in self.values.shape:
            raise InvalidInput(
                "Scores are floating point numbers of shape (queries, training examples), at least one of "
                f"each; got {tuple(self.values.shape)} of {self.values.dtype}."
            )
        set_field("values", self.values.detach().cpu())
        ids: Any = self.query_ids
        set_field("query_ids", torch.as_tensor(range(len(self.values)) if ids is None else ids).cpu().long())
        set_field("indices", None if self.indices is None else self.indices.detach().cpu().long())
        set_field("provenance", self.provenance or self.diagnostics.method)
        for name in ("train_names", "query_names", "class_names"):
            set_field(name, None if getattr(self, name) is None else list(getattr(self, name)))
        for name in ("train_labels", "query_labels"):
            labels = getattr(self, name)
            labels = labels.detach().cpu() if isinstance(labels, Tensor) else labels
            set_field(name, labels if labels is None or isinstance(labels, Tensor) else indexing.plain_values(labels))
        self._check_shapes()
        self._check_finite()

    def _check_shapes(self) -> None:
        queries, columns = self.values.shape
        n_train: int | None = self.n_train
        if n_train is None and self.indices is None:
            object.__setattr__(self, "n_train", columns)
        elif n_train is None or (self.indices is None and n_train != columns):
            raise InvalidInput(
                f"{columns} scores per query of n_train={n_train} training examples: give `indices`, which says "
                "which examples they are, and n_train."
            )
        if self.indices is not None:
            indexing.check_indices(self.indices, self.values.shape, self.n_train)
        sizes = {"train_labels": self.n_train, "train_names": self.n_train}
        sizes |= {"query_labels": queries, "query_names": queries, "query_ids": queries}
        for name, expected in sizes.items():
            entries = getattr(self, name)
            if entries is not None and len(entries) != expected:
                raise InvalidInput(f"`{name}` has {len(entries)} entries; expected {expected}.")

    def _check_finite(self) -> None:
        # The sum is one pass that holds nothing; one that is not finite may also be an overflow.
        if bool(torch.isfinite(self.values.sum())):
            return
        finite = torch.isfinite(self.values)
        if bool(finite.all()):
            return
        rows, columns = (~finite).nonzero(as_tuple=True)
        training = columns if self.indices is None else self.indices[rows, columns]
        queries = name_ids(sorted(set(self.query_ids[rows].tolist())))
        raise NonFinite(
            f"Scores are NaN or infinite for query {queries} at training index "
            f"{name_ids(sorted(set(training.tolist())))}; look for overflow there, or raise the damping."
        )

    # ---------------------------------------------------------------- asking

    @property
    def shape(self) -> tuple[int, int]:
        """(queries, scores per query)."""
        return self.values.shape[0], self.values.shape[1]

    def __len__(self) -> int:
        """The number of queries."""
        return len(self.values)

    def helpful(self, q: int | None = 0, k: int | None = 10) -> list[tuple[int, float]]:
        """The `k` most helpful training examples of query `q` as (index, score), most helpful first.

        Args:
            q: which query, as a row of these scores; `None`: the mean over queries.
            k: how many; `None`, or more than are held: all.

        Raises:
            InvalidInput: no such query, or `k` below 1.
        """
        return self._pairs(q, k, helpful=True)

    def harmful(self, q: int | None = 0, k: int | None = 10) -> list[tuple[int, float]]:
        """The `k` most harmful training examples of query `q` as (index, score), most harmful first.

        Args:
            q: as for `helpful`.
            k: as for `helpful`.
        """
        return self._pairs(q, k, helpful=False)

    def helpful_order(self, q: int | None = None) -> Int[Tensor, " m"]:
        """Training indices from most helpful to most harmful, by the mean over queries or for query `q`."""
        scores, row = self._row(q)
        return scores._index(row)[scores._order(row, helpful=True)]

    def harmful_order(self, q: int | None = None) -> Int[Tensor, " m"]:
        """Training indices from most harmful to most helpful, by the mean over queries or for query `q`."""
        scores, row = self._row(q)
        return scores._index(row)[scores._order(row, helpful=False)]

    def mean(self) -> Scores:
        """One row: the mean score over all queries, in float64; its query index is -1.

        Raises:
            InvalidInput: the queries do not hold the same training examples (`top=`).
        """
        if self.indices is not None and bool((self.indices != self.indices[:1]).any()):
            raise InvalidInput(
                "Each query holds other training examples, so there is no mean over queries; "
                "score without top=, take mean(), then top(k)."
            )
        return replace(
            self,
            values=self.values.double().mean(0, keepdim=True),
            indices=None if self.indices is None else self.indices[:1],
            query_ids=torch.tensor([MEAN]),
            query_labels=None,
            query_names=[f"mean over {len(self)} quer{'y' if len(self) == 1 else 'ies'}"],
        )

    def __sub__(self, other: Scores) -> Scores:
        """What each training example does to the difference of two questions: of two models, for instance.

        `scores_a - scores_b` is the predicted change of m_a(q) - m_b(q) when example i is left out of the training of
        both. Names, labels and sources are those of the first.

        Raises:
            InvalidInput: queries, training examples or the direction of the measures differ.
        """
        difference.check_comparable(self, other)
        record = difference.of_diagnostics(self.diagnostics, other.diagnostics)
        return replace(self, values=self.values - other.values, diagnostics=record)

    def top(self, k: int) -> Scores:
        """Only the `k` most helpful and `k` most harmful examples of each query, most helpful first.

        With 2k or more examples held exactly 2k are kept, otherwise all. `helpful(q, k)` and `harmful(q, k)` stay.
        """
        k = indexing.limit_count(k, self.shape[1])
        selected_columns = []
        for row in range(len(self)):
            helpful, harmful = self._order(row, helpful=True), self._order(row, helpful=False)
            # Among equal scores the two ends may name the same examples; the next helpful ones fill the row.
            selected = torch.zeros(self.shape[1], dtype=torch.bool)
            selected[helpful[:k]] = selected[harmful[:k]] = True
            missing = min(2 * k, self.shape[1]) - int(selected.sum())
            selected[helpful[~selected[helpful]][:missing]] = True
            selected_columns.append(helpful[selected[helpful]])
        columns = torch.stack(selected_columns)
        index = torch.stack([self._index(row)[columns[row]] for row in range(len(self))])
        return replace(self, values=self.values.gather(1, columns), indices=index)

    def __getitem__(self, key: Any) -> Scores:
        """Some queries, `scores[0]`, `scores[2:5]`, `scores[[1, 4]]`; or some examples too, `scores[:, ids]`.

        The result is `Scores` with as many rows as queries were picked (one for an integer). Examples keep
        their positions in the training dataset: `scores[:, [7]].helpful(0)` names example 7.

        Raises:
            InvalidInput: an index out of range, or examples picked where queries hold different ones.
        """
        queries, columns = key if isinstance(key, tuple) and len(key) == 2 else (key, slice(None))
        rows = indexing.parse_positions(queries, len(self), "query", twice=True)
        scores = replace(
            self,
            values=self.values[rows],
            indices=None if self.indices is None else self.indices[rows],
            query_ids=self.query_ids[rows],
            query_labels=indexing.take_members(self.query_labels, rows),
            query_names=indexing.take_members(self.query_names, rows),
        )
        if isinstance(columns, slice) and columns == slice(None):
            return scores
        if self.indices is not None:
            raise InvalidInput(
                "Only some training examples are held here, so others cannot be picked by position; "
                "pick them from the full scores (scored without top=)."
            )
        ids = indexing.parse_positions(columns, self.shape[1], "training example")
        return replace(scores, values=scores.values[:, ids], indices=ids.expand(len(scores), -1).clone())

    def __iter__(self) -> Iterator[Scores]:
        """The scores of each query by itself, `scores[0]`, `scores[1]` and so on."""
        return (self[q] for q in range(len(self)))

    # ---------------------------------------------------------------- inner workings

    def _position(self, q: int) -> int:
        return int(indexing.parse_positions(q, len(self), "query")[0])

    def _row(self, q: int | None) -> tuple[Scores, int]:
        return (self.mean(), 0) if q is None else (self, self._position(q))

    def _index(self, row: int) -> Int[Tensor, " m"]:
        return torch.arange(self.shape[1]) if self.indices is None else self.indices[row]

    def _order(self, row: int, helpful: bool) -> Int[Tensor, " m"]:
        """Columns of one row from its helpful or its harmful end; equal scores by training index at either end."""
        by_index = torch.argsort(self._index(row))
        largest_first = helpful == self.lower_is_better
        values = self.values[row, by_index]
        return by_index[torch.argsort(values, descending=largest_first, stable=True)]

    def _pairs(self, q: int | None, k: int | None, helpful: bool) -> list[tuple[int, float]]:
        scores, row = self._row(q)
        columns = scores._order(row, helpful)[: indexing.limit_count(k, scores.shape[1])]
        return list(zip(scores._index(row)[columns].tolist(), scores.values[row, columns].tolist(), strict=True))

    # ---------------------------------------------------------------- words

    def label_name(self, label: Any) -> str:
        """A label as a person would read it: the class name where there is one.

        Args:
            label: a label, such as a class number.
        """
        label = indexing.plain_value(label)
        whole = isinstance(label, int) and not isinstance(label, bool)
        if whole and self.class_names is not None and 0 <= label < len(self.class_names):
            return str(self.class_names[label])
        return f"{label:.4g}" if isinstance(label, float) else "" if label is None else str(label)

    def describe_query(self, q: int = 0) -> str:
        """Query `q` by its name, else by the beginning of its text, else by its position in the query dataset."""
        row = self._position(q)
        if self.query_names is not None:
            return self.query_names[row]
        place = int(self.query_ids[row])
        return text_name_of(self.query_source, place) or f"query {place}"

    def describe_train(self, index: int) -> str:
        """Training example `index` as `#index` with its label and its name, or the beginning of its text."""
        label = self.label_name(indexing.member_at(self.train_labels, index))
        name = text_name_of(self.train_source, index) if self.train_names is None else self.train_names[index]
        return " ".join(part for part in (f"#{index}", label, name or "") if part)

    def __repr__(self) -> str:
        queries, columns = self.shape
        of = "" if columns == self.n_train else f" of {self.n_train:,}"
        d = self.diagnostics
        facts = [f"{queries:,} quer{'y' if queries == 1 else 'ies'} x {columns:,}{of} training examples"]
        facts += [f"lambda = {d.lambda_text}"] if d.lambda_text else []
        facts += ["helpful = positive" if self.lower_is_better else "helpful = negative"]
        ends = [f"\n  {self.provenance}"] if self.provenance else []
        texts = len(self) > 0 and self.n_train > 0 and text_name_of(self.train_source, 0) is not None
        for name, find in (("helpful", self.helpful), ("harmful", self.harmful)):
            if texts:
                listed = "".join(f"\n    {s:+.3g}  {printable(self.describe_train(i))}" for i, s in find(0, 3))
            else:
                listed = " " + ", ".join(f"{i} ({s:+.3g})" for i, s in find(0, 3))
            ends.append(f"\n  {self.describe_query(0)}, most {name}:{listed}")
        return f"Scores({', '.join(facts)}){''.join(ends)}"

    def _repr_html_(self, rows: int = 10, k: int = 5) -> str:
        return export.as_html(self, rows, k)

    # ---------------------------------------------------------------- handing on

    def to_frame(self) -> Any:
        """A long pandas table: query, train, score, rank (1 = most helpful); labels, names where known.

        Ordered by query, then rank. Needs pandas (`pip install 'pytorch-influence-functions[frame]'`).
        """
        return require("pandas", "frame").DataFrame(export.long_table(self))

    def to_csv(self, path: str | os.PathLike[str]) -> None:
        """Write the table of `to_frame` as comma-separated values, without pandas.

        Args:
            path: the file; one that is there is replaced, whole or not at all.
        """
        write_bytes(path, printable(export.as_csv(export.long_table(self))).encode())

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> NDArray[Any]:
        """`values` for `numpy.asarray(scores)`: [queries, scores per query]; a copy."""
        return np.array(self.values.numpy(), dtype=dtype)

    def to_dict(self, top_k: int | None = 500) -> dict[str, dict[str, Any]]:
        """The layout of version 0.1, one entry per query under its index (`"mean"` for a mean, of several their names).

        Each entry: `label`, `num_in_dataset`, `time_calc_influence_s` (the query's share of the seconds), `influence`
        (scores in training order), `harmful`, `helpful` (indices, at most `top_k` each). Where not all examples are
        held, `influence` holds those of the added list `influence_indices`.
        """
        d = self.diagnostics
        seconds = d.seconds / (d.n_queries or len(self)) if math.isfinite(d.seconds) else 0.0
        entries = {}
        for row, number in enumerate(self.query_ids.tolist()):
            entry: dict[str, Any] = {
                "label": indexing.plain_value(indexing.member_at(self.query_labels, row)),
                "num_in_dataset": number,
                "time_calc_influence_s": seconds,
                "influence": self.values[row].tolist(),
                "harmful": [i for i, _ in self.harmful(row, top_k)],
                "helpful": [i for i, _ in self.helpful(row, top_k)],
            }
            if self.indices is not None:
                entry["influence_indices"] = self.indices[row].tolist()
            named = "mean" if len(self) == 1 else self.describe_query(row)
            entries[named if number == MEAN else str(number)] = entry
        return entries

    def to_json(self, path: str | os.PathLike[str] | None = None, top_k: int | None = 500) -> str:
        """`to_dict` as JSON text.

        Args:
            path: where to write it too, whole or not at all; `None`: nowhere.
            top_k: as for `to_dict`.
        """
        text = json.dumps(self.to_dict(top_k), allow_nan=False)
        if path is not None:
            write_bytes(path, text.encode())
        return text

    def save(self, path: str | os.PathLike[str], fingerprint: str | None = None) -> None:
        """Write everything but the data handles to one safetensors file; equal scores give equal bytes.

        Args:
            path: the file; one that is there is replaced, whole or not at all.
            fingerprint: a name for what they were made from, kept in the file.

        Raises:
            InvalidInput: labels or names are not numbers, words or lists of them; or the file cannot be written.
        """
        if os.fspath(path).lower().endswith((".csv", ".json")):
            ending = os.path.splitext(os.fspath(path))[1].lower()
            raise InvalidInput(
                f"save() writes safetensors, not {ending}: {os.fspath(path)!r} would not be what its name says; write "
                f"scores.to_{ending[1:]}(path), or give it the ending .safetensors."
            )
        tensors, record = contents_of(self)
        write_tensors(path, _KIND, tensors, record | {"fingerprint": fingerprint})

    @classmethod
    def load(cls, path: str | os.PathLike[str], fingerprint: str | None = None) -> Scores:
        """The scores that `save` wrote, bit for bit; pictures then need the data handed to `plot`.

        Args:
            path: the file.
            fingerprint: what the scores must have been saved with; `None`: anything.

        Raises:
            InvalidInput: no such file, a damaged one, or one of another kind, version or fingerprint.
        """
        return rebuild(cls, path, *read_contents(path, _KIND, fingerprint))

    def plot(
        self,
        q: int = 0,
        k: int = 5,
        path: str | os.PathLike[str] | None = None,
        denormalize: Any = None,
        train: Any = None,
        queries: Any = None,
        tokens: Any = None,
        pieces: Any = None,
    ) -> Figure:
        """The query beside its `k` most helpful and `k` most harmful training examples, scores and labels.

        Args:
            q: which query, as a row of these scores.
            k: how many of each.
            path: where to write the picture; the ending says the format (png, pdf, svg).
            denormalize: a function applied to an example before it is shown, or `(mean, std)` per channel.
            train, queries: the data, where these scores do not remember them (after `load`).
            tokens: for texts, the fitted method, or its `token_scores(queries, ids)`: tokens coloured by their shares.
            pieces: an input's tokens as strings, one per token score; not needed where inputs are strings.

        Returns:
            a matplotlib `Figure`. Needs matplotlib (`pip install 'pytorch-influence-functions[plot]'`).
        """
        # An import that looks up, as in report() and verify(): kept on the result for convenience, made when called.
        from ..plots.query import plot_influences

        return plot_influences(self, q, k, train, queries, denormalize, path=path, tokens=tokens, pieces=pieces)

    def report(self, path: str | os.PathLike[str], **options: Any) -> Report:
        """Write a page to look through, search and tick in a browser, from disk and without a network.

        Args:
            path: the file to write, `.html`.
            options: those of `pytorch_influence_functions.report.write_report`. `predictions=` (class probabilities of
                the queries), `train_predictions=` and `self_influence=` add the most; `dry_run=True` only forecasts.

        Needs jinja2 and pillow (`pip install 'pytorch-influence-functions[report]'`).
        """
        from ..report.page import write_report

        return write_report(self, path, **options)

    def verify(self, recipe: Any, n: int = 12, size: int | None = None, seeds: Any = 3, **options: Any) -> Verification:
        """Remove `n` groups of `size` examples for real, retrain, compare: `ptif.evaluation.verify`, with its options.

        `print(scores.verify(recipe))` gives predicted against measured change, slope, r, and whether the top of the
        ranking is distinguishable from noise, in one sentence.

        Args:
            recipe: a `ptif.evaluation.Recipe`, or a function `(dataset, seed) -> trained model`.
            n: how many groups are removed.
            size: how many examples are in a group; `None`: 2 % of them.
            seeds: how many trainings, or which, each group is measured on.
            options: `train=`, `queries=`, `measure=`, `folder=`, `workers=`.
        """
        from ..evaluation.verification import verify

        return verify(self, recipe, n, size, seeds, **options)

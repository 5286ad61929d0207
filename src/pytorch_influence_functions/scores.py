"""`Scores`: the result. Predicted change of every query's measure when each training example is removed."""

from __future__ import annotations

import html
import importlib
import json
import os
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from .diagnostics import Diagnostics
from .errors import InvalidInput, NonFinite, name_ids, require

FORMAT = "pytorch_influence_functions.scores/1"

Labels = list[Any] | None


@dataclass(frozen=True, eq=False)
class Scores:
    """`values[q, i]`: predicted change of query q's measure when training example i is removed and the model retrained.

    For a loss, positive means helpful. `helpful` and `harmful` follow the measure's `lower_is_better`, never the raw
    sign: helpful is whatever makes the measure worse when it is gone. They order; they do not filter by sign.

    Args:
        values: `[Q, N]`, or `[Q, k]` when only the extremes were kept (`top=`).
        lower_is_better: whether the measure is a loss.
        n_train: N; `None`: the width of `values`.
        indices: training index of every column of `values` per query, `[Q, k]`; `None`: column i is example i.
        query_ids: dataset index of every query; `None`: 0 to Q - 1.
        train_labels, query_labels: one per training example and per query, where the dataset has them.
        class_names: what the labels are called.
        diagnostics: how the scores were made.

    Raises:
        NonFinite: a score is NaN or infinite (query and training indices are named).
    """

    values: Float[Tensor, "q n"]
    lower_is_better: bool = True
    n_train: int | None = None
    indices: Int[Tensor, "q n"] | None = None
    query_ids: tuple[int, ...] | None = None
    train_labels: Labels = None
    query_labels: Labels = None
    class_names: list[str] | None = None
    diagnostics: Diagnostics | None = None
    train_source: Any = None
    query_source: Any = None

    def __post_init__(self) -> None:
        if self.values.dim() != 2:
            raise InvalidInput(
                f"Scores need a matrix (queries, examples), got shape {tuple(self.values.shape)}."
            )
        bad = (~torch.isfinite(self.values)).nonzero()
        if len(bad):
            raise NonFinite(
                f"Scores of queries {name_ids(sorted(set(bad[:, 0].tolist())))} are NaN or infinite at training examples "
                f"{name_ids(sorted(set(bad[:, 1].tolist())))}; nothing is ranked around them."
            )
        if self.n_train is None:
            object.__setattr__(self, "n_train", self.values.shape[1])
        if self.query_ids is None:
            object.__setattr__(self, "query_ids", tuple(range(len(self.values))))

    def __len__(self) -> int:
        return self.values.shape[0]

    @property
    def shape(self) -> tuple[int, int]:
        """(queries, training examples)."""
        return (len(self), int(self.n_train or 0))

    # ---------------------------------------------------------------- ranking

    def helpful(self, q: int | None = 0, k: int | None = 10) -> list[tuple[int, float]]:
        """(training index, score) of the k most helpful examples, most helpful first; ties by index.

        `q=None`: by the mean over all queries. `k=None`: all that are kept.
        """
        return self._ranked(q, k, largest=self.lower_is_better)

    def harmful(self, q: int | None = 0, k: int | None = 10) -> list[tuple[int, float]]:
        """(training index, score) of the k most harmful examples, most harmful first; ties by index."""
        return self._ranked(q, k, largest=not self.lower_is_better)

    def mean(self) -> Scores:
        """One row: the mean over queries (the seed's top-level lists)."""
        if self.indices is not None:
            raise InvalidInput(
                "Only the extremes of each query were kept, so there is no mean; score without top=."
            )
        return replace(
            self,
            values=self.values.mean(0, keepdim=True),
            query_ids=(-1,),
            query_labels=None,
            query_source=None,
        )

    def top(self, k: int) -> Scores:
        """Only the k most helpful and the k most harmful examples per query."""
        if k < 1:
            raise InvalidInput(f"top({k}) keeps nothing; give at least 1.")
        keep = [
            self._order(q, True)[:k].tolist() + self._order(q, False)[:k].tolist() for q in range(len(self))
        ]
        width = min(2 * k, self.values.shape[1])
        columns = torch.tensor([list(dict.fromkeys(row))[:width] for row in keep])
        ids = columns if self.indices is None else self.indices.gather(1, columns)
        return replace(self, values=self.values.gather(1, columns), indices=ids)

    def _order(self, q: int, largest: bool) -> Tensor:
        row = self.values[q]
        if self.indices is None:
            return torch.argsort(row, descending=largest, stable=True)
        by_index = torch.argsort(self.indices[q])
        return by_index[torch.argsort(row[by_index], descending=largest, stable=True)]

    def _ranked(self, q: int | None, k: int | None, largest: bool) -> list[tuple[int, float]]:
        if q is None:
            return self.mean()._ranked(0, k, largest)
        if not -len(self) <= q < len(self):
            raise InvalidInput(
                f"Query {q} does not exist; there are {len(self)} queries, 0 to {len(self) - 1}."
            )
        order = self._order(q, largest)[:k]
        ids = order if self.indices is None else self.indices[q][order]
        return list(zip(ids.tolist(), self.values[q][order].tolist(), strict=True))

    def __getitem__(self, key: Any) -> Scores:
        """`scores[q]`, `scores[2:5]`, `scores[[0, 3]]` pick queries; `scores[:, ids]` picks training examples, which keep
        their dataset indices."""
        rows, columns = key if isinstance(key, tuple) else (key, slice(None))
        picked = torch.arange(len(self))[rows].reshape(-1)
        made = replace(
            self,
            values=self.values[picked],
            indices=None if self.indices is None else self.indices[picked],
            query_ids=tuple((self.query_ids or ())[i] for i in picked.tolist()),
            query_labels=None
            if self.query_labels is None
            else [self.query_labels[i] for i in picked.tolist()],
        )
        if isinstance(columns, slice) and columns == slice(None):
            return made
        if self.indices is not None:
            raise InvalidInput(
                "Only the extremes were kept, so columns cannot be picked; score without top=."
            )
        ids = torch.arange(self.values.shape[1])[columns].reshape(-1)
        return replace(made, values=made.values[:, ids], indices=ids.expand(len(made), -1))

    # ---------------------------------------------------------------- other forms

    def label_name(self, label: Any) -> str:
        """A label in words."""
        if label is None:
            return ""
        if self.class_names is not None and isinstance(label, int) and 0 <= label < len(self.class_names):
            return self.class_names[label]
        return f"{label:.4g}" if isinstance(label, float) else str(label)

    def to_frame(self) -> Any:
        """A long pandas table: query, train, score, rank (0 = most helpful) and labels. Needs the extra `frame`."""
        pandas = require("pandas", "frame")
        rows = []
        for q in range(len(self)):
            for rank, (i, score) in enumerate(self.helpful(q, None)):
                rows.append(
                    (
                        self._query(q),
                        i,
                        score,
                        rank,
                        self._label(self.query_labels, q),
                        self._label(self.train_labels, i),
                    )
                )
        return pandas.DataFrame(
            rows, columns=["query", "train", "score", "rank", "query_label", "train_label"]
        )

    def _query(self, q: int) -> int:
        return (self.query_ids or ())[q]

    @staticmethod
    def _label(labels: Labels, at: int) -> Any:
        return None if labels is None else labels[at]

    def to_json(self, path: str | os.PathLike[str] | None = None, top_k: int | None = 500) -> str:
        """The seed's layout as JSON text, written to `path` if given; ranked lists are cut at `top_k`."""
        seconds = 0.0 if self.diagnostics is None else self.diagnostics.seconds / max(1, len(self))
        out = {}
        for q in range(len(self)):
            out[str(self._query(q))] = {
                "label": self._label(self.query_labels, q),
                "num_in_dataset": self._query(q),
                "time_calc_influence_s": seconds if seconds == seconds else 0.0,
                "influence": self.values[q].tolist(),
                "harmful": [i for i, _ in self.harmful(q, top_k)],
                "helpful": [i for i, _ in self.helpful(q, top_k)],
            }
        text = json.dumps(out, allow_nan=False)
        if path is not None:
            _write_aside(Path(path), lambda aside: Path(aside).write_text(text, encoding="utf-8"))
        return text

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write to a safetensors file: no pickle, written aside, synced, then renamed."""
        tensors = {"values": self.values.contiguous()}
        if self.indices is not None:
            tensors["indices"] = self.indices.contiguous()
        facts = {
            "lower_is_better": self.lower_is_better,
            "n_train": self.n_train,
            "query_ids": list(self.query_ids or ()),
            "train_labels": self.train_labels,
            "query_labels": self.query_labels,
            "class_names": self.class_names,
            "diagnostics": None if self.diagnostics is None else asdict(self.diagnostics),
        }
        header = {"format": FORMAT, "scores": json.dumps(facts, sort_keys=True)}
        _write_aside(Path(path), lambda aside: save_file(tensors, aside, metadata=header))

    @staticmethod
    def load(path: str | os.PathLike[str]) -> Scores:
        """Read what `save` wrote.

        Raises:
            InvalidInput: the file is no such file.
        """
        try:
            with safe_open(os.fspath(path), framework="pt") as file:
                header = file.metadata() or {}
                tensors = {k: file.get_tensor(k) for k in file.keys()}  # noqa: SIM118 - safe_open is no mapping
        except FileNotFoundError:
            raise InvalidInput(
                f"There is no file {os.fspath(path)!r}; give the path that Scores.save wrote."
            ) from None
        except Exception as cause:
            raise InvalidInput(
                f"{os.fspath(path)!r} is no safetensors file; give the path that Scores.save wrote."
            ) from cause
        if header.get("format") != FORMAT:
            raise InvalidInput(
                f"{os.fspath(path)!r} holds {header.get('format', 'no scores')!r}, expected {FORMAT!r}; it was not written by "
                "Scores.save of this version."
            )
        facts = json.loads(header["scores"])
        diagnostics = facts.pop("diagnostics")
        if diagnostics is not None:
            diagnostics["notes"] = tuple(diagnostics["notes"])
            diagnostics = Diagnostics(**diagnostics)
        facts["query_ids"] = tuple(facts["query_ids"])
        return Scores(tensors["values"], indices=tensors.get("indices"), diagnostics=diagnostics, **facts)

    def plot(self, q: int = 0, k: int = 5, path: str | os.PathLike[str] | None = None, **options: Any) -> Any:
        """The seed's picture: the query, its most helpful and most harmful examples. Needs the extra `plot`."""
        # Pictures live a room above; the call goes up by name so that importing scores never draws.
        plots = importlib.import_module("pytorch_influence_functions.report.plots")
        return plots.plot_influences(self, q, k, path=path, **options)

    def __repr__(self) -> str:
        q, n = self.shape
        kept = "" if self.indices is None else f", {self.values.shape[1]} kept per query"
        lines = [f"Scores({q} quer{'y' if q == 1 else 'ies'} x {n:,} training examples{kept})"]
        if self.diagnostics is not None:
            lines.append(f"  {self.diagnostics.method}, lambda = {self.diagnostics.damping:.3g}")
        if q and n:
            for name, ranked in (("helpful", self.helpful(0, 3)), ("harmful", self.harmful(0, 3))):
                lines.append(
                    f"  query {self._query(0)}, most {name}: "
                    + ", ".join(f"{i} ({s:+.3g})" for i, s in ranked)
                )
        return "\n".join(lines)

    def _repr_html_(self) -> str:
        head = "".join(f"<th>{h}</th>" for h in ("query", "most helpful", "most harmful"))
        body = []
        for q in range(min(len(self), 10)):
            cells = [f"{self._query(q)} {self.label_name(self._label(self.query_labels, q))}"]
            for ranked in (self.helpful(q, 3), self.harmful(q, 3)):
                cells.append(", ".join(self._words(i, s) for i, s in ranked))
            body.append("<tr>" + "".join(f"<td>{html.escape(c)}</td>" for c in cells) + "</tr>")
        caption = html.escape(repr(self).splitlines()[0])
        return f"<table><caption>{caption}</caption><thead><tr>{head}</tr></thead><tbody>{''.join(body)}</tbody></table>"

    def _words(self, i: int, score: float) -> str:
        name = self.label_name(self._label(self.train_labels, i))
        return f"{i}{' ' + name if name else ''} ({score:+.3g})"


def _write_aside(path: Path, write: Any) -> None:
    """Write beside the target, sync, then rename: a reader never sees half a file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, aside = tempfile.mkstemp(dir=path.parent, prefix=path.name, suffix=".part")
    os.close(handle)
    try:
        write(aside)
        with open(aside, "rb") as file:
            os.fsync(file.fileno())
        os.chmod(aside, 0o644)
        os.replace(aside, path)
    except BaseException:
        Path(aside).unlink(missing_ok=True)
        raise


def stacked(labels: Sequence[Any]) -> Labels:
    """Labels if any is known, else None."""
    return list(labels) if any(x is not None for x in labels) else None

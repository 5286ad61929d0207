"""`Index`: gradients stored once, asked for ever."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, final, overload

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn

from ..core.digest import digest
from ..core.distributed import current
from ..core.errors import InvalidInput
from ..core.validate import flag
from ..curvature.base import Budget
from ..damping.rules import AbstractDamping
from ..gradients.per_example import Derivatives
from ..influence.checks import check_top
from ..influence.parts import By
from ..influence.question import Question
from ..methods.names import MethodLike, as_method
from ..methods.papers import ekfac
from ..problem.agreement import agree_on_given, agree_on_problem, entry
from ..problem.problem import Problem
from ..scores.parts import PartScores
from ..scores.scores import Scores
from .answering import Search, parts_of
from .asking import Asker
from .build import Plan, add_examples, build, fitted_of, refuse_cut_up, whole_layout
from .columns import Columns, annotate, further_columns
from .compaction import compact, remove
from .describe import IndexForecast, diagnostics_of, labels_of_index
from .examples import Examples
from .filters import candidates_of, choose_examples
from .fitted_basis import FittedBasis
from .folder import IndexFolder, by_first, writing
from .graph import Shortlist, build_graph, check_ef
from .layouts import AbstractLayout
from .rerank import check_rerank, exact_method
from .rerank import rerank as rescore
from .search import StoredRows


@final
@dataclass(frozen=True, eq=False, repr=False)
class Index:
    """The training gradients of one model in a folder: built once, asked any number of times.

    `Index.build(problem, folder)` makes one and `Index.open(folder, model)` opens it. Scores are those of the method it
    was built with, exactly where the gradients are kept in factors, and up to the projection where they are projected.

    Attributes:
        folder: where it lies.
        asker: how gradients of queries are taken.
    """

    folder: IndexFolder
    asker: Asker

    # ---------------------------------------------------------------- making one

    @staticmethod
    @entry
    def build(
        problem: Problem,
        folder: str | os.PathLike[str],
        method: MethodLike | None = None,
        representation: Any = "auto",
        dtype: Any = None,
        budget: Budget | int | str = "20GB",
        *,
        data: Any = None,
        columns: Any = None,
        shard: Budget | int | str = "128MB",
        overwrite: bool = False,
    ) -> Index:
        """Store the gradient of every training example, in one pass over the data.

        Killed at any moment, the same call goes on after the last whole shard, and ends with the same bytes. Under
        `ptif.distributed()` the processes write shards in turn into one folder that all of them see; the call that goes
        on may have another number of processes.

        Args:
            problem: model, loss and training data.
            folder: where the index is kept; a folder of its own.
            method: a method with an eigenbasis such as `ptif.ekfac()`, or its name; `None`: `ptif.ekfac()`.
            representation: `ptif.store.Factors()` (exact), `TwoSided(k_in)` or `Sketch(k)`; `"auto"`: the most exact
                one that fits into `budget`.
            dtype: `"float32"`, `"float16"`, `"bfloat16"`, `"int8"` or `"1bit"`; `None`: exact for factors, float16 for
                what is projected.
            budget: what the index may take on the disk, bytes or words such as `"20GB"`.
            data: the examples that are stored, also such as can only be iterated (an `IterableDataset`, a generator);
                they are named by their place. `None`: the problem's. The curvature is always that of the problem's.
            columns: what else is known of every example, for `where=`: texts, numbers or True and False by the name of
                the column, as a dictionary of columns, a table of pandas, or a list with one dictionary per example.
            shard: the size of one file.
            overwrite: replace another index that lies in the folder.

        Returns:
            The index, open.

        Raises:
            InvalidInput: a setting cannot be used; the folder holds another index, another process writes there, or it
                cannot be written to; or the data are not those that an interrupted build began with.
            TooLarge: what was asked for does not fit into `budget`.

        Example:
            >>> x, y = torch.randn(40, 3), torch.randint(0, 2, (40,))
            >>> problem = Problem(nn.Linear(3, 2), nn.CrossEntropyLoss(), (x, y))
            >>> import tempfile
            >>> with tempfile.TemporaryDirectory() as folder:
            ...     Index.build(problem, folder + "/index").score((x[:2], y[:2]), top=3).shape
            (2, 6)
        """
        flag("overwrite", overwrite)
        plan = _plan(problem, method, representation, dtype, budget, data, shard)
        agree_on_problem(problem, plan.method)
        refuse_cut_up(problem)
        table = None if columns is None else Columns.of(columns, Examples.of(data, problem.data).count)
        kept = {"what is kept": f"{plan.choice.representation!r} in {plan.choice.codec.name}, {plan.shard_rows} a file"}
        source = Examples.of(data, problem.data).source
        agree_on_given({**kept, "overwrite=": overwrite}, source)
        index = Index(IndexFolder(Path(folder), build(plan, folder, data, overwrite, table)), Asker.of(problem, source))
        return index if table is None else index._with_columns(table)

    @staticmethod
    @entry
    def forecast(
        problem: Problem,
        method: MethodLike | None = None,
        representation: Any = "auto",
        dtype: Any = None,
        budget: Budget | int | str = "20GB",
        *,
        data: Any = None,
    ) -> IndexForecast:
        """What `build` would choose and cost: bytes, passes and seconds. Runs a few batches and writes nothing.

        Args:
            problem, method, representation, dtype, budget, data: as for `build`.
        """
        plan = _plan(problem, method, representation, dtype, budget, data, "128MB")
        return IndexForecast.of(plan, Examples.of(data, problem.data).count)

    @staticmethod
    def open(
        folder: str | os.PathLike[str],
        model: nn.Module | Problem,
        loss: Any = None,
        train: Any = None,
        check: bool = True,
    ) -> Index:
        """Open an index. Its files are read when they are needed.

        Args:
            folder: where it lies.
            model: the model that it was built from, or its problem.
            loss: the training loss; `None`: the library's own that it was built with, else it must be given.
            train: the training data, which only `append` and `rerank=` need. Some of them are compared with what the
                index was built from.
            check: compare the digest of every file when it is first read.

        Raises:
            InvalidInput: there is no index, it is damaged, or it was built from another model, loss or other data.
        """
        flag("check", check)
        opened = IndexFolder.open(folder, check)
        return Index(opened, Asker.at_open(opened, model, loss, train))

    # ---------------------------------------------------------------- asking

    # fmt: off
    @overload
    def score(
        self, queries: Any, measure: Any = None, top: int | None = None, *, aggregate: Any = None, contrast: Any = None,
        ids: Any = None, where: Any = None, normalised: bool = False, damping: AbstractDamping | float | None = None,
        ef: int | None = None, rerank: int | None = None, method: MethodLike | None = None, audit: int = 256,
        by: None = None, memory: Budget | int | str = "1GB", batch_size: int | None = None,
    ) -> Scores: ...
    @overload
    def score(
        self, queries: Any, measure: Any = None, top: int | None = None, *, aggregate: Any = None, contrast: Any = None,
        ids: Any = None, where: Any = None, normalised: bool = False, damping: AbstractDamping | float | None = None,
        ef: int | None = None, rerank: int | None = None, method: MethodLike | None = None, audit: int = 256,
        by: By, memory: Budget | int | str = "1GB", batch_size: int | None = None,
    ) -> PartScores: ...
    # fmt: on
    @entry
    def score(
        self,
        queries: Any,
        measure: Any = None,
        top: int | None = None,
        *,
        aggregate: Any = None,
        contrast: Any = None,
        ids: Any = None,
        where: Any = None,
        normalised: bool = False,
        damping: AbstractDamping | float | None = None,
        ef: int | None = None,
        rerank: int | None = None,
        method: MethodLike | None = None,
        audit: int = 256,
        by: By | None = None,
        memory: Budget | int | str = "1GB",
        batch_size: int | None = None,
    ) -> Scores | PartScores:
        """Predicted change of the measure on every query when each training example is removed.

        Args:
            queries: what is asked about: a Dataset, a DataLoader, tensors or arrays.
            measure: what is measured on a query; `None`: the training loss.
            top: keep only the k most helpful and k most harmful examples per query: memory does not grow with N.
            aggregate: rows of several queries, put together before the one solve that each row takes: `"mean"`,
                `"sum"`, a group for every query (the mean over each), or by name positions, a mask (their mean) or
                weights.
            contrast: what each query is compared with, as many or one: the measure on the query less that on this.
            ids: the examples that are scored, as positions, a slice or a mask, or a list of positions for every query;
                `None`: all.
            where: which examples are scored: values by the name of a column, such as `{"source": "web"}`, or a function
                of the labels (a tensor with one per example). A column may have one value, a list of values, or a
                function of the column (an array); `"label"` is the label where no column has that name.
            normalised: divide every score by sqrt(g^T (C + lambda)^-1 g) of its example, as RelatIF does.
            damping: `PerDirection(share)`, `Relative(share)`, `Absolute(value)` or a number, no rule that measures
                gradients; `None`: that of the method. Any other costs nothing.
            ef: look only at so many candidates for each end, which the graph of `build_graph` names for every query
                (ef of HNSW), instead of at all rows; scores are as they are stored. `None`: look at all rows.
            rerank: take so many candidates from each end of the index's ranking, and rank them by exact scores, which
                a method computes on the training data; `top` of them are kept. `None`: the index's scores.
            method: that method; `None`: the one that the index was built with, whose gradients are not projected then.
            audit: how many other examples, drawn at random, are scored too with `ef=` or `rerank=`: what was missed
                among them bounds what was missed among all, and stands in the diagnostics.
            by: `"layer"`, patterns of names, or patterns by the name of the part: the scores of every part, which add
                up to the whole. With `top` each part has its own extremes.
            memory: what scores and solved queries may take.
            batch_size: queries read at once.

        Returns:
            `Scores` of shape (queries, examples that count), or (queries, 2 top); with `by`, `PartScores`.

        Raises:
            InvalidInput: a setting cannot be used, or a file of the index is damaged.
            NonFinite: a gradient or score is NaN or infinite; the indices are named.
            SolveFailed: the damping does not make the curvature positive definite.
        """
        start = time.perf_counter()
        check_top(top)
        flag("normalised", normalised)
        given = {
            "ids=": ids,
            "where=": where,
            "normalised=": normalised,
            "damping=": damping,
            "rerank=": rerank,
            "ef=": ef,
        }
        agree_on_given({**given, "method=": method, "by=": by, "audit=": audit, "the index": self._contents()})
        if rerank is not None:
            check_rerank(rerank, top, audit, ids, by, normalised)
            exact = exact_method(self.asker, self.folder.manifest, method, damping)
            asked: dict[str, Any] = {"aggregate": aggregate, "contrast": contrast, "batch_size": batch_size}
            chosen_by: dict[str, Any] = {"ids": ids, "where": where, "damping": damping, "memory": memory}
            first = self.score(queries, measure, rerank, ef=ef, audit=0, **asked, **chosen_by)
            mask = choose_examples(self.folder, ids, where, lambda: self.labels)
            return rescore(
                first, lambda chosen: exact.score(queries, measure, ids=chosen, **asked), mask, int(top or 0), audit
            )
        if ef is not None:
            check_ef(ef, top, audit, ids, by, normalised)
        if method is not None:
            raise InvalidInput("method= is that of rerank=, which is not given; add rerank=, or leave method= out.")
        budget = Budget.of(memory)
        derivatives, fitted = self._derivatives(queries)
        question = Question.of(
            derivatives.problem, derivatives.objective, queries, measure, top, batch_size, aggregate, contrast
        )
        parts = None if by is None else parts_of(by, self.folder.manifest, derivatives)
        inverse, shift = fitted.inverse(damping)
        layout = self._layout(fitted)
        own = candidates_of(ids, where, len(question), len(self))
        some = ids if own is None else own.union
        mask = choose_examples(self.folder, some, where, lambda: labels_of_index(self.folder))
        stored = StoredRows(self.folder, layout, mask, current())
        few = None if ef is None else Shortlist.open(self.folder, fitted, ef, audit, mask)
        search = Search(question, stored, own, parts, inverse, normalised, budget, few)
        search.check_memory()
        decay = derivatives.whole.decay
        record = diagnostics_of(self.folder.manifest, derivatives.problem, shift, decay, len(question), start)
        told = {
            "class_names": self.folder.manifest.facts["class_names"] or _class_names(question),
            "train_source": self.asker.train,
        }
        return search.scores(derivatives, fitted.basis, replace(record, rows=question.description), told)

    @entry
    def self_influence(self, damping: AbstractDamping | float | None = None) -> Float[Tensor, " n"]:
        """Self-influence of every example, (1/N) g^T (C + lambda)^-1 g, shape [N]; 0 for those that were removed.

        Args:
            damping: as for `score`.
        """
        fitted = self._fitted()
        inverse, _ = fitted.inverse(damping)
        own = torch.zeros(len(self), dtype=torch.float64)
        agree_on_given({"damping=": damping, "the index": self._contents()})
        stored = StoredRows(self.folder, self._layout(fitted), self.folder.manifest.mask(), current())
        for ids, values in stored.self_influence(inverse):
            own[ids] = values.cpu() / len(self)
        return current().sum_into(own)

    # ---------------------------------------------------------------- changing what is stored

    @entry
    def append(self, data: Any, columns: Any = None) -> Index:
        """Store more examples after those that are there; interrupted, the same call goes on.

        Curvature and damping stay those of the data that the index was built from.

        Args:
            data: as for `build`.
            columns: as for `build`, of these examples: the columns that the index has.

        Returns:
            The index with them.

        Raises:
            InvalidInput: the index was not built to its end, or was opened without its training data.
        """
        problem = self.asker.problem
        if problem is None:
            raise InvalidInput(
                "append() computes gradients as the build did, which needs the training data; open the index with "
                "Index.open(folder, problem), or with loss= and train=."
            )
        derivatives = self.asker.derivatives(None, self._where, self.folder.manifest.fingerprint)
        examples = Examples.of(data, problem.data)
        agree_on_given({}, examples.source)
        refuse_cut_up(problem)
        table = further_columns(self.folder, columns, examples.count)
        with writing(self.folder.path):
            opened = self._changed(lambda: IndexFolder.open(self.folder.path, self.folder.check))
            if current().rank == 0:
                opened.drop_unlisted()
            manifest = opened.manifest
            if not manifest.complete and len(manifest.parts) == 1:
                raise InvalidInput(
                    f"The index in {self._where!r} was not built to its end; call Index.build(...) again, which goes "
                    "on."
                )
            if manifest.complete:
                # Listed with the first shard of the part, so that an append of nothing changes nothing.
                opened.manifest = replace(manifest, parts=(*manifest.parts, manifest.examples), complete=False)
            add_examples(opened, derivatives, examples, len(opened.manifest.parts) - 1, table)
        index = replace(self, folder=IndexFolder(opened.path, opened.manifest, opened.check))
        return index if table is None else replace(index, folder=index._changed(lambda: annotate(index.folder, table)))

    @entry
    def annotate(self, columns: Any) -> Index:
        """Give every example columns for `where=`, in place of those that the index has.

        Args:
            columns: as for `build`, of all examples that were given, removed ones included.

        Returns:
            The index with them.

        Raises:
            InvalidInput: they are of another length, or hold neither texts nor numbers.
        """
        return self._with_columns(Columns.of(columns, len(self)))

    def _with_columns(self, table: Columns) -> Index:
        table.check_length(len(self))
        return replace(self, folder=self._changed(lambda: annotate(self.folder, table, anew=True)))

    @entry
    def remove(self, ids: Any) -> Index:
        """Let examples count no longer: they have no score and are in no ranking. Others keep their numbers.

        N stays: it is the number of examples that the model was trained on.

        Args:
            ids: positions of the examples, one position, a slice, or a mask over all of them.

        Returns:
            The index without them.
        """
        agree_on_given({"ids=": ids, "the index": self._contents()})
        return replace(self, folder=self._changed(lambda: remove(self.folder, ids)))

    @entry
    def compact(self) -> Index:
        """Write shards anew without the rows of removed examples.

        Returns:
            The index, with fewer bytes.
        """
        return replace(self, folder=self._changed(lambda: compact(self.folder)))

    @entry
    def build_graph(self, links: int = 16, ef: int = 64) -> Index:
        """Make a graph of nearest neighbours over the rows, which `score(..., ef=)` asks instead of reading them all.

        Made once and kept in the folder. Examples that are appended later are all looked at, removed ones have no
        score; calling it again makes it anew. Needs faiss: `pip install 'pytorch-influence-functions[ann]'`.

        Args:
            links: how many neighbours each row is linked with (M of HNSW).
            ef: candidates that are looked at for these links (ef_construction of HNSW); more take longer and find more.

        Returns:
            The index with it.

        Raises:
            InvalidInput: the index keeps factors, or was not built to its end.
            MissingExtra: faiss is not installed.
        """
        agree_on_given({"links=": links, "ef=": ef, "the index": self._contents()})
        return replace(self, folder=self._changed(lambda: build_graph(self.folder, links, ef)))

    def _changed(self, work: Callable[[], IndexFolder]) -> IndexFolder:
        """The index after what the first of the processes that share the work does to it."""
        opened = by_first(self.folder.path, self.folder.check, work)
        assert opened is not None
        return opened

    # ---------------------------------------------------------------- looking at it

    def __len__(self) -> int:
        """N, how many examples have been given, removed ones included."""
        return self.folder.manifest.examples

    def __repr__(self) -> str:
        facts = self.folder.manifest.facts
        return f"Index({self._where!r}, {len(self):,} examples, {facts['described']} in {facts['dtype']})"

    @property
    def labels(self) -> Tensor | None:
        """One label per example, where all of them have one."""
        return labels_of_index(self.folder)

    @property
    def columns(self) -> dict[str, np.ndarray[Any, Any]]:
        """What `where=` chooses by: every column as an array, one value per example."""
        return Columns.stored(self.folder).arrays()

    def _contents(self) -> str:
        """What is stored, in words; of equal indices the same."""
        manifest = self.folder.manifest
        files = "".join(file.sha256 for file in (*(shard.file for shard in manifest.shards), *manifest.columns))
        contents = digest(files, manifest.basis.sha256, manifest.removed)
        return f"of {manifest.examples:,} examples with contents {contents[:12]}"

    @property
    def _where(self) -> str:
        return os.fspath(self.folder.path)

    def _derivatives(self, queries: Any) -> tuple[Derivatives, FittedBasis]:
        """How gradients of queries are taken and projected, and the basis that rows are stored in."""
        whole = self.asker.derivatives(queries, self._where, self.folder.manifest.fingerprint)
        fitted = self._fitted()
        return (whole if fitted.projector is None else replace(whole, projector=fitted.projector)), fitted

    def _fitted(self) -> FittedBasis:
        return fitted_of(self.folder)

    def _layout(self, fitted: FittedBasis) -> AbstractLayout:
        return whole_layout(self.folder, fitted)


def _plan(problem: Problem, method: Any, representation: Any, dtype: Any, budget: Any, data: Any, shard: Any) -> Plan:
    if not isinstance(problem, Problem):
        raise InvalidInput(
            f"Index.build() takes a Problem, got {type(problem).__name__}; write ptif.Index.build(ptif.Problem(model, "
            "loss, train), folder)."
        )
    chosen = ekfac() if method is None else as_method(method)
    count = Examples.of(data, problem.data).count
    return Plan.of(problem, chosen, representation, dtype, count, budget, shard)


def _class_names(question: Question) -> list[str] | None:
    return None if question.source is None else question.source.class_names

"""One run of `ptif attribute`: its settings, its forecast cost, and the scoring itself, block by block."""

import platform
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, final

import torch

from .._version import __version__
from ..core.errors import InvalidInput
from ..core.progress import Callback, Meter
from ..hf.texts import Texts
from ..influence.attribution import Attribution, Influence
from ..influence.method import AbstractMethod, Fitted
from ..methods.names import along_the_run
from ..methods.papers import grad_dot
from ..problem.data import Source
from ..report.page import SHOWN
from ..scores.parts import PartScores
from ..scores.scores import Scores
from ..solvers.forecast import Forecast
from . import blocks
from .by_part import by_part, file_of, influences_of, joined, with_data, with_query_ids
from .exit import Interruption
from .fingerprints import describe_settings, fingerprint_run
from .folder import RUN, RunFolder
from .options import RunSettings
from .parsing import override_damping, parse_by, parse_method, parse_query_positions
from .progress_bars import QUERIES
from .task import Task


@final
@dataclass(frozen=True, eq=False)
class FinishedRun:
    """The scores of a run, and how many queries had been kept by an earlier start."""

    scores: Scores | PartScores
    resumed: int
    fitted: Fitted | None = None


@final
@dataclass(frozen=True, eq=False)
class AttributionRun:
    """The settings of a run with what they name: the task, the method, and the positions of the queries."""

    settings: RunSettings
    task: Task
    method: AbstractMethod
    ids: tuple[int, ...]
    by: Any = None

    @staticmethod
    def of(settings: RunSettings) -> "AttributionRun":
        """Run the task file and find the method and the queries."""
        named, by = (
            None if settings.method is None else parse_method(settings.method, settings.run),
            parse_by(settings.by),
        )
        if by is not None and settings.report:
            raise InvalidInput("--report shows scores of the whole model, and --by tells parts apart; leave one out.")
        task = settings.load()
        ids = parse_query_positions(settings.queries, len(task.query_source))
        return AttributionRun(settings, task, choose_method(named, task, settings), tuple(ids), by)

    @property
    def tokens(self) -> dict[int, float]:
        """How many tokens a text has on average, by the number of texts in a pass; empty for other data."""
        data = self.task.problem.data.dataset
        if not isinstance(data, Texts):
            return {}
        return {len(data): sum(len(row.ids) for row in data.encoded) / len(data)}

    def fitted(self, finished: FinishedRun) -> Fitted | None:
        """The fitted method for the colours of tokens, where they are predicted; fitted again after a resumed run."""
        if not isinstance(self.task.problem.data.dataset, Texts):
            return None
        fitted = finished.fitted or self.method.fit(self.task.problem, n_queries=len(self.ids))
        return fitted if isinstance(fitted, Attribution) else None

    @property
    def block_ranges(self) -> list[tuple[int, int]]:
        """The blocks of queries, as (first, last + 1)."""
        return list(blocks.block_ranges(len(self.ids), self.settings.block))

    def forecast(self) -> Forecast:
        """What the run would cost, from counts and one small batch that is timed.

        Raises:
            InvalidInput: the method has no forecast.
        """
        with Meter(1, "timing one batch") as meter:
            costs = self.method.forecast(self.task.problem, len(self.ids), self.settings.top)
            meter.advance()
        return costs

    def forecast_colours(self) -> float | None:
        """Seconds that the colours of the page's tokens take beside the scores, roughly; None where there are none.

        Every text that a question shows is followed along it and the question along the text, each about three passes
        of a text, and each text shown is solved for, about four.
        """
        problem = self.task.problem
        if not (self.settings.report and isinstance(problem.data.dataset, Texts)):
            return None
        shown = min(2 * SHOWN, len(problem))
        pairs = shown * len(self.ids)
        look = grad_dot().forecast(problem, 1)
        return (6 * pairs + 4 * min(pairs, len(problem))) * look.seconds / (look.passes * len(problem))

    @property
    def result_bytes(self) -> int:
        """The size of the scores."""
        k, n = self.settings.top, len(self.task.problem)
        per_query = 4 * n if k is None else 12 * min(2 * k, n)
        return per_query * len(self.ids)

    def score(self, overwrite: bool, interruption: Interruption, report: Callback) -> FinishedRun:
        """Score the queries that have not been scored yet, keep every finished block, then write all scores."""
        s = self.settings
        settings = {"queries": list(self.ids), "top": s.top, "block": s.block}
        settings |= {} if self.by is None else {"by": self.by}
        queries = self.task.query_source.subset(list(self.ids))
        record = {
            "command": "attribute",
            "task": str(self.task.path),
            "settings": describe_settings(self.task, self.method, settings),
            "n_train": len(self.task.problem),
            "n_queries": len(self.ids),
            "versions": versions(),
        }
        fingerprint = fingerprint_run(self.task, self.method, settings, queries)
        with RunFolder.open(s.out, fingerprint, record, overwrite) as folder:
            finished = folder.read_scores() if folder.is_complete else None
            if finished is not None:
                return FinishedRun(self._with_data(finished), len(self.ids))
            parts, resumed, fitted = self._score_blocks(folder, queries, interruption, report)
            scores = joined(parts)
            folder.write_scores(scores)
            folder.write(status="complete", seconds=scores.diagnostics.seconds)
            folder.drop_blocks()
        return FinishedRun(self._with_data(scores), resumed, fitted)

    def _score_blocks(
        self, folder: RunFolder, queries: Source, interruption: Interruption, report: Callback
    ) -> tuple[list[Scores | PartScores], int, Fitted | None]:
        """The scores of every block, how many queries had been kept, and the fitted method if it was needed."""
        parts = {pair: folder.read_block(*pair) for pair in self.block_ranges}
        resumed = sum(last - first for (first, last), part in parts.items() if part is not None)
        fitted: Fitted | None = None
        try:
            fitted = self._score_missing(parts, folder, queries, report)
        finally:
            # The blocks on the disk are counted: one may have been written when the interruption came.
            kept = sum(last - first for first, last in self.block_ranges if folder.has_block(first, last))
            interruption.kept = f"{kept:,} of {len(self.ids):,} queries are kept in {str(self.settings.out)!r}"
        return [part for part in parts.values() if part is not None], resumed, fitted

    def _score_missing(
        self,
        parts: dict[tuple[int, int], Scores | PartScores | None],
        folder: RunFolder,
        queries: Source,
        report: Callback,
    ) -> Fitted | None:
        """Score the blocks that are None, and keep each as it is finished; gives the fitted method if it was needed."""
        total = len(self.ids)
        done = sum(last - first for (first, last), part in parts.items() if part is not None)
        fitted: Fitted | None = None
        report(QUERIES, done, total)
        for (first, last), part in parts.items():
            if part is not None:
                continue
            start = time.perf_counter()
            fitted = fitted or self.method.fit(self.task.problem, n_queries=total)
            block_queries = queries.subset(range(first, last))
            part = self._asked(fitted, block_queries)
            seconds = time.perf_counter() - start  # of the first block, including the fit
            told = replace(part.diagnostics, seconds=seconds, inferred=self.task.inferred)
            part = with_query_ids(part, self.ids[first:last], told)
            folder.write_block(first, last, part)
            parts[first, last] = part
            done += last - first
            report(QUERIES, done, total)
        return fitted

    def _asked(self, fitted: Fitted, queries: Source) -> Scores | PartScores:
        """The scores of some queries, of the whole or by part."""
        if self.by is None:
            return fitted.score(queries, self.task.measure, top=self.settings.top)
        asked: Any = fitted  # one that cannot tell parts apart says so
        scores: Scores | PartScores = asked.score(queries, self.task.measure, top=self.settings.top, by=self.by)
        return scores

    def _with_data(self, scores: Scores | PartScores) -> Scores | PartScores:
        return with_data(scores, self.task.problem.data.whole, self.task.query_source)


def choose_method(named: AbstractMethod | None, task: Task, settings: RunSettings) -> AbstractMethod:
    """The method that the flags name, else the task's own, else the one that `Auto` chooses; along the `--run`."""
    if named is None:
        named = (task.method or Influence()) if settings.run is None else along_the_run(settings.run, task.method)
    return override_damping(named, settings.damping)


def versions() -> dict[str, str]:
    """The versions of the software that made a result."""
    return {"pytorch_influence_functions": __version__, "torch": torch.__version__, "python": platform.python_version()}


def describe_run(run: AttributionRun, finished: FinishedRun) -> dict[str, Any]:
    """A finished run as one object of plain values."""
    scores, out = next(iter(by_part(finished.scores).values())), run.settings.out
    d = scores.diagnostics
    numbers: Mapping[str, Any] = d.to_dict()
    return {
        "status": "complete",
        "exit_code": 0,
        "command": "attribute",
        "out": str(out),
        "files": {"scores": str(out / file_of(finished.scores)), "run": str(out / RUN)},
        "n_queries": len(scores),
        "n_train": scores.n_train,
        "kept_per_query": scores.shape[1],
        "resumed_queries": finished.resumed,
        "method": d.method,
        "why": d.why,
        "damping": numbers["damping"],
        "seconds": numbers["seconds"],
        "checks": [{"name": c.name, "status": c.status, "text": c.text} for c in d.checks()],
        **influences_of(finished.scores, labels=True),
    }

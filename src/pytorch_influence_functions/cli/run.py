"""One run of `ptif attribute`: what is asked, what it would cost, and the work itself, block by block."""

import platform
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, final

import torch

from .._version import __version__
from ..core.errors import InvalidInput
from ..core.progress import Callback
from ..influence.attribution import Influence
from ..influence.method import AbstractMethod, Fitted
from ..problem.data import Source
from ..scores.scores import Scores
from ..solvers.auto import Forecast
from . import blocks
from .folder import RUN, SCORES, Folder
from .marks import marks, words
from .options import Settings
from .outcome import State
from .spelled import damped, method_of, picked
from .task import Task, load
from .watch import QUERIES

_LISTED = 5


@final
@dataclass(frozen=True, eq=False)
class Done:
    """A finished run: its scores, and how many queries had been kept by an earlier start."""

    scores: Scores
    resumed: int


@final
@dataclass(frozen=True, eq=False)
class Asked:
    """Settings with the task they name: the method, and the positions of the queries."""

    settings: Settings
    task: Task
    method: AbstractMethod
    ids: tuple[int, ...]

    @staticmethod
    def of(settings: Settings) -> "Asked":
        """Run the task file and look everything up."""
        path = settings.task_file
        named = None if settings.method is None else method_of(settings.method)
        task = load(path, settings.overrides)
        ids = picked(settings.queries, len(task.asked))
        return Asked(settings, task, chosen(named, task, settings), tuple(ids))

    @property
    def plan(self) -> list[tuple[int, int]]:
        """The blocks of queries, as (first, last + 1)."""
        return list(blocks.plan(len(self.ids), self.settings.block))

    def forecast(self) -> Forecast:
        """What the run would cost, from counts and one small batch that is timed.

        Raises:
            InvalidInput: the method has no forecast.
        """
        return forecast(self.method, self.task, len(self.ids))

    @property
    def result_bytes(self) -> int:
        """How large the scores will be."""
        k, n = self.settings.top, len(self.task.problem)
        held = 4 * n if k is None else 12 * min(2 * k, n)
        return held * len(self.ids)

    def run(self, overwrite: bool, state: State, tell: Callback) -> Done:
        """Score what has not been scored yet, keeping every block as it is finished; then write the whole."""
        s = self.settings
        settings = {"queries": list(self.ids), "top": s.top, "block": s.block}
        queries = self.task.asked.subset(list(self.ids))
        record = {
            "command": "attribute",
            "task": str(self.task.path),
            "marks": marks(self.task, self.method, settings, queries),
            "settings": words(self.task, self.method, settings),
            "n_train": len(self.task.problem),
            "n_queries": len(self.ids),
            "versions": versions(),
        }
        folder = Folder.opened(s.out, record, overwrite)
        path = s.out / SCORES
        if folder.complete and path.exists():
            return Done(self._with_data(Scores.load(path)), len(self.ids))
        parts, resumed = self._blocks(folder, queries, state, tell)
        scores = blocks.joined(parts)
        scores.save(path)
        folder.write(status="complete", seconds=scores.diagnostics.seconds)
        folder.drop_blocks()
        return Done(self._with_data(scores), resumed)

    def _blocks(self, folder: Folder, queries: Source, state: State, tell: Callback) -> tuple[list[Scores], int]:
        total, out = len(self.ids), str(self.settings.out)
        held = {pair: folder.kept(*pair) for pair in self.plan}
        resumed = done = sum(last - first for (first, last), part in held.items() if part is not None)
        fitted: Fitted | None = None
        state.kept = f"{done:,} of {total:,} queries are kept in {out!r}"
        tell(QUERIES, done, total)
        for (first, last), part in held.items():
            if part is not None:
                continue
            start = time.perf_counter()
            fitted = fitted or self.method.fit(self.task.problem, n_queries=total)
            some = queries.subset(range(first, last))
            part = fitted.score(some, self.task.measure, top=self.settings.top)
            seconds = time.perf_counter() - start  # the first block's with the fit
            part = replace(
                part,
                query_ids=torch.tensor(self.ids[first:last]),
                diagnostics=replace(part.diagnostics, seconds=seconds),
            )
            folder.keep(first, last, part)
            held[first, last] = part
            done += last - first
            state.kept = f"{done:,} of {total:,} queries are kept in {out!r}"
            tell(QUERIES, done, total)
        return [part for part in held.values() if part is not None], resumed

    def _with_data(self, scores: Scores) -> Scores:
        return replace(scores, train_source=self.task.problem.data, query_source=self.task.asked)


def chosen(named: AbstractMethod | None, task: Task, settings: Settings) -> AbstractMethod:
    """The method that the flags name, else the task's own, else what `Auto` chooses."""
    return damped(named or task.method or Influence(), settings.damping)


def forecast(method: AbstractMethod, task: Task, queries: int) -> Forecast:
    """Passes, memory and seconds.

    Raises:
        InvalidInput: the method has no forecast.
    """
    if not isinstance(method, Influence):
        raise InvalidInput(f"--dry-run forecasts an Influence, not {type(method).__name__}; leave it out.")
    return method.forecast(task.problem, queries)


def versions() -> dict[str, str]:
    """What made a result."""
    return {"pytorch_influence_functions": __version__, "torch": torch.__version__, "python": platform.python_version()}


def told(asked: Asked, done: Done) -> dict[str, Any]:
    """A finished run as one object of plain values."""
    scores, out = done.scores, asked.settings.out
    d = scores.diagnostics
    numbers: Mapping[str, Any] = d.to_dict()
    lists = [
        {
            "query": int(q),
            "label": scores.query_labels[at] if isinstance(scores.query_labels, list) else None,
            "helpful": scores.helpful(at, _LISTED),
            "harmful": scores.harmful(at, _LISTED),
        }
        for at, q in enumerate(scores.query_ids.tolist())
    ]
    return {
        "status": "complete",
        "exit_code": 0,
        "command": "attribute",
        "out": str(out),
        "files": {"scores": str(out / SCORES), "run": str(out / RUN)},
        "n_queries": len(scores),
        "n_train": scores.n_train,
        "kept_per_query": scores.shape[1],
        "resumed_queries": done.resumed,
        "method": d.method,
        "why": d.why,
        "damping": numbers["damping"],
        "seconds": numbers["seconds"],
        "checks": [{"name": c.name, "status": c.status, "text": c.text} for c in d.checks()],
        "influences": lists,
    }

"""What every fitted method answers: scores of any queries, and those of parts of the model."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, overload

from ..core.renames import OldNames
from ..gradients.per_example import Derivatives
from ..problem.agreement import entry
from ..problem.problem import Problem
from ..scores.diagnostics import Diagnostics
from ..scores.parts import PartScores
from ..scores.scores import Scores
from .parts import By, Parts
from .question import Question
from .run_log import RunLog
from .scoring import ScoringPass


class AbstractAttribution(OldNames, ABC):
    """A method fitted to a problem; any number of queries may follow."""

    problem: Problem
    fit_seconds: float

    # fmt: off
    @overload
    def score(
        self, queries: Any, measure: Any = None, top: int | None = None, batch_size: int | None = None, *,
        aggregate: Any = None, contrast: Any = None, ids: Any = None, by: None = None,
    ) -> Scores: ...
    @overload
    def score(
        self, queries: Any, measure: Any = None, top: int | None = None, batch_size: int | None = None, *,
        aggregate: Any = None, contrast: Any = None, ids: Any = None, by: By,
    ) -> PartScores: ...
    # fmt: on
    @entry
    def score(
        self,
        queries: Any,
        measure: Any = None,
        top: int | None = None,
        batch_size: int | None = None,
        *,
        aggregate: Any = None,
        contrast: Any = None,
        ids: Any = None,
        by: By | None = None,
    ) -> Scores | PartScores:
        """Predicted change of the measure on every query when each training example is removed.

        A method that follows a training run says itself of what its numbers are; positive always helps.

        Args:
            queries: a Dataset, DataLoader, tensors or arrays `(x, y)`; or `FromModel(f)`, or a list of those.
            measure: what is measured on a query, an objective or loss; `None`: the training objective. A list or
                dictionary of several gives rows for each.
            top: keep only the k most helpful and k most harmful examples per query.
            batch_size: queries read at once; `None`: the problem's.
            aggregate: rows of several queries, put together before the one solve that each row takes: `"mean"`,
                `"sum"`, a group for every query (the mean over each), or by name positions, a mask (their mean) or
                weights.
            contrast: what each query is compared with, as many or one: the measure on the query less that on this.
            ids: the training examples to score, or a list of them for every row; no others are read.
            by: `"layer"`, `"head"` (every attention head, and what is in none by layer), patterns of names, or patterns
                by the name of the part: the scores of every part.

        Returns:
            `Scores` of shape (queries, N), averaged over the checkpoints in `units`, or summed with `weights`; with
            `by`, `PartScores`, which add up to them (of the dual in float64).

        Raises:
            InvalidInput: `by` is given, and the scores are no sum over layers.
            SolveFailed: a solve did not converge; the message says why and what to change.
            NonFinite: a gradient or score is NaN or infinite; the indices are named.
        """
        parts = None if by is None else self._parts(by)
        question = self._question(queries, measure, top, batch_size, aggregate, contrast, ids)
        scoring, diagnostics = self._scored(question, parts)
        if parts is not None:
            return scoring.part_scores(diagnostics, self.fit_seconds)
        return scoring.scores(diagnostics, self.fit_seconds)

    @property
    @abstractmethod
    def _derivatives(self) -> Derivatives:
        """How gradients are taken, of one checkpoint as of any."""

    def _question(self, *asked: Any) -> Question:
        """What was asked, of this problem's training objective where no measure was named."""
        return Question.of(self.problem, self._derivatives.objective, *asked)

    def _parts(self, by: By) -> Parts:
        """The parts of the model that scores are told apart by."""
        return Parts.of(by, self._derivatives)

    @abstractmethod
    def _scored(self, question: Question, parts: Parts | None) -> tuple[ScoringPass, Callable[[RunLog], Diagnostics]]:
        """All scores of the question, and what makes its diagnostics of the log."""

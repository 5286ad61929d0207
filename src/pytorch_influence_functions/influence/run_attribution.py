"""What a fitted method that follows a training run by itself answers, whatever it does with the run."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, ClassVar, overload

from ..core.distributed import World, current
from ..core.errors import InvalidInput
from ..core.renames import OldNames
from ..gradients.per_example import Derivatives
from ..problem.agreement import entry
from ..problem.problem import Problem
from ..scores.diagnostics import Diagnostics
from ..scores.parts import PartScores
from ..scores.scores import Scores
from .assumptions import StationarityCheck
from .method import AbstractMethod
from .parts import By, Parts
from .question import Question
from .run_log import RunLog
from .scoring import ScoringPass


@dataclass(frozen=True, eq=False)
class RunAttribution(OldNames):
    """A run with a problem; any number of queries may follow.

    Attributes:
        spec: the method.
        problem: model, loss and training data.
        derivatives: how gradients are taken.
        stationarity: how the weights stand at which queries are measured.
        fit_seconds: how long the fit took.
    """

    spec: AbstractMethod
    problem: Problem
    derivatives: Derivatives
    stationarity: StationarityCheck
    fit_seconds: float

    shares_work: ClassVar[bool] = False
    """Whether processes that work together each score a part of the training examples; else each scores all."""
    tells_parts: ClassVar[bool] = False
    """Whether scores can be told apart by layer."""

    @property
    def why(self) -> str:
        """Why this method."""
        return "asked for"

    @property
    def method(self) -> str:
        """The composition in use, as it would be written."""
        return repr(self.spec)

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
        """A number for every query and training example, positive where the example helps; the method says of what.

        Args:
            queries: a Dataset, DataLoader, tensors or arrays `(x, y)`; or `FromModel(f)`, or a list of those.
            measure: what is measured on a query, an objective or loss, or several; `None`: the training objective.
            top: keep only the k most helpful and k most harmful examples per query.
            batch_size: queries read at once; `None`: the problem's.
            aggregate, contrast, ids: as for `Attribution.score`.
            by: as for `Attribution.score`, where the method can tell layers apart.

        Returns:
            `Scores` of shape (queries, N); with `by`, `PartScores`, which add up to them.

        Raises:
            InvalidInput: `by` is given, and the scores are no sum over layers.
            NonFinite: a gradient or score is NaN or infinite; the indices are named.
        """
        if by is not None and not self.tells_parts:
            raise InvalidInput(f"{type(self.spec).__name__} takes no by=; leave it out, or use ptif.ekfac().")
        asked = (queries, measure, top, batch_size, aggregate, contrast, ids)
        question = Question.of(self.problem, self.derivatives.objective, *asked)
        parts = None if by is None else Parts.of(by, self.derivatives)
        world = current() if self.shares_work else World()
        scoring = ScoringPass(self.problem, question, parts=parts, whole=parts is not None, world=world)
        notes = tuple(self._add_scores(scoring))
        if parts is not None:
            return scoring.part_scores(lambda log: self._diagnostics(log, notes), self.fit_seconds)
        return scoring.scores(lambda log: self._diagnostics(log, notes), self.fit_seconds)

    @abstractmethod
    def _add_scores(self, scoring: ScoringPass) -> Iterable[str]:
        """Add every query's scores, and say what should be known of them."""

    @abstractmethod
    def _facts(self) -> dict[str, Any]:
        """The fields of `Diagnostics` that the method knows."""

    def _diagnostics(self, log: RunLog, notes: tuple[str, ...]) -> Diagnostics:
        facts: dict[str, Any] = {"method": self.method, "why": self.why, "needs_minimum": False, "notes": notes}
        return log.diagnostics(self.problem, self.stationarity, self.derivatives.routes, **facts | self._facts())

"""What a fitted method that follows a training run by itself answers, whatever it does with the run."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, ClassVar

from ..core.distributed import World, current
from ..core.errors import InvalidInput
from ..gradients.per_example import Derivatives
from ..problem.problem import Problem
from ..scores.diagnostics import Diagnostics
from .abstract_attribution import AbstractAttribution
from .assumptions import StationarityCheck
from .method import AbstractMethod
from .parts import By, Parts
from .question import Question
from .run_log import RunLog
from .scoring import ScoringPass


@dataclass(frozen=True, eq=False)
class RunAttribution(AbstractAttribution):
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

    @property
    def _derivatives(self) -> Derivatives:
        return self.derivatives

    def _parts(self, by: By) -> Parts:
        if not self.tells_parts:
            raise InvalidInput(f"{type(self.spec).__name__} takes no by=; leave it out, or use ptif.ekfac().")
        return super()._parts(by)

    def _scored(self, question: Question, parts: Parts | None) -> tuple[ScoringPass, Callable[[RunLog], Diagnostics]]:
        world = current() if self.shares_work else World()
        scoring = ScoringPass(self.problem, question, parts=parts, whole=parts is not None, world=world)
        notes = tuple(self._add_scores(scoring))
        return scoring, lambda log: self._diagnostics(log, notes)

    @abstractmethod
    def _add_scores(self, scoring: ScoringPass) -> Iterable[str]:
        """Add every query's scores, and say what should be known of them."""

    @abstractmethod
    def _facts(self) -> dict[str, Any]:
        """The fields of `Diagnostics` that the method knows."""

    def _diagnostics(self, log: RunLog, notes: tuple[str, ...]) -> Diagnostics:
        facts: dict[str, Any] = {"method": self.method, "why": self.why, "needs_minimum": False, "notes": notes}
        return log.diagnostics(self.problem, self.stationarity, self.derivatives.routes, **facts | self._facts())

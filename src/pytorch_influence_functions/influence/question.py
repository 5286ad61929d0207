"""What is asked: queries as a data source, and what is measured on them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from ..core.errors import InvalidInput
from ..objectives.base import AbstractObjective
from ..objectives.convert import as_objective
from ..objectives.measures import FromFunction
from ..problem.agreement import agree_on_question
from ..problem.data import Source
from ..problem.labels import Labels
from ..problem.model_and_loss import ModelAndLoss
from ..problem.problem import Problem, first_batch
from .checks import check_top, in_queries, of_measure


@dataclass(frozen=True, eq=False)
class Question:
    """Queries and a measure, ready to be asked; `labels` fills while the queries are read."""

    source: Source
    measure: AbstractObjective
    top: int | None
    labels: Labels

    @staticmethod
    def of(
        problem: Problem,
        objective: AbstractObjective,
        queries: Any,
        measure: Any = None,
        top: int | None = None,
        batch_size: int | None = None,
    ) -> Question:
        """Read what was asked; `objective` is the training objective, which is measured where `measure` is None.

        Raises:
            InvalidInput: queries, measure or `top` cannot be used as they are.
        """
        check_top(top)
        with in_queries():
            asked = problem.batch_size if problem.data.fixed else None
            source = Source.of(queries, asked if batch_size is None else batch_size, problem.data.class_names or ())
        agree_on_question(source, measure, top)
        return Question(source, resolve_measure(problem, objective, measure, source), top, Labels(len(source)))

    def __len__(self) -> int:
        return len(self.source)


def resolve_measure(problem: Problem, trained: AbstractObjective, measure: Any, source: Source) -> AbstractObjective:
    """What is measured on a query, as an objective; `None` is the training objective."""
    if measure is None:
        return trained
    with of_measure():
        objective = as_objective(measure)
    if isinstance(problem.model, ModelAndLoss) and measure is problem.model.trained.module:
        return trained
    if getattr(objective, "reads_logits", False) and getattr(trained, "from_probabilities", False):
        raise InvalidInput(
            f"{objective!r} reads logits and the model gives probabilities (from_probabilities=True); write the "
            "log-odds as measure=ptif.FromFunction(lambda p, y: p.gather(1, y[:, None])[:, 0].logit(), "
            "lower_is_better=False), or for one yes or no with (2 * y - 1) * p.flatten().logit()."
        )
    if isinstance(objective, FromFunction):
        ids = torch.arange(min(2, len(source)))
        with in_queries(), first_batch(problem, source, ids) as (_, batch), torch.no_grad():
            outputs = objective.look(problem.model, batch, len(ids))
        with of_measure():
            objective = objective.resolved_on(outputs, batch)
    return objective

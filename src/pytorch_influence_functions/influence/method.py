"""What every method has: `fit`, and what `fit` gives; with the pieces of scoring that do not depend on the method."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor

from ..objectives.base import AbstractObjective, inputs_and_targets
from ..objectives.convert import as_objective
from ..objectives.measures import FromFunction
from ..problem.checkpoints import Checkpoint, at_checkpoint
from ..problem.data import Source
from ..problem.problem import Problem, first_batch
from ..scores.diagnostics import Diagnostics
from ..scores.scores import Scores, stacked
from .checks import in_queries, of_measure
from .run_log import RunLog
from .topk import TopK


@runtime_checkable
class Fitted(Protocol):
    """A method that has looked at the training run: any number of queries may follow."""

    @property
    def method(self) -> str:
        """The composition in use, as it would be written."""

    @property
    def why(self) -> str:
        """Why this one."""

    def score(self, queries: Any, measure: Any = None, top: int | None = None) -> Scores:
        """Predicted change of the measure on every query when each training example is removed."""

    def self_influence(self) -> Float[Tensor, " n"]:
        """Every training example's score on itself."""


class AbstractMethod(ABC):
    """A way to attribute: a frozen record whose making computes nothing. `ptif.attribute(..., method=)` takes one."""

    @abstractmethod
    def fit(self, problem: Problem, n_queries: int = 1) -> Fitted:
        """Do the work that does not depend on the queries. `n_queries` is how many are expected."""


@contextmanager
def weights_of(problem: Problem, checkpoint: Checkpoint | None) -> Iterator[None]:
    """The model at a checkpoint for a while; `None`: at its own weights."""
    with nullcontext() if checkpoint is None else at_checkpoint(problem.model, checkpoint):
        yield


def resolved_measure(problem: Problem, trained: AbstractObjective, measure: Any, source: Source) -> AbstractObjective:
    """What is measured on a query, as an objective; `None` is the training objective."""
    if measure is None:
        return trained
    with of_measure():
        objective = as_objective(measure)
    if isinstance(objective, FromFunction):
        ids = torch.arange(min(2, len(source)))
        with in_queries(), first_batch(problem, source, ids) as (_, batch), torch.no_grad():
            outputs = objective.outputs(problem.model, batch)
        with of_measure():
            objective = objective.resolved(outputs, inputs_and_targets(batch)[2])
    return objective


def result_dtype(problem: Problem) -> torch.dtype:
    """Scores in the model's precision, at least float32."""
    dtype = next(iter(problem.space.values(problem.model).values())).dtype
    return torch.float64 if dtype == torch.float64 else torch.float32


def as_scores(
    problem: Problem,
    found: Tensor | TopK,
    objective: AbstractObjective,
    source: Source,
    ledger: RunLog,
    diagnostics: Diagnostics,
) -> Scores:
    """Values `[Q, N]`, or what `TopK` kept of them, with everything a result carries."""
    values, indices = found.result() if isinstance(found, TopK) else (found, None)
    train = ledger.train_labels
    return Scores(
        values.to(result_dtype(problem)),
        lower_is_better=objective.lower_is_better,
        n_train=len(problem),
        indices=indices,
        train_labels=stacked([train.get(i) for i in range(len(problem))]),
        query_labels=stacked([ledger.query_labels.get(i) for i in range(len(source))]),
        class_names=problem.data.class_names or source.class_names,
        diagnostics=diagnostics,
        train_source=problem.data,
        query_source=source,
    )

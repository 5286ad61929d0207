"""What every method has: `fit`, and what `fit` gives."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import fields, is_dataclass, replace
from typing import Any, Protocol, runtime_checkable

from jaxtyping import Float
from torch import Tensor

from ..core.errors import InvalidInput
from ..problem.problem import Problem
from ..scores.scores import Scores
from ..solvers.forecast import Forecast


@runtime_checkable
class Fitted(Protocol):
    """A method that has looked at the training run: any number of queries may follow."""

    @property
    def method(self) -> str:
        """The composition in use, as it would be written."""

    @property
    def why(self) -> str:
        """Why this one."""

    def score(
        self,
        queries: Any,
        measure: Any = None,
        top: int | None = None,
        *,
        aggregate: Any = None,
        contrast: Any = None,
        ids: Any = None,
    ) -> Scores:
        """Predicted change of the measure on every query when each training example is removed.

        Args:
            queries: what is asked about: a Dataset, a DataLoader, tensors or arrays.
            measure: what is measured on a query; `None`: the training loss.
            top: keep only the k most helpful and k most harmful examples per query; `None`: all scores.
            aggregate: how queries are put together before they are solved for; `None`: each is a row of its own.
            contrast: what each query is compared with; `None`: nothing.
            ids: the training examples to score; `None`: all.
        """

    def self_influence(self) -> Float[Tensor, " n"]:
        """Every training example's score on itself."""


class AbstractMethod(ABC):
    """A way to attribute: a frozen record whose making computes nothing. `ptif.attribute(..., method=)` takes one."""

    @abstractmethod
    def fit(self, problem: Problem, n_queries: int = 1) -> Fitted:
        """Do the work that does not depend on the queries.

        Args:
            problem: model, loss and training data.
            n_queries: how many queries are expected.
        """

    def forecast(self, problem: Problem, n_queries: int = 1, top: int | None = None) -> Forecast:
        """What `fit` and `score` would cost.

        Args:
            problem: model, loss and training data.
            n_queries: how many queries there will be.
            top: how many scores are kept of every query at either end, as in `score`; `None`: all.

        Raises:
            InvalidInput: this method does not know.
        """
        raise InvalidInput(
            f"{type(self).__name__} has no forecast of its cost; call attribute(), or fit() and score() one after the "
            "other."
        )

    def with_options(self, **options: Any) -> AbstractMethod:
        """A copy with these fields changed; None leaves a field as it is.

        Raises:
            InvalidInput: the method has no such field.
        """
        changes = {name: value for name, value in options.items() if value is not None}
        record: Any = self
        known = {f.name for f in fields(record)} if is_dataclass(record) else set()
        for name in changes:
            if name not in known:
                raise InvalidInput(f"{type(self).__name__} takes no {name}=; leave it out.")
        changed: AbstractMethod = replace(record, **changes) if changes else self
        return changed

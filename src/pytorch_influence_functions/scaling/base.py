"""Scaling of raw first-order scores.

First-order influence *underestimates* removals, the more so the higher an example's leverage: removing it also removes
its share of the curvature. `Leverage()` corrects for that. `RelatIF()` and `Cosine()` divide by how much an example
moves the model at all, to rank examples that matter to this query and not to every query. Their scores are no predicted
changes any more.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import ClassVar, final

from jaxtyping import Float, Int
from torch import Tensor

from ..core.records import Record
from ..gradients.per_example import Derivatives, GradientBatch
from ..linalg.dual_solution import DualSolution
from ..linalg.rows import Rows
from ..solvers.base import Solution


@dataclass(frozen=True, eq=False)
class Solving:
    """What a scaling may ask of a fitted model: `solve` gives (C + D)^-1 of rows, `count` is N.

    `ids` are the training examples that are scored, None: all.
    """

    solve: Callable[[Rows], Solution]
    quadratic: Callable[[Rows], Tensor]
    """b^T (C + D)^-1 b for every row."""
    count: int
    ids: Int[Tensor, " n"] | None = None


class AbstractScaling(Record, ABC):
    """How raw scores are rescaled: by which rows stand for the training examples."""

    first_order: ClassVar[bool]
    """Whether the rows are the plain loss gradients, so that stored rows and forward mode may stand in for them."""

    @abstractmethod
    def rows(self, derivatives: Derivatives, solving: Solving) -> Iterator[GradientBatch]:
        """The training rows of `solving.ids`, batch by batch in that order.

        Args:
            derivatives: the source of the plain training rows.
            solving: how the fitted model solves for rows, where a scaling needs that.
        """

    def solves_per_example(self, outputs: int) -> int:
        """Right-hand sides that are solved for every training example of so many `outputs`."""
        return 0

    def query_factors(self, rows: Rows, solved: Rows | DualSolution) -> Float[Tensor, " q"] | None:
        """One number per query that its scores are multiplied by.

        Args:
            rows: the query gradients.
            solved: (C + D)^-1 of them.
        """
        return None

    @property
    def note(self) -> str:
        """What to say with a result that is no predicted change; empty for one that is."""
        return ""


@final
@dataclass(frozen=True, repr=False)
class Raw(AbstractScaling):
    """The first-order scores as they are."""

    first_order: ClassVar[bool] = True

    def rows(self, derivatives: Derivatives, solving: Solving) -> Iterator[GradientBatch]:
        return derivatives.stream(ids=solving.ids, label="scoring")

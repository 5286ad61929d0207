"""What all Fisher matrices have in common, so that Kronecker factors can be measured for any of them."""

from __future__ import annotations

from abc import abstractmethod
from typing import Any, ClassVar

from torch import Tensor

from ..gradients.per_example import Derivatives
from ..objectives.base import AbstractObjective
from .from_rows import AbstractRowCurvature


class AbstractFisher(AbstractRowCurvature):
    """A mean over the examples of J^T c c^T J, where the columns c are slopes in the outputs.

    A new one adds to a row curvature how many columns an example has and what they are.
    """

    given_labels: ClassVar[bool] = False
    """Whether the columns are slopes at the given labels, which any objective has; the others need a curved loss."""

    @property
    def draws_labels(self) -> bool:
        """Whether the columns are slopes at labels that are drawn, so that another draw gives others."""
        return False

    @abstractmethod
    def column_count(self, derivatives: Derivatives) -> int:
        """Columns per example of the problem of `derivatives`."""

    @abstractmethod
    def cotangents(
        self, derivatives: Derivatives, outputs: Tensor, batch: Any, ids: Tensor, draw: int = 0
    ) -> list[Tensor]:
        """The columns of one batch, each of the shape of the outputs.

        Args:
            derivatives: how gradients are taken, and of which objective.
            outputs: of the model for this batch.
            batch: what the collate function gave.
            ids: dataset indices of the batch.
            draw: which of several independent draws, where labels are drawn.
        """

    def measured_objective(self, derivatives: Derivatives) -> AbstractObjective:
        """What the slopes are taken of: the training loss of `derivatives`."""
        return derivatives.objective

"""What a curvature is: a recipe for the matrix C, given in the form a solver can use."""

from __future__ import annotations

import enum
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from ..core.errors import InvalidInput, NotLikelihood, TooLarge
from ..core.validate import finite_number
from ..gradients.per_example import Derivatives
from ..linalg.dense import Matrix
from ..linalg.operator import AbstractSymmetric
from ..problem.checkpoints import Checkpoint, at_checkpoint


class Form(enum.Enum):
    """In which form a matrix is held; each solver needs one of them."""

    MATRIX = "dense P x P matrix"
    """Every entry, in float64: for small models."""
    GRAM = "rows G with C = G^T G / N"
    """The rows it is made of: for small N x outputs."""
    IMPLICIT = "matrix-free products"
    """Only C x, one or more passes over the data each: for everything else."""
    SPECTRAL = "known eigenvalues"
    """A curvature that comes with its own eigenvalues, such as the identity."""


@dataclass(frozen=True)
class Budget:
    """Memory a form may take, in bytes."""

    bytes: int = 4 << 30

    def __post_init__(self) -> None:
        finite_number("memory", self.bytes, above=0, hint="it is a number of bytes")

    @staticmethod
    def of(given: Budget | int | float) -> Budget:
        """A budget from a number of bytes."""
        return given if isinstance(given, Budget) else Budget(given)  # type: ignore[arg-type]

    def check(self, wanted: int | float, what: str, way_out: str) -> None:
        """Raise `TooLarge` when `wanted` bytes are above the bound."""
        if wanted > self.bytes:
            raise TooLarge(
                f"{what} would take {wanted / 2**30:.3g} GiB and the bound is {self.bytes / 2**30:.3g} GiB; {way_out}, "
                "or raise the bound with Influence(memory=bytes)."
            )


class AbstractCurvature(ABC):
    """Which matrix stands for the curvature of the training loss."""

    forms: ClassVar[tuple[Form, ...]]
    """The forms `of` can give."""

    @abstractmethod
    def of(self, derivatives: Derivatives, form: Form, budget: Budget) -> AbstractSymmetric:
        """The operator, in the asked form. Work is done here, not in the constructor.

        Raises:
            NotLikelihood: the objective does not know enough for this curvature.
            TooLarge: the form needs more memory than `budget` allows.
        """

    def mean_of(
        self, members: Sequence[tuple[Checkpoint | None, Derivatives]], form: Form, budget: Budget
    ) -> AbstractSymmetric:
        """The mean of this curvature over several weights of one model; `None` stands for the model's own.

        Dense matrices are averaged entry by entry. One member alone may have any form; a curvature whose other forms
        have a mean (Kronecker factors) says so by a `mean_of` of its own.

        Raises:
            InvalidInput: several members in a form that has no mean, or none at all.
        """
        if not members:
            raise InvalidInput("A mean over no checkpoint was asked for; give at least one.")
        if len(members) > 1 and form is not Form.MATRIX:
            raise InvalidInput(
                f"{type(self).__name__}() given as {form.value} cannot be averaged over {len(members)} checkpoints; "
                "give one checkpoint, or a curvature that has a dense matrix, such as GGN()."
            )
        total: AbstractSymmetric | None = None
        for checkpoint, derivatives in members:
            model = derivatives.problem.model
            with at_checkpoint(model, checkpoint):
                one = self.of(derivatives, form, budget)
            if len(members) == 1:
                return one
            assert isinstance(one, Matrix)
            share = one.matrix / len(members)
            total = Matrix(one.space, share if not isinstance(total, Matrix) else total.matrix + share)
        assert total is not None
        return total

    def require(self, form: Form) -> None:
        """Refuse a form this curvature does not have."""
        if form not in self.forms:
            have = ", ".join(f.value for f in self.forms)
            raise InvalidInput(
                f"{type(self).__name__}() cannot be given as {form.value}, only as {have}; "
                "choose another solver, or Auto()."
            )


def not_a_likelihood(curvature: str, objective: object) -> NotLikelihood:
    """The error for a curvature that needs more than the objective knows."""
    return NotLikelihood(
        f"{curvature} needs the Hessian of the loss in the model's outputs, and {type(objective).__name__} gives none; "
        "use CrossEntropy(), SquaredError() or Bernoulli(), or ask for Hessian() or EmpiricalFisher(), which need only "
        "losses."
    )

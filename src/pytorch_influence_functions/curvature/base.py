"""What a curvature is: a recipe for the matrix C, given in the form a solver can use."""

from __future__ import annotations

import enum
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, ClassVar

from ..errors import InvalidInput, NotLikelihood, TooLarge
from ..gradients import Derivatives
from ..operators import AbstractSymmetric


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
        given: Any = self.bytes
        if not isinstance(given, (int, float)) or isinstance(given, bool) or not given > 0:
            raise InvalidInput(f"The memory bound must be a positive number of bytes, got {given!r}.")

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

"""What a curvature is: a recipe for the matrix C, given in the form a solver can use."""

from __future__ import annotations

import enum
import re
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from ..core.errors import InvalidInput, TooLarge
from ..core.records import Record
from ..gradients.per_example import Derivatives
from ..linalg.dense import Matrix
from ..linalg.operator import AbstractSymmetric, dense_bytes
from ..problem.checkpoints import Checkpoint, at_checkpoint
from .cost import Amount, Cost, ProblemSize, passes_for_rows

# Examples on which a trace is measured where an exact one would cost more.
TRACE_EXAMPLES = 2000
_UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12, "KI": 2**10, "MI": 2**20, "GI": 2**30, "TI": 2**40}


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
    """Memory that curvature, solver and solved queries may take.

    Args:
        bytes: how much.

    >>> Budget.of("2GB").bytes, Budget.of("1.5 GiB").bytes, Budget.of(1000).bytes
    (2000000000, 1610612736, 1000)
    """

    bytes: int = 4 << 30

    def __post_init__(self) -> None:
        given: Any = self.bytes
        if not isinstance(given, (int, float)) or isinstance(given, bool) or not 0 < given < float("inf"):
            raise InvalidInput(f"memory={given!r} is no amount of memory; give bytes such as 2_000_000_000, or '2GB'.")

    @staticmethod
    def of(given: Budget | int | float | str) -> Budget:
        """A budget from what was `given`: a number of bytes, or words such as `"2GB"`, `"500 MB"` or `"4GiB"`."""
        if isinstance(given, Budget):
            return given
        return Budget(_parse_bytes(given) if isinstance(given, str) else given)  # type: ignore[arg-type]

    def check(self, wanted: int | float, what: str, way_out: str) -> None:
        """Refuse what is above the bound.

        Args:
            wanted: bytes.
            what: what would take them, the subject of the sentence.
            way_out: what to do instead.

        Raises:
            TooLarge: it is above.
        """
        if wanted > self.bytes:
            raise TooLarge(
                f"{what} would take {wanted / 2**30:.3g} GiB and the bound is {self.bytes / 2**30:.3g} GiB; {way_out}, "
                "or raise the bound with memory=, such as Influence(memory='16GB')."
            )


def _parse_bytes(text: str) -> int | str:
    """The number of bytes that a text means; a text without one comes back as it is, to be refused."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]?I?)B?\s*", text.upper())
    if match is None or match[2] not in _UNITS:
        return text
    return int(float(match[1]) * _UNITS[match[2]])


class AbstractCurvature(Record, ABC):
    """Which matrix stands for the curvature of the training loss.

    `forms` and `of` are all that a new one needs. What the others depend on (its cost, whether it can be projected, how
    it is damped by default) it says of itself below; the defaults are those of a matrix known by its products.
    """

    forms: ClassVar[tuple[Form, ...]]
    """The forms `of` can give."""
    layerwise: ClassVar[bool] = False
    """Whether every layer is a block of its own, and `PerDirection()` the default damping."""
    kronecker: ClassVar[bool] = False
    """Whether its spectral form has a Kronecker product as eigenbasis of every layer."""
    keeps_factors: ClassVar[bool] = False
    """Whether it multiplies a block of a row by a number, so that a gradient in factors stays in factors."""
    semidefinite: ClassVar[bool] = True
    """Whether no eigenvalue is negative, whatever the weights."""
    gauss_newton: ClassVar[bool] = False
    """Whether it is the Gauss-Newton matrix, which sampled and factored Fisher matrices stand near."""

    @abstractmethod
    def of(self, derivatives: Derivatives, form: Form, budget: Budget) -> AbstractSymmetric:
        """The operator, in the asked form. Work is done here, not in the constructor.

        Args:
            derivatives: how the problem's gradients are taken.
            form: one of `forms`.
            budget: what it may take.

        Raises:
            NotLikelihood: the objective does not know enough for this curvature.
            TooLarge: the form needs more memory than `budget` allows.
        """

    @property
    def title(self) -> str:
        """What it is called in a sentence."""
        return type(self).__name__

    @property
    def drops_directions(self) -> bool:
        """Whether functions of it are zero across its directions, so that only `Spectral` may solve with it."""
        return False

    @property
    def holds_gradients(self) -> bool:
        """Whether its rows are the training examples' own loss gradients, which then need not be taken again."""
        return False

    @property
    def splits_by_example(self) -> bool:
        """Whether each training example's own part of it is known exactly."""
        return False

    @property
    def multiplied(self) -> AbstractCurvature | None:
        """The curvature whose matrix-free products are taken for it; None where there are none."""
        return self if Form.IMPLICIT in self.forms else None

    def projectable(self, form: Form) -> bool:
        """Whether it can be had in this `form` where only projections of gradient rows are known."""
        return False

    def check_size(self, derivatives: Derivatives, budget: Budget) -> None:
        """Refuse, before any data are read, what cannot be had within the budget whatever the data are.

        Args:
            derivatives: how the problem's gradients are taken.
            budget: what it may take.

        Raises:
            TooLarge: it cannot.
        """
        return

    def closest_form(self, wanted: Form) -> Form:
        """Its eigenvalues where it comes with them, else the form that is `wanted`."""
        return Form.SPECTRAL if Form.SPECTRAL in self.forms else wanted

    def rows(self, size: ProblemSize) -> int | None:
        """How many rows it is made of for a problem of this `size`; None where it is not made of rows."""
        return None

    def cost(self, size: ProblemSize, form: Form) -> Cost:
        """What `of` takes, with the trace that a relative damping asks for.

        Args:
            size: the sizes of the problem.
            form: one of `forms`.
        """
        if form is Form.MATRIX:
            return self.product_cost(size, size.parameters) + Cost(bytes=dense_bytes(size.parameters))
        if form is Form.GRAM:
            return Cost(passes_for_rows(1), bytes=size.examples * size.row_bytes)
        if form is Form.SPECTRAL:
            return Cost(passes_for_rows(1), bytes=size.parameters * size.number_bytes)
        return self.trace_cost(size)

    def product_cost(self, size: ProblemSize, vectors: Amount) -> Cost:
        """One product with so many vectors at once, where no dense matrix is held: forward, and along each and back.

        A backward pass to the parameters is twice one to the layers' outputs.

        Args:
            size: the sizes of the problem.
            vectors: how many.
        """
        passes = 0.5 + 1.5 * vectors
        return Cost(passes, products=passes)

    def answer_cost(self, size: ProblemSize, queries: Amount) -> Cost:
        """Answers in the eigenbasis that it comes with, and their residuals.

        Args:
            size: the sizes of the problem.
            queries: how many.
        """
        return self.product_cost(size, 2 * queries)

    def trace_cost(self, size: ProblemSize) -> Cost:
        """What measuring the trace of the matrix-free form takes for a problem of this `size`."""
        return Cost(passes_for_rows(1) * min(1.0, TRACE_EXAMPLES / size.examples))

    def mean_of(
        self, members: Sequence[tuple[Checkpoint | None, Derivatives]], form: Form, budget: Budget
    ) -> AbstractSymmetric:
        """The mean of this curvature over several weights of one model; `None` stands for the model's own.

        Dense matrices are averaged entry by entry. One member alone may have any form; a curvature whose other forms
        have a mean (Kronecker factors) says so by a `mean_of` of its own.

        Args:
            members: the checkpoints, with how gradients are taken at each.
            form: one of `forms`.
            budget: what it may take.

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
        """Refuse a `form` that this curvature does not have."""
        if form not in self.forms:
            have = ", ".join(f.value for f in self.forms)
            raise InvalidInput(
                f"{type(self).__name__}() cannot be given as {form.value}, only as {have}; "
                "choose another solver, or Auto()."
            )

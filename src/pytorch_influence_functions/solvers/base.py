"""Solving (C + D) x = b for all rows at once, and saying truthfully how well it went."""

from __future__ import annotations

import enum
import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Generic, TypeVar

import torch
from jaxtyping import Float
from torch import Tensor

from ..core.errors import IncompleteSolveWarning, InvalidInput, NonFinite, SolveFailed
from ..core.records import Record
from ..core.validate import choice
from ..core.warn import warn_caller
from ..curvature.base import AbstractCurvature, Budget, Form
from ..curvature.cost import DOUBLE, Cost, ProblemSize
from ..damping.rules import AbstractDamping, PerDirection, Relative
from ..gradients.per_example import Derivatives
from ..linalg.blocks import AbstractBlock, Dense
from ..linalg.dual_solution import DualSolution
from ..linalg.operator import AbstractOperator, AbstractSymmetric, apply_flat, diagonal_vector
from ..linalg.rows import Rows
from ..linalg.shift import Shift


class Result(enum.Enum):
    """How a solve ended. The values are the messages: cause and cure."""

    successful = ""
    max_steps_reached = (
        "The allowed steps came before rtol. Raise max_steps (or steps), raise the damping, or give a preconditioner."
    )
    stagnated = (
        "Rounding stopped all progress before rtol was reached. Use a float64 model without autocast in its forward, a "
        "larger rtol, or more damping."
    )
    diverged = (
        "The series grew instead of shrinking: the step is larger than 2 / (largest eigenvalue + damping), "
        "or the batches are too small for it. Lower `step`, or leave it None to have it measured."
    )
    unsettled = (
        "The series was cut before it got closer than zero is. Raise `steps`, or leave step and steps "
        "None to have them measured."
    )
    negative_curvature = (
        "A direction with negative curvature was met, so the weights are not at a minimum of the damped "
        "loss. Raise the damping, or use GGN() instead of Hessian() (EmpiricalFisher() for a loss that has no GGN())."
    )
    bad_preconditioner = (
        "The preconditioner is not positive definite. Use a damped GGN, Fisher or EKFAC for it, or none."
    )
    inaccurate = "The system is too ill-conditioned for the precision in use. Raise the damping."
    nonfinite_input = (
        "The right-hand side holds NaN or infinity before any solving. Look at the measure's gradient on these rows."
    )
    nonfinite_output = (
        "The right-hand side is finite, but the curvature's product is not. Look for overflow or NaN in the "
        "training data or weights."
    )


ENDED_EARLY = (Result.max_steps_reached, Result.stagnated)
"""What was reached is nearer to the answer than zero is, though not as near as was asked."""

# Random combinations of rows on which the residual of a block-wise solve is measured.
_COMBINED = 2
# By how much a preconditioner shortens a solve: 44 steps instead of 137, 17 instead of 70, 49 instead of 217.
# Of a single layer, whose curvature factors almost exactly: 5 of 45, 6 of 45 on softmax regressions.
_GUIDED, _GUIDED_LAYER = 3.0, 8.0


def _empty() -> dict[str, Any]:
    return {}


@dataclass(frozen=True, eq=False)
class Solution:
    """What a solve gives back.

    Args:
        value: x, as rows or in the span of the curvature's rows.
        residual: the true relative residual |(C + D) x_n - b_n| / |b_n| of every row handed out (0 for b_n = 0).
        result: how the solve ended.
        steps: products with the curvature.
        notes: diagnostics: always "damping", and where known "smallest_curvature" and "largest_curvature" (of C).
            "approximation" says that `value` is a formula which does not solve (C + D) x = b and was not judged by
            `residual`.
        failed: the rows that did not reach the tolerance.
        detail: what else should be said of the failure.
        incomplete: what becomes of rows that ended before the tolerance: `"warn"` hands them back, `"error"` raises.
        error: how far every row is from the solution at most, relative, in the norm of C + D, where that was judged.
    """

    value: Rows | DualSolution
    residual: Float[Tensor, " n"]
    result: Result
    steps: int
    notes: Mapping[str, Any] = field(default_factory=_empty)
    failed: tuple[int, ...] = ()
    detail: str = ""
    incomplete: str = "error"
    error: Float[Tensor, " n"] | None = None

    @property
    def ended_early(self) -> bool:
        """Whether rows ended before the tolerance, and what they reached is handed back all the same."""
        return self.incomplete == "warn" and self.result in ENDED_EARLY

    def unwrap(self) -> Rows | DualSolution:
        """The value. What ended early comes with an `IncompleteSolveWarning` where the solver hands it back.

        Raises:
            SolveFailed: the solve failed; names the worst rows.
            NonFinite: the right-hand side was not finite.
        """
        if self.result is Result.successful:
            return self.value
        message = " ".join(part for part in (self.result.value, self.detail) if part)
        if self.result is Result.nonfinite_input:
            raise NonFinite(f"{message} Rows: {_names(self.failed)}.")
        message = (
            f"{message} Relative residual {self._worst()}{self._largest_error()} after {self.steps} steps "
            f"(damping {self.notes.get('damping', math.nan):.3g})."
        )
        if not self.ended_early:
            raise SolveFailed(message)
        warn_caller(message, IncompleteSolveWarning)
        return self.value

    def _worst(self) -> str:
        rows = list(self.failed) or list(range(len(self.residual)))
        # A row that is NaN is worse than any number.
        badness = {i: (r if math.isfinite(r) else math.inf) for i, r in enumerate(self.residual.tolist())}
        worst = sorted(rows, key=lambda i: -badness[i])[:3]
        return ", ".join(f"{float(self.residual[i]):.1e} in row {i}" for i in worst)

    def _largest_error(self) -> str:
        """In words, where it was judged: a residual can be small while scores are far off."""
        known = [] if self.error is None else [float(e) for e in self.error if math.isfinite(e)]
        return f", relative error in the norm of C + D up to {max(known):.1e}," if known else ""


def check_incomplete(solver: str, given: Any) -> None:
    """Refuse a word that says nothing about an incomplete solve."""
    choice("incomplete", given, ("warn", "error"), owner=solver, hint="'warn' hands back what was reached")


def _names(rows: tuple[int, ...], limit: int = 8) -> str:
    more = f" and {len(rows) - limit} more" if len(rows) > limit else ""
    return ", ".join(map(str, rows[:limit])) + more


S = TypeVar("S")


class AbstractSolver(Record, ABC, Generic[S]):
    """An algorithm for (C + D) x = b. Making one costs nothing; `init` pays once; `solve` is for many rows.

    `init` and `solve` are all that a new one needs. What the others depend on (in which form it wants the curvature,
    what it costs, what it holds in memory) it says of itself below; the defaults are those of an iterative solver that
    knows the curvature by its products.
    """

    vectors_held: ClassVar[int] = 8
    """Vectors of P numbers held per right-hand side while solving, beside the answer."""
    default_share: ClassVar[float] = 3.0
    """The default damping, in mean eigenvalues of the curvature."""
    takes_preconditioner: ClassVar[bool] = True
    """Whether `init` has a use for a preconditioner."""
    solves_in_dual: ClassVar[bool] = False
    """Whether solutions stay combinations of the curvature's rows, which are never written out."""
    uses_spectrum: ClassVar[bool] = False
    """Whether its work gives the eigenvalues of C, or they are there before it begins."""
    is_blockwise: ClassVar[bool] = False
    """Whether it is made of solvers for parts of the parameters, and can therefore not be such a part itself."""
    accepts_dropped: ClassVar[bool] = False
    """Whether it can leave out directions that a curvature drops; see `AbstractCurvature.drops_directions`."""

    @abstractmethod
    def init(self, operator: AbstractOperator, shift: Shift, preconditioner: AbstractOperator | None = None) -> S:
        """Prepare for one operator and one D.

        Args:
            operator: C.
            shift: D, damping and weight decay.
            preconditioner: its `apply` approximates (C + D)^-1.
        """

    @abstractmethod
    def solve(self, state: S, rows: Rows) -> Solution:
        """Solve for every row. Failure is a value: see `Solution.unwrap`.

        Args:
            state: from `init`.
            rows: the right-hand sides.
        """

    def quadratic(self, state: S, rows: Rows) -> Float[Tensor, " n"]:
        """b^T (C + D)^-1 b for every row: N times its self-influence. Raises as `Solution.unwrap`.

        Args:
            state: from `init`.
            rows: the right-hand sides b.
        """
        return self.solve(state, rows).unwrap().rowwise(rows)

    def leverages(self, state: S) -> Float[Tensor, " m"] | None:
        """(1/N) g_i^T (C + D)^-1 g_i of every row of the curvature, where the `state` knows it without solving."""
        return None

    def effective_dimension(self, state: S) -> float:
        """tr(C (C + D)^-1) for D one number, where the `state` knows it without the eigenvalues; NaN where not."""
        return math.nan

    # ---------------------------------------------------------------- what it needs of the curvature

    def form(self, curvature: AbstractCurvature) -> Form:
        """The form in which it wants a `curvature`."""
        return curvature.closest_form(Form.IMPLICIT)

    def operator(self, curvature: AbstractCurvature, derivatives: Derivatives, budget: Budget) -> AbstractSymmetric:
        """The curvature as it is solved with.

        Args:
            curvature: the recipe.
            derivatives: how the problem's gradients are taken.
            budget: what it may take.

        Raises:
            InvalidInput: the curvature does not have the form, or drops directions that this solver would answer for.
        """
        self.check_answers(curvature)
        return curvature.of(derivatives, self.form(curvature), budget)

    def check_answers(self, curvature: AbstractCurvature) -> None:
        """Refuse a `curvature` that drops directions, where this solver would answer for them all the same."""
        if curvature.drops_directions and not self.accepts_dropped:
            raise InvalidInput(
                f"{curvature!r} drops what lies across its directions, which only Spectral() can; use it, or "
                "complement='zero'."
            )

    def check_memory(self, operator: AbstractSymmetric, budget: Budget) -> None:
        """Refuse an operator that cannot be prepared within the budget. An iterative solver prepares nothing.

        Args:
            operator: C.
            budget: what its preparation may take.

        Raises:
            TooLarge: it cannot.
        """
        return

    # ---------------------------------------------------------------- damping

    @property
    def damps_itself(self) -> bool:
        """Whether a damping given from outside would say nothing."""
        return False

    def default_damping(self, curvature: AbstractCurvature) -> AbstractDamping:
        """A share of the mean eigenvalue: of what the examples determine where the `curvature` treats layers apart.

        Measured by retraining in `docs/trust.md`. On a Fashion-MNIST perceptron of 50,890 parameters (2,000 images,
        linear datamodelling score over 60 half subsets x 3 seeds), dual of the empirical Fisher: .35 at a share of 0.1,
        .38 at 1, .39 at 4, .37 at 13. Conjugate gradients on the GGN: .28 at 0.3, .35 at 1, .40 at 3, .42 at 10. One
        task: where the learning rate and the number of steps are known, `FromTraining(lr, steps)` is the better
        grounded choice.
        """
        return PerDirection() if curvature.layerwise else Relative(self.default_share)

    def damped(self, operator: AbstractSymmetric, shift: Shift) -> Shift:
        """D as it is solved with.

        Args:
            operator: C.
            shift: D, as it was given.
        """
        return shift

    # ---------------------------------------------------------------- what it costs

    def cost(self, size: ProblemSize, curvature: AbstractCurvature, guided: bool = False) -> Cost:
        """Making the curvature, preparing, and solving for `size.n_queries` right-hand sides; answers not counted.

        Args:
            size: the sizes of the problem.
            curvature: what is solved with.
            guided: whether there is a preconditioner.
        """
        form, steps = self.form(curvature), self.expected_steps(size, guided)
        if form is Form.MATRIX:
            product = Cost(flops=2 * DOUBLE * size.n_queries * size.parameters**2)
        else:
            product = curvature.product_cost(size, size.n_queries)
        return curvature.cost(size, form) + product.repeated(steps)

    def expected_steps(self, size: ProblemSize, guided: bool = False) -> float:
        """Products per right-hand side that a Krylov method takes until `rtol`, at most `max_steps` or `steps`.

        Half the root of the condition number for every factor of e. A preconditioner that is worth it takes a third.

        Args:
            size: the sizes of the problem.
            guided: whether there is a preconditioner.
        """
        if size.steps is not None and not guided:
            return size.steps
        options: Any = self
        rtol = getattr(options, "rtol", None) or (1e-6 if size.number_bytes == 8 else 1e-3)
        limit = getattr(options, "max_steps", None) or getattr(options, "steps", None) or math.inf
        steps = 0.5 * math.sqrt(1 + size.top_eigenvalue) * math.log(2 / rtol)
        alone = len(size.blocks) == 1 and size.used_once
        shortened = (_GUIDED_LAYER if alone else _GUIDED) if guided else 1.0
        return float(min(limit, size.parameters, max(2.0, steps / shortened))) + 1

    def limited_to(self, products: int) -> AbstractSolver[S] | None:
        """The same solver, given up after so many products; None where their number does not depend on the problem.

        Args:
            products: the most products with the curvature.
        """
        return None


@dataclass(frozen=True, eq=False)
class System:
    """C + D on flat rows [n, P], in the dtype of the rows."""

    operator: AbstractOperator
    shift: Shift

    @classmethod
    def of(cls, operator: AbstractOperator, shift: Shift) -> System:
        shift.over(operator.space.blocks)
        return cls(operator, shift)

    def diagonal(self, like: Tensor) -> Tensor | float:
        """D as a number, or as a vector [P] where blocks differ."""
        if self.shift.uniform is not None:
            return self.shift.uniform
        return diagonal_vector(self.operator.space, self.shift.over(self.operator.space.blocks)).to(like)

    def curvature(self, x: Float[Tensor, "n p"]) -> Float[Tensor, "n p"]:
        """C x."""
        return apply_flat(self.operator, x)

    def product(self, x: Float[Tensor, "n p"]) -> Float[Tensor, "n p"]:
        """(C + D) x."""
        return self.curvature(x) + x * self.diagonal(x)

    def residual(self, x: Float[Tensor, "n p"], b: Float[Tensor, "n p"]) -> Float[Tensor, " n"]:
        """|(C + D) x - b| / |b| per row, recomputed; 0 where both are zero."""
        return relative((self.product(x) - b).norm(dim=1), b.norm(dim=1))


def relative(error: Float[Tensor, " n"], size: Float[Tensor, " n"]) -> Float[Tensor, " n"]:
    """error / size per row, 0 where both vanish, in float64."""
    error, size = error.double(), size.double()
    return torch.where((size == 0) & (error == 0), torch.zeros_like(error), error / size)


def combined_residual(operator: AbstractOperator, shift: Shift, rows: Rows, value: Rows) -> Float[Tensor, " n"]:
    """|(C + D) x - b| / |b| for answers of a block-wise solver, without writing all rows out.

    Of more than `_COMBINED` rows that many random combinations are looked at instead (the map is linear): they tell the
    root of the sum of all squared relative residuals, which stands, from above, for each row's own.
    """
    n = len(rows)
    norms = rows.squared_norms().double().sqrt()
    weights: Tensor | None = None
    if n > _COMBINED:
        weights = torch.randn(_COMBINED, n, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        weights = weights.to(norms.device) * torch.where(norms > 0, 1 / norms, torch.zeros_like(norms))
    errors = torch.zeros(min(n, _COMBINED), dtype=torch.float64, device=norms.device)
    for name, d in shift.over(rows.blocks).items():
        # Block by block: a language model's vectors written out all at once would be several times its size.
        some, solved = (_written_out(x.blocks[name], weights) for x in (rows, value))
        product = operator.apply(Rows({name: Dense(solved)})).blocks[name].dense().flatten(1)
        # Not in place: the identity's product is what it was given.
        error = torch.add(product, solved.flatten(1), alpha=d).sub_(some.flatten(1))
        errors += torch.linalg.vector_norm(error, dim=1, dtype=torch.float64).square()
    return relative(errors.sqrt(), norms) if n <= _COMBINED else errors.mean().sqrt().expand(n).clone()


def _written_out(block: AbstractBlock, weights: Float[Tensor, "m n"] | None) -> Tensor:
    """The rows of a block, or combinations of them, written out."""
    return block.dense() if weights is None else block.combine(weights.to(block.reference))


def nonfinite_rows(rows: Float[Tensor, "n *p"]) -> tuple[int, ...]:
    """Which rows hold NaN or infinity."""
    bad = ~torch.isfinite(rows.reshape(rows.shape[0], -1)).all(1)
    return tuple(int(i) for i in bad.nonzero().flatten())


def refuse_input(rows: Rows, failed: tuple[int, ...], shift: Shift) -> Solution:
    """The answer to a right-hand side that holds NaN or infinity: nothing was solved."""
    residual = torch.full((len(rows),), math.nan, dtype=torch.float64)
    return Solution(rows, residual, Result.nonfinite_input, 0, {"damping": shift.damping}, failed)


def no_preconditioner(solver: AbstractSolver[Any], preconditioner: object) -> None:
    """Refuse a preconditioner that a direct solver would ignore."""
    if preconditioner is not None and not solver.takes_preconditioner:
        raise InvalidInput(
            f"{type(solver).__name__}() solves directly and has no use for a preconditioner; drop it, or use CG()."
        )


def damping_that_works(smallest: float, scale: float) -> float:
    """A lambda above -smallest, by a tenth and by what rounding can take."""
    return -1.1 * smallest + 1e-6 * abs(scale)


def describe_indefinite(smallest: float, largest: float, shift: Shift) -> str:
    """In words: the smallest eigenvalue, the damping, and the lambda that works."""
    if smallest >= -1e-12 * abs(largest):
        # Zero within rounding: no wrong choice of curvature, only directions that no example fixes.
        return (
            f"The smallest eigenvalue of C plus weight decay is 0 within rounding ({smallest:.3g}) and the damping is "
            f"{shift.damping:.3g}, so C + D is singular, not positive definite; use a positive damping such as "
            f"Relative(0.1), or at least Absolute({damping_that_works(min(smallest, 0.0), largest):.3g})."
        )
    return (
        f"The smallest eigenvalue of C plus weight decay is {smallest:.3g} and the damping is "
        f"{shift.damping:.3g}, so C + D is not positive definite; use a damping of at least "
        f"Absolute({damping_that_works(min(smallest, 0.0), largest):.3g}), or GGN() instead of Hessian() "
        "(EmpiricalFisher() for a loss that has no GGN())."
    )

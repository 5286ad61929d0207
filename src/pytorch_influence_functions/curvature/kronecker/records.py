"""K-FAC, EK-FAC and Shampoo: block-diagonal curvature in Kronecker-factored eigenbases.

| record | basis of a layer's gradient G = sum_t g_t a_t^T | eigenvalues |
|---|---|---|
| `KFAC` | eigenvectors of E[g g^T] and E[a a^T] (Martens & Grosse 2015) | products of theirs |
| `EKFAC` | the same | measured: E[(Q_g^T G Q_a)^2] (George et al. 2018, Grosse et al. 2023) |
| `Shampoo` | eigenvectors of E[G G^T] and E[G^T G] (Gupta et al. 2018) | measured likewise |

Every parameter takes part: tables of embeddings keep their vocabulary as one side of the basis, scales and biases
that stand alone get their exact small block, and a parameter without a layer rule (attention's stacked projections,
grouped convolutions) is seen as the matrix it is, through its per-example gradients.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from os import PathLike
from typing import Any, ClassVar, final

from ...core.errors import InvalidInput
from ...core.validate import whole_number
from ...gradients.per_example import Derivatives
from ...linalg.blocks import matrix_shape
from ...linalg.eigh import SINGLE_FROM
from ...linalg.operator import AbstractSymmetric
from ...problem.checkpoints import Checkpoint
from ..base import AbstractCurvature, Budget, Form
from ..cost import EIGENDECOMPOSITION, SINGLE_EIGENDECOMPOSITION, Amount, Cost, ProblemSize, passes_for_rows
from ..fisher import AbstractFisher
from .fit import Fit
from .moments import Moments, Sharing
from .plan import Plan, check_layers, columns_by_default, needed_examples, numbers_of, passing_bytes


class AbstractKronecker(AbstractCurvature):
    """What K-FAC, EK-FAC and Shampoo have in common: how they are fitted."""

    forms: ClassVar[tuple[Form, ...]] = (Form.SPECTRAL,)
    layerwise: ClassVar[bool] = True
    kronecker: ClassVar[bool] = True

    @property
    @abstractmethod
    def plan(self) -> Plan:
        """What is measured, on what, and where it is kept."""

    def of(self, derivatives: Derivatives, form: Form, budget: Budget) -> AbstractSymmetric:
        return self.mean_of([(None, derivatives)], form, budget)

    def mean_of(
        self, members: Sequence[tuple[Checkpoint | None, Derivatives]], form: Form, budget: Budget
    ) -> AbstractSymmetric:
        """The curvature of the mean over checkpoints: statistics are added up before anything is decomposed."""
        self.require(form)
        return Fit(self.plan, list(members), budget).run()

    def check_size(self, derivatives: Derivatives, budget: Budget) -> None:
        space = derivatives.space
        like = derivatives.whole.like(derivatives.problem.model)
        check_layers({k: b.shape for k, b in space.blocks.items()}, self.plan, like.element_size(), budget)

    def cost(self, size: ProblemSize, form: Form) -> Cost:
        plan, blocks, n = self.plan, list(size.blocks.values()), size.examples
        basis, values = (min(n, max(counts.values())) / n for counts in needed_examples(plan, size.blocks))
        columns = self._columns(size)
        # Where basis and eigenvalues are measured on the same examples, their rows are kept for the second look.
        looks = basis + (values if plan.corrected and basis != values else 0.0)
        sides = [d for block in blocks for d in matrix_shape(block.shape) if 1 < d <= plan.largest]
        each = SINGLE_EIGENDECOMPOSITION if size.number_bytes < 8 else EIGENDECOMPOSITION
        algebra = sum((each if d >= SINGLE_FROM else EIGENDECOMPOSITION) * float(d) ** 3 for d in sides)
        # Second moments of both sides, and for the eigenvalues every row turned into the basis.
        per_example = columns * sum(2.0 * block.terms * d**2 for block in blocks for d in matrix_shape(block.shape))
        return Cost(
            passes_for_rows(columns) * looks,
            algebra + 2 * per_example * looks * n,
            float(size.number_bytes) * sum(numbers_of(block.shape, plan) for block in blocks),
            passing=passing_bytes(plan, size.blocks, n, columns, size.number_bytes),
        )

    def product_cost(self, size: ProblemSize, vectors: Amount) -> Cost:
        turned = sum(float(block.numel) * sum(matrix_shape(block.shape)) for block in size.blocks.values())
        return Cost(flops=4.0 * vectors * turned)

    def answer_cost(self, size: ProblemSize, queries: Amount) -> Cost:
        # Factors are turned into the basis. What is written out is turned back, or else the training gradients' factors
        # are turned, at most at twice that cost; the residual is one of two combinations.
        flops = 0.0
        for block in size.blocks.values():
            sides = matrix_shape(block.shape)
            factors, written = block.terms * sum(float(d) ** 2 for d in sides), float(block.numel) * sum(sides)
            flops += queries * min(factors, written) + min(queries * written, 2 * size.examples * factors)
        return Cost(flops=2.0 * flops) + self.product_cost(size, min(2, queries))

    def _columns(self, size: ProblemSize) -> int:
        """How many rows per example are measured."""
        fisher = self.plan.fisher
        if fisher is None:
            return columns_by_default(size.columns, list(size.blocks.values())) or 1
        return fisher.columns(size)


@final
@dataclass(frozen=True, repr=False)
class EKFAC(AbstractKronecker):
    r"""Eigenvalue-corrected Kronecker-factored curvature: the best block-diagonal curvature in a Kronecker basis.

    For a layer with gradient G = sum_t g_t a_t^T the basis is Q_g x Q_a, the eigenvectors of E[g g^T] and E[a a^T],
    and the eigenvalues are the second moments of the gradient in that basis, Lambda = E[(Q_g^T G Q_a)^2]: no other
    choice of eigenvalues in this basis is closer to the layer's Gauss-Newton block in the Frobenius norm. Labels are
    enumerated where they are few (`GGN()`), else drawn from the model, *independently* for basis and eigenvalues:
    drawn once, the eigenvalues would be fitted to the basis' own noise.

    Cost: one forward and a few backward passes over `examples`, plus a decomposition of d^3 per side of length d.

    Args:
        fisher: whose gradients are measured: `GGN()` (exact, classes enumerated), `Fisher(samples=k)`,
            `EmpiricalFisher()` (the given labels; cheap, and not a curvature once the model fits); `None`: exact for
            at most 16 independent outputs (17 classes) without weight sharing, else `Fisher(samples=1)`.
        sharing: how the uses of a shared weight enter the basis: `Sharing.EXPAND` or `Sharing.REDUCE`.
        examples: how many training examples to measure on, spread over all; `None`: as many as the basis needs.
        largest: sides longer than this keep their coordinates as basis instead of being decomposed.
        folder: where finished blocks are kept (safetensors), found again by a fingerprint of what they are made from:
            weights, what the model computes and its code, the loss's code, data, settings and version; an interrupted
            fit goes on with the blocks that are missing. `None`: in memory, or in a temporary folder where the memory
            bound is too small for them; they are then fitted in turn.

    Raises:
        NotLikelihood: when fitted, the loss has no Fisher matrix and no other gradients were asked for.
        TooLarge: when fitted, one layer's factors are above the memory bound, or all of them above the disk's room.

    References: George et al. (2018); Grosse et al. (2023), "Studying Large Language Model Generalization with
    Influence Functions".

    >>> EKFAC(examples=1000).examples
    1000
    """

    fisher: AbstractFisher | None = None
    sharing: Sharing = Sharing.EXPAND
    examples: int | None = None
    largest: int = 8192
    folder: str | PathLike[str] | None = field(default=None, metadata={"fingerprint": False})

    def __post_init__(self) -> None:
        _check(self)

    @property
    def plan(self) -> Plan:
        return Plan(Moments.FACTORS, self.sharing, True, self.fisher, self.examples, self.largest, self.folder)


@final
@dataclass(frozen=True, repr=False)
class KFAC(AbstractKronecker):
    r"""Kronecker-factored curvature: each layer's Gauss-Newton block as E[a a^T] x E[g g^T].

    Exact for deep linear networks with squared error, for one example, and wherever inputs and output gradients are
    independent; elsewhere `EKFAC` is closer to the Gauss-Newton matrix in the same basis, for one more look at the
    gradients.

    Args:
        fisher, sharing, examples, largest, folder: as for `EKFAC`.

    References: Martens & Grosse (2015); Grosse & Martens (2016) for convolutions; Eschenhagen et al. (2023) for shared
    weights.
    """

    fisher: AbstractFisher | None = None
    sharing: Sharing = Sharing.EXPAND
    examples: int | None = None
    largest: int = 8192
    folder: str | PathLike[str] | None = field(default=None, metadata={"fingerprint": False})

    def __post_init__(self) -> None:
        _check(self)

    @property
    def plan(self) -> Plan:
        return Plan(Moments.FACTORS, self.sharing, False, self.fisher, self.examples, self.largest, self.folder)


@final
@dataclass(frozen=True, repr=False)
class Shampoo(AbstractKronecker):
    r"""Shampoo's bases, the eigenvectors of E[G G^T] and E[G^T G], with measured eigenvalues as in `EKFAC`.

    Needs the whole gradient matrix of every example, so shared weights cost more than under `EKFAC`.

    Args:
        fisher, examples, largest, folder: as for `EKFAC`.

    References: Gupta et al. (2018); Vyas et al. (2024) for the eigenvalue correction.
    """

    fisher: AbstractFisher | None = None
    examples: int | None = None
    largest: int = 8192
    folder: str | PathLike[str] | None = field(default=None, metadata={"fingerprint": False})

    def __post_init__(self) -> None:
        _check(self)

    @property
    def plan(self) -> Plan:
        return Plan(Moments.GRADIENTS, Sharing.EXPAND, True, self.fisher, self.examples, self.largest, self.folder)


def _check(given: Any) -> None:
    name = type(given).__name__
    if given.fisher is not None and not isinstance(given.fisher, AbstractFisher):
        raise InvalidInput(
            f"{name}(fisher={given.fisher!r}) does not say whose gradients are measured; pass GGN() for the exact "
            "Fisher, Fisher(samples=1) for sampled labels, or EmpiricalFisher()."
        )
    if not isinstance(getattr(given, "sharing", Sharing.EXPAND), Sharing):
        raise InvalidInput(f"{name}(sharing={given.sharing!r}) must be Sharing.EXPAND or Sharing.REDUCE.")
    if given.examples is not None:
        whole_number("examples", given.examples, owner=given)
    whole_number("largest", given.largest, owner=given)

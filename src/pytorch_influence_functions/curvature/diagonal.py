"""The exact diagonal of a curvature made of rows: the mean of their elementwise squares."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar, final

import torch
from torch import Tensor

from ..core.distributed import current
from ..core.errors import InvalidInput, NonFinite
from ..gradients.per_example import Derivatives
from ..linalg.blocks import AbstractBlock, Indexed, Outer
from ..linalg.chunks import chunks
from ..linalg.diagonal import DiagonalOperator
from ..linalg.operator import AbstractSymmetric
from .base import AbstractCurvature, Budget, Form
from .cost import Amount, Cost, ProblemSize
from .exact import GGN
from .from_rows import AbstractRowCurvature


@final
@dataclass(frozen=True, repr=False)
class Diagonal(AbstractCurvature):
    """diag(C), exact: entry p is the mean over examples of the squared entries p of C's rows.

    `curvature` is `GGN()` (all classes), `Fisher(samples)` or `EmpiricalFisher()`. What lies off the diagonal is left
    out, so this is a baseline (Kirkpatrick et al. 2017 use it for another purpose), and cheap: P numbers and as many
    passes as the curvature has rows per example. A layer used once per example has (left^2)^T (right^2) for its sum of
    squares, and no per-example gradient is written out.

    Raises `InvalidInput` for a curvature that is not made of rows, such as `Hessian()`.

    >>> Diagonal().curvature
    GGN()
    """

    curvature: AbstractRowCurvature = field(default_factory=GGN)
    forms: ClassVar[tuple[Form, ...]] = (Form.SPECTRAL,)

    def __post_init__(self) -> None:
        inner: Any = self.curvature
        if not isinstance(inner, AbstractRowCurvature):
            raise InvalidInput(
                f"Diagonal(curvature={inner!r}) needs a curvature made of rows, whose squares are its diagonal; use "
                "GGN(), Fisher(samples=1) or EmpiricalFisher()."
            )

    def of(self, derivatives: Derivatives, form: Form, budget: Budget) -> AbstractSymmetric:
        self.require(form)
        space = derivatives.space
        total = torch.zeros(space.size, dtype=torch.float64, device=derivatives.problem.device)
        self.curvature.check_objective(derivatives)
        where = space.slices
        for some in self.curvature.stream(derivatives):
            for name, block in some.blocks.items():
                total[where[name]] += sum_of_squares(block).flatten().double()
        current().sum_into(total)
        if not bool(torch.isfinite(total).all()):
            raise NonFinite("The diagonal of the curvature holds NaN or infinity; look for them in weights or data.")
        return DiagonalOperator(space, total / self.curvature.count(len(derivatives.problem)))

    def cost(self, size: ProblemSize, form: Form) -> Cost:
        squares = 2.0 * size.examples * self.curvature.columns(size) * size.parameters
        return Cost(self.curvature.cost(size, Form.GRAM).passes, squares, 8.0 * size.parameters)

    def product_cost(self, size: ProblemSize, vectors: Amount) -> Cost:
        return Cost(flops=2.0 * vectors * size.parameters)


def sum_of_squares(block: AbstractBlock) -> Tensor:
    """sum_n G_n * G_n, in the shape of the parameter block."""
    if isinstance(block, Outer) and block.terms == 1:
        return block.left[:, 0].square().T @ block.right[:, 0].square()
    if isinstance(block, Indexed) and block.index.shape[1] == 1:
        zeros = block.values.new_zeros(block.shape)
        return zeros.index_add_(0, block.index[:, 0], block.values[:, 0].square())
    total = block.reference.new_zeros(block.shape)
    for chunk in chunks(len(block), total.numel()):
        total += block.take(chunk).dense().reshape(-1, *block.shape).square().sum(0)
    return total

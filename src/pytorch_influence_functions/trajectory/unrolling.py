"""One segment of unrolled training: two functions of its curvature, exp(-t H) and (1 - exp(-t H)) / H."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from jaxtyping import Float
from torch import Tensor

from ..core.errors import InvalidInput
from ..curvature.base import AbstractCurvature, Form
from ..gradients.per_example import Derivatives
from ..linalg.dense import Eigen, Matrix
from ..linalg.operator import AbstractSpectral
from ..linalg.rows import Rows
from ..problem.checkpoints import Checkpoint
from ..problem.problem import Problem
from .segments import Segment


@dataclass(frozen=True, eq=False)
class FittedSegment:
    """A fitted segment: H over its checkpoints (P^(1/2) H P^(1/2) under Adam, with `root` = P^(1/2))."""

    segment: Segment
    members: tuple[tuple[Checkpoint, Derivatives], ...]
    operator: AbstractSpectral
    root: Float[Tensor, " p"] | None = None

    @cached_property
    def extremes(self) -> tuple[float, float]:
        return self.operator.extremes()

    @property
    def growth(self) -> float:
        """The largest exponent of S: 0 unless there is negative curvature."""
        return max(0.0, -self.extremes[0] * self.segment.span)

    @cached_property
    def _survival(self) -> AbstractSpectral:
        return self.operator.function(lambda lam: survival(lam, self.segment.span))

    @cached_property
    def _response(self) -> AbstractSpectral:
        return self.operator.function(lambda lam: response(lam, self.segment.span))

    def survives(self, rows: Rows) -> Rows:
        """S^T u: a query at this segment's end, carried to its beginning."""
        return self._between(rows, self._survival, into=1, out=-1)

    def responds(self, rows: Rows) -> Rows:
        """x with <x, g> = <u, (I - S) H^-1 g>: what a gradient during this segment does to a query at its end."""
        return self._between(rows, self._response, into=1, out=1)

    def residual(self, u: Rows) -> float:
        """|H x + S^T u - u| / (|H| |x| + |u|) for x = responds(u): of rounding size where the eigenpairs are correct.

        Relative to |u| alone, long training would look badly solved in float32: x may be `span` times as large as u.
        """
        x, flat = self.responds(u), u.flat()
        error = self._between(x, self.operator, into=-1, out=-1).flat() + self.survives(u).flat() - flat
        root = torch.ones_like(flat[0]) if self.root is None else self.root.to(flat)
        # Norms in the coordinates in which the operator is symmetric.
        high = max(abs(v) for v in self.extremes)
        scale = high * float((x.flat() / root).norm()) + float((flat * root).norm())
        return float((error * root).norm()) / scale if scale > 0 else 0.0

    def _between(self, rows: Rows, operator: AbstractSpectral, into: int, out: int) -> Rows:
        """The operator in Adam's coordinates P^(-1/2) theta, or itself where there is no Adam."""
        if self.root is None:
            return operator.apply(rows)
        space, flat = operator.space, rows.flat()
        root = self.root.to(flat.device)
        inside = (flat.double() * root**into).to(flat)
        product = operator.apply(space.rows(inside)).flat().double() * root**out
        return space.rows(product.to(flat))


def survival(values: Tensor, span: float) -> Tensor:
    """exp(-span * lam)."""
    return torch.exp(-span * values)


def response(values: Tensor, span: float) -> Tensor:
    """(1 - exp(-span * lam)) / lam, which is `span` at lam = 0; accurate for small and negative lam alike."""
    x = span * values
    safe = torch.where(x == 0, torch.ones_like(x), x)
    return span * torch.where(x == 0, torch.ones_like(x), -torch.expm1(-safe) / safe)


def form_of(curvature: AbstractCurvature, adam: bool) -> Form:
    """The form with known eigenvalues; Adam's diagonal needs every entry."""
    if adam and Form.MATRIX not in curvature.forms:
        raise InvalidInput(
            f"SOURCE's Adam form multiplies the curvature by a diagonal, and {curvature!r} has no dense matrix to "
            "multiply; use GGN() or Hessian() on a small model, or leave adam out."
        )
    if Form.SPECTRAL in curvature.forms and not adam:
        return Form.SPECTRAL
    if Form.MATRIX in curvature.forms:
        return Form.MATRIX
    raise InvalidInput(
        f"SOURCE needs all eigenvalues of the curvature and {curvature!r} gives none; use GGN(), Hessian() or a "
        "Kronecker-factored curvature."
    )


def preconditioned(operator: AbstractSpectral, root: Tensor, decay: Tensor) -> Matrix:
    """P^(1/2) H P^(1/2) + decoupled decay, which has the eigenvalues of P H + decay."""
    dense = operator.matrix if isinstance(operator, Matrix) else None
    if isinstance(operator, Eigen):
        dense = (operator.vectors * operator.values) @ operator.vectors.T
    assert dense is not None
    root = root.to(dense)
    return Matrix(operator.space, root[:, None] * dense * root[None] + decay.to(dense).diag())


def refuse_overflow(segments: Sequence[FittedSegment], problem: Problem) -> None:
    """Refuse negative curvature so large that exp(-eta K lam) overflows; it stops being a prediction long before."""
    dtype = next(iter(problem.space.values(problem.model).values())).dtype
    limit = math.log(torch.finfo(dtype).max)
    total = sum(s.growth for s in segments)
    if not math.isfinite(total) or total > limit:
        worst = max(range(len(segments)), key=lambda k: segments[k].growth)
        s = segments[worst]
        raise InvalidInput(
            f"Segment {worst + 1} of {len(segments)} has curvature {s.extremes[0]:.3g} over a training time "
            f"(learning rate x steps) of {s.segment.span:.3g}, so that exp({total:.3g}) would overflow; use GGN(), "
            "which has no negative curvature, or shorter segments."
        )

"""One segment of unrolled training: two functions of its curvature, exp(-t H) and (1 - exp(-t H)) / H."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from ..core.errors import InvalidInput
from ..curvature.base import AbstractCurvature, Form
from ..gradients.per_example import Derivatives
from ..linalg.operator import AbstractSpectral
from ..linalg.rows import Rows
from ..problem.checkpoints import Checkpoint
from ..problem.problem import Problem
from .preconditioner import AbstractPreconditioner
from .segments import Segment


@dataclass(frozen=True, eq=False)
class FittedSegment:
    """A fitted segment: H over its checkpoints (P^(1/2) H P^(1/2) under Adam, with P as `preconditioner`)."""

    segment: Segment
    members: tuple[tuple[Checkpoint, Derivatives], ...]
    operator: AbstractSpectral
    preconditioner: AbstractPreconditioner | None = None

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
        error = self.operator.space.rows(
            self._between(x, self.operator, into=-1, out=-1).flat() + self.survives(u).flat() - flat
        )
        # Norms in the coordinates in which the operator is symmetric.
        high = max(abs(v) for v in self.extremes)
        scale = high * float(self._scaled(x, -1).norm()) + float(self._scaled(u, 1).norm())
        return float(self._scaled(error, 1).norm()) / scale if scale > 0 else 0.0

    def _scaled(self, rows: Rows, power: int) -> Tensor:
        return rows.flat() if self.preconditioner is None else self.preconditioner.scaled(rows, power)

    def _between(self, rows: Rows, operator: AbstractSpectral, into: int, out: int) -> Rows:
        """The operator in Adam's coordinates P^(-1/2) theta, or itself where there is no Adam."""
        if self.preconditioner is None:
            return operator.apply(rows)
        return self.preconditioner.between(operator, rows, into, out)


def survival(values: Tensor, span: float) -> Tensor:
    """exp(-span * lam)."""
    return torch.exp(-span * values)


def response(values: Tensor, span: float) -> Tensor:
    """(1 - exp(-span * lam)) / lam, which is `span` at lam = 0; accurate for small and negative lam alike."""
    x = span * values
    safe = torch.where(x == 0, torch.ones_like(x), x)
    return span * torch.where(x == 0, torch.ones_like(x), -torch.expm1(-safe) / safe)


def form_of(curvature: AbstractCurvature, adam: bool) -> Form:
    """The form with known eigenvalues; Adam's diagonal needs every entry, or an eigenbasis in which to be diagonal."""
    if adam and Form.MATRIX not in curvature.forms and not curvature.kronecker:
        raise InvalidInput(
            f"SOURCE's Adam form multiplies the curvature by a diagonal, and {curvature!r} has neither a dense matrix "
            "nor a Kronecker eigenbasis to multiply it in; use EKFAC(), or GGN() on a small model."
        )
    if Form.SPECTRAL in curvature.forms and not (adam and Form.MATRIX in curvature.forms):
        return Form.SPECTRAL
    if Form.MATRIX in curvature.forms:
        return Form.MATRIX
    raise InvalidInput(
        f"SOURCE needs all eigenvalues of the curvature and {curvature!r} gives none; use GGN(), Hessian() or a "
        "Kronecker-factored curvature."
    )


def refuse_overflow(segments: Sequence[FittedSegment], problem: Problem) -> None:
    """Refuse negative curvature so large that exp(-eta K lam) overflows; it stops being a prediction long before."""
    dtype = problem.space.like(problem.model).dtype
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

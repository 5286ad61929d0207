"""The minimum of the edited objective, found in the outputs of the edited examples alone."""

from __future__ import annotations

from dataclasses import dataclass
from typing import final

import torch
from jaxtyping import Float
from torch import Tensor

from .local_rows import LocalRows, sum_up

_STEPS = 100
_HALVINGS = 40
# How many of the outputs' roundings of the step may be missing.
_ROUNDINGS = 1000


@final
@dataclass(frozen=True, eq=False)
class EditedMinimum:
    """Where the edited objective is least, and what it took.

    Attributes:
        coefficients: c, so that the step is start - X c with X = H^-1 J^T.
        steps: Newton steps.
        converged: whether a minimum was found.
    """

    coefficients: Float[Tensor, " m"]
    steps: int
    converged: bool

    @staticmethod
    def of(
        local: LocalRows, overlap: Float[Tensor, "m m"], start: Float[Tensor, " m"], count: int, precision: float
    ) -> EditedMinimum:
        """Newton's method with halved steps.

        The step is a combination of the columns of X, so that the outputs move by u = start - A c, A = J X, and

            F(c) = c^T A c / 2 + (1/N) sum_e w_e loss_e(u_e)

        is least where c = slope(u) / N. It is convex where taking the old quadratics out leaves the curvature positive.

        Args:
            local: the edited examples with their losses.
            overlap: A.
            start: how far the outputs move by what is no loss, such as the examples' own weight decay.
            count: N.
            precision: of the outputs, as their type's epsilon.
        """
        c = torch.zeros_like(start)
        eye = torch.eye(len(start), dtype=start.dtype, device=start.device)
        value, slope, hessian = _at(local, start, count)
        for step in range(1, _STEPS + 1):
            gap = c - slope
            direction = -torch.linalg.solve(eye + hessian @ overlap, gap)
            moved = overlap @ direction
            descent = float(moved @ gap)
            energy = float(c @ (overlap @ c))
            # The decrement is the square of what is missing; losses in the outputs' own type leave some rounding.
            missing = (_ROUNDINGS * precision) ** 2 * max(energy, float(direction @ moved))
            if abs(descent) <= missing:
                return EditedMinimum(c, step - 1, True)
            if not descent < 0:
                return EditedMinimum(c, step, False)
            size = 1.0
            for _ in range(_HALVINGS):
                trial = c + size * direction
                shifted = start - overlap @ trial
                there = _at(local, shifted, count)
                total = 0.5 * float(trial @ (overlap @ trial)) + there[0]
                if total <= value + 1e-4 * size * descent + precision * abs(value):
                    break
                size /= 2
            else:
                return EditedMinimum(c, step, False)
            c, value, (_, slope, hessian) = trial, total, there
        return EditedMinimum(c, _STEPS, False)


def _at(local: LocalRows, moves: Tensor, count: int) -> tuple[float, Tensor, Tensor]:
    value, slope, hessian = sum_up(local.losses, moves)
    return value / count, slope / count, hessian / count


def least_share_left(overlap: Float[Tensor, "m m"], hessian: Float[Tensor, "m m"]) -> float:
    """The least eigenvalue of I + B A: one minus the largest leverage of what is taken out.

    Args:
        overlap: A, [m, m], positive semidefinite.
        hessian: B, [m, m], symmetric.
    """
    touched = hessian.abs().sum(0) > 0
    if not bool(touched.any()):
        return 1.0
    values, vectors = torch.linalg.eigh(overlap[touched][:, touched])
    root = vectors * values.clamp_min(0.0).sqrt()
    block = root.T @ hessian[touched][:, touched] @ root
    return 1.0 + min(0.0, float(torch.linalg.eigvalsh(block).min()))

"""Leverage-corrected scores: one Newton step for each single removal."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import ClassVar, final

import torch

from ..gradients.per_example import Derivatives, GradientBatch, slopes
from ..linalg.rows import Rows
from ..objectives.differentiated import output_curvature
from ..problem.problem import sweep
from ..solvers.base import Solution
from .base import AbstractScaling, Solving


@final
@dataclass(frozen=True, repr=False)
class Leverage(AbstractScaling):
    r"""One Newton step for the removal of each single example, instead of the first-order term.

    With A_i = J_i (C + lambda)^-1 J_i^T and H_i the loss's Hessian in the outputs, example i's slope s_i is replaced
    by (I - H_i A_i / N)^-1 s_i; for one output that divides by 1 - leverage. Exact for ridge regression's leave-one-out
    (Sherman-Morrison). Costs one solve per example and output.

    Reference: Rubinstein & Hopkins (2025), "Rescaled Influence Functions".
    """

    first_order: ClassVar[bool] = False

    def solves_per_example(self, outputs: int) -> int:
        return outputs

    def rows(self, derivatives: Derivatives, solving: Solving) -> Iterator[GradientBatch]:
        return leverage_corrected(derivatives, solving.solve, solving.count)


def leverage_corrected(
    derivatives: Derivatives, solve: Callable[[Rows], Solution], count: int
) -> Iterator[GradientBatch]:
    """Training rows in which each example's slope is corrected for its own leverage."""
    objective = derivatives.objective
    curvature = output_curvature(objective)
    for ids, batch in sweep(derivatives.problem, label="leverages"):
        n = len(ids)
        tape = derivatives.tape(batch, n)
        outputs = tape.outputs.detach()
        objective.check(outputs, batch, ids)
        losses, slope = slopes(objective, outputs, batch, ids)
        columns = outputs[0].numel()
        units = torch.eye(columns, dtype=outputs.dtype, device=outputs.device)
        rows = [tape.rows(units[k].expand(n, -1).reshape(outputs.shape), keep_graph=True) for k in range(columns)]
        solutions = [solve(r).unwrap() for r in rows]
        a = torch.stack([torch.stack([x.rowwise(r) for x in solutions], 1) for r in rows], 1)
        hessian = curvature.output_hessian(outputs, batch).to(a)
        system = units.to(a) - hessian @ a / count
        corrected = torch.linalg.solve(system, slope.reshape(n, columns).to(a)[..., None])[..., 0]
        yield GradientBatch(ids, tape.rows(corrected.to(slope).reshape(slope.shape)), losses, batch)

"""Leverage-corrected scores: one Newton step for each single removal."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import ClassVar, final

import torch
from jaxtyping import Int
from torch import Tensor

from ..gradients.output_rows import OutputRows
from ..gradients.per_example import Derivatives, GradientBatch
from ..linalg.rows import Rows
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
        return leverage_corrected(derivatives, solving.solve, solving.count, solving.ids)


def leverage_corrected(
    derivatives: Derivatives,
    solve: Callable[[Rows], Solution],
    count: int,
    only: Int[Tensor, " n"] | None = None,
) -> Iterator[GradientBatch]:
    """Training rows in which each example's slope is corrected for its own leverage."""
    for ids, batch in sweep(derivatives.problem, ids=only, label="leverages"):
        examples = OutputRows.of(derivatives, ids, batch)
        solutions = [solve(r).unwrap() for r in examples.rows]
        a = torch.stack([torch.stack([x.rowwise(r) for x in solutions], 1) for r in examples.rows], 1)
        system = torch.eye(a.shape[-1], dtype=a.dtype, device=a.device) - examples.hessian.to(a) @ a / count
        corrected = torch.linalg.solve(system, examples.slopes.to(a)[..., None])[..., 0]
        cotangent = corrected.to(examples.slopes).reshape(examples.outputs.shape)
        yield GradientBatch(ids, examples.tape.rows(cotangent), examples.losses, batch)

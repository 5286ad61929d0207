"""Does a preconditioner pay? A few steps with and without it, on one right-hand side."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ..core.distributed import current
from ..linalg.operator import AbstractOperator
from ..linalg.rows import Rows
from ..linalg.shift import Shift
from .base import System
from .cg import CG

# Steps of either kind: enough to tell, few beside the dozens that follow for every query.
_STEPS = 4


@dataclass(frozen=True)
class PreconditionerTrial:
    """How far conjugate gradients got in as many steps: x^T b - x^T (C + D) x / 2, larger is nearer to the answer."""

    with_it: float
    without: float

    @property
    def pays(self) -> bool:
        """Whether the preconditioner got further."""
        return self.with_it > self.without

    def __str__(self) -> str:
        share = (self.with_it - self.without) / abs(self.without) if self.without else float("inf")
        return f"tried on one gradient, {_STEPS} steps got {abs(share):.0%} {'further' if share > 0 else 'less far'}"

    @staticmethod
    def of(
        operator: AbstractOperator, shift: Shift, preconditioner: AbstractOperator, row: Rows
    ) -> PreconditionerTrial:
        """Run both; decided by numbers alone, never by the clock, so that the same problem gets the same method."""
        system, b = System.of(operator, shift), row.flat()
        gains = []
        for guide in (preconditioner, None):
            solver = CG(max_steps=_STEPS)
            x = solver.solve(solver.init(operator, shift, guide), row).value.flat()
            gains.append(float((x * b).sum() - (x * system.product(x)).sum() / 2))
        first = current().broadcast(torch.tensor(gains, dtype=torch.float64), 0)
        return PreconditionerTrial(*first.tolist())

"""A solver and a projection as a user would add them: the few lines that the recipes ask for, and nothing more."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pytorch_influence_functions.gradients import AbstractProjection
from pytorch_influence_functions.linalg.rows import Rows
from pytorch_influence_functions.solvers import AbstractSolver, Result, Solution
from pytorch_influence_functions.solvers.base import System


@dataclass(frozen=True)
class MINRES(AbstractSolver[System]):
    """Minimal residuals for a positive definite system, by conjugate residuals (Stiefel 1955)."""

    rtol: float = 1e-3
    max_steps: int = 500

    def init(self, operator: Any, shift: Any, preconditioner: Any = None) -> System:
        return System.of(operator, shift)

    def solve(self, state: System, rows: Rows) -> Solution:
        b = rows.flat()
        x, r, steps = torch.zeros_like(b), b.clone(), 1
        p, ar = r.clone(), state.product(r)
        ap = ar.clone()
        while steps < self.max_steps and bool((r.norm(dim=1) > self.rtol * b.norm(dim=1)).any()):
            curved = (r * ar).sum(1, keepdim=True)
            alpha = curved / ap.square().sum(1, keepdim=True)
            x, r = x + alpha * p, r - alpha * ap
            ar = state.product(r)
            steps += 1
            beta = (r * ar).sum(1, keepdim=True) / curved
            p, ap = r + beta * p, ar + beta * ap
        residual = state.residual(x, b)
        failed = tuple((residual > 2 * self.rtol).nonzero().flatten().tolist())
        result = Result.max_steps_reached if failed else Result.successful
        return Solution(state.operator.space.rows(x), residual, result, steps, {}, failed)


@dataclass(frozen=True)
class Signs(AbstractProjection):
    """Entries +-1 / sqrt(k) (Achlioptas 2003)."""

    k: int
    per_layer: bool = False
    seed: int = 0

    def strip(self, length: int, generator: torch.Generator) -> Tensor:
        return (2.0 * torch.randint(0, 2, (length, self.k), generator=generator) - 1) / self.k**0.5

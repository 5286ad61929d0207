"""What is written down while scores are made: residuals, steps, what damping took, what truncation may cost."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ..linalg.rows import Rows
from ..linalg.shift import Shift
from ..problem.agreement import note_on_processes
from ..problem.problem import Problem
from ..scores.diagnostics import Diagnostics
from ..solvers.base import Result, Solution
from ..solvers.truncation import Truncated
from .agreement import CheckpointAgreement
from .assumptions import StationarityCheck


@dataclass(eq=False)
class RunLog:
    """Collects while scoring; read once at the end."""

    residuals: list[float] = field(default_factory=list)
    errors: list[float] = field(default_factory=list)
    """Relative errors of solutions in the norm of C + D, where the solver judged them."""
    steps: int = 0
    unsolved: int = 0
    """Queries whose solve ended before its tolerance."""
    smallest_curvature: float | None = None
    damped_shares: list[float] = field(default_factory=list)
    """Share of every query's squared gradient norm that damping takes."""
    approximation: str = ""
    residual_history: tuple[float, ...] = ()
    score_error: float = 0.0
    """The largest certified error of a score by truncation, over all checkpoints."""
    checkpoint: int = 0
    """The checkpoint at hand, counted from 0."""
    checkpoint_errors: dict[int, float] = field(default_factory=dict)
    """The largest certified error of a score by checkpoint, before its weight."""
    agreement: CheckpointAgreement = field(default_factory=CheckpointAgreement)
    """How alike the checkpoints were."""
    ranks: dict[str, int] = field(default_factory=dict)
    """Ranks that truncation kept, by block."""

    def add_solution(self, solution: Solution, rows: Rows, shift: Shift) -> None:
        """Keep what the solver says of itself, and what damping takes of each of `rows`."""
        self.residuals += [float(r) for r in solution.residual]
        self.errors += [] if solution.error is None else [float(e) for e in solution.error]
        self.unsolved += len(solution.failed) if solution.ended_early else 0
        self.steps = max(self.steps, solution.steps)
        self.approximation = str(solution.notes.get("approximation", self.approximation))
        # Of several groups of queries the slowest tells how hard the system was.
        self.residual_history = max(self.residual_history, tuple(solution.notes.get("residual_history", ())), key=len)
        smallest = solution.notes.get("smallest_curvature")
        if smallest is not None:
            known = self.smallest_curvature
            self.smallest_curvature = float(smallest) if known is None else min(known, float(smallest))
        self._add_damped_share(solution, rows, shift)

    def _add_damped_share(self, solution: Solution, rows: Rows, shift: Shift) -> None:
        """<g, D (C + D)^-1 g> / |g|^2 of every query, where D is one number and this is one inner product."""
        d = shift.uniform
        if d is None or solution.result is not Result.successful or "approximation" in solution.notes:
            return
        sizes = rows.squared_norms().double()
        damped = d * solution.value.rowwise(rows).double()
        self.damped_shares += (damped[sizes > 0] / sizes[sizes > 0]).tolist()

    def add_truncation(self, truncated: Truncated, error: Tensor) -> None:
        """Keep the ranks, and the largest bound on the error of a score at these weights."""
        self.ranks |= {k: max(r, self.ranks.get(k, 0)) for k, r in truncated.ranks.items()}
        known = self.checkpoint_errors.get(self.checkpoint, 0.0)
        self.checkpoint_errors[self.checkpoint] = max(known, float(error.max()) if error.numel() else 0.0)

    def end_checkpoints(self, weights: Sequence[float]) -> None:
        """Errors add up as scores do: every checkpoint's times its weight."""
        self.score_error = sum(abs(weights[k]) * error for k, error in self.checkpoint_errors.items())

    def notes(self) -> tuple[str, ...]:
        """What should be read with the scores, in sentences."""
        if not self.ranks:
            return ()
        kept = ", ".join(f"{name} {rank}" for name, rank in list(self.ranks.items())[:3])
        more = f" and {len(self.ranks) - 3} more" if len(self.ranks) > 3 else ""
        return (f"queries kept in low rank ({kept}{more}): no score is off by more than {self.score_error:.2g} for it",)

    def diagnostics(
        self,
        problem: Problem,
        stationarity: StationarityCheck,
        routes: Mapping[str, str],
        **facts: Any,
    ) -> Diagnostics:
        """The record that goes with the scores; `facts` are the fields of `Diagnostics` that the method knows."""
        known = [r for r in self.residuals if not math.isnan(r)]
        logged: dict[str, Any] = {
            "residual_max": max(self.residuals, default=math.nan),
            "residual_mean": sum(self.residuals) / len(self.residuals) if known else math.nan,
            "error_max": max((e for e in self.errors if not math.isnan(e)), default=math.nan),
            "steps": self.steps,
            "unsolved": self.unsolved,
            "smallest_curvature": self.smallest_curvature,
            "lost_to_damping": float(torch.tensor(self.damped_shares).median()) if self.damped_shares else math.nan,
            "approximation": self.approximation,
            "residual_history": self.residual_history,
        }
        return Diagnostics(
            n_train=len(problem),
            parameters_used=stationarity.used,
            parameters_total=stationarity.total,
            gradient_shares=stationarity.shares,
            relative_gradient=stationarity.relative_gradient,
            relative_gradient_error=stationarity.error,
            gradient_examples=stationarity.looked_at,
            loss_factor=stationarity.loss_factor,
            mode=describe_mode(problem),
            deterministic=problem.data.determinism,
            objective=problem.describe_objective(),
            reading=problem.data.reading,
            padding=problem.data.padding or "",
            routes=routes,
            **(logged | facts | {"notes": (*facts.get("notes", ()), *note_on_processes())}),
        )


def describe_mode(problem: Problem) -> str:
    """Which layers behave differently in training, in words."""
    kinds = {type(m).__name__ for m in problem.model.modules()}
    parts = []
    if any("BatchNorm" in kind for kind in kinds):
        parts.append("batch norm uses its running statistics")
    if any("Dropout" in kind for kind in kinds):
        parts.append("dropout is off")
    return "eval mode" + (": " + ", ".join(parts) if parts else "")

"""What is written down while scores are made: labels, residuals, routes, and how far the assumptions hold."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..core.errors import NonFinite, name_ids
from ..curvature.spectrum import effective
from ..linalg.density import known
from ..linalg.dual_solution import DualSolution
from ..linalg.gram import Gram
from ..linalg.operator import AbstractSpectral
from ..linalg.rows import Rows
from ..objectives.base import inputs_and_targets, label_key
from ..problem.problem import Problem
from ..scores.diagnostics import Diagnostics
from ..solvers.base import Result, Solution
from ..solvers.direct import Spectral
from ..solvers.dual import Woodbury
from ..solvers.truncation import Truncated
from .assumptions import StationarityCheck

if TYPE_CHECKING:
    from .attribution import Attribution
    from .fitted_member import FittedMember
    from .method import Fitted


@dataclass(eq=False)
class RunLog:
    """Collects while scoring; read once at the end."""

    query_labels: dict[int, Any] = field(default_factory=dict)
    train_labels: dict[int, Any] = field(default_factory=dict)
    residuals: list[float] = field(default_factory=list)
    steps: int = 0
    smallest_curvature: float | None = None
    dampings: list[float] = field(default_factory=list)
    lost: list[float] = field(default_factory=list)
    approximation: str = ""
    bound: float = 0.0
    """The largest certified error of a score by truncation, and the ranks that were kept."""
    ranks: dict[str, int] = field(default_factory=dict)
    seconds: float = 0.0
    history: tuple[float, ...] = ()

    def see_queries(self, ids: Tensor, batch: Any) -> None:
        """Keep the queries' labels."""
        self.query_labels.update(zip(ids.tolist(), labels_of(batch, len(ids)), strict=True))

    def see_training(self, ids: Tensor, batch: Any) -> None:
        """Keep the training examples' labels."""
        self.train_labels.update(zip(ids.tolist(), labels_of(batch, len(ids)), strict=True))

    def see_solution(self, solution: Solution, member: FittedMember) -> None:
        """Keep what the solver says of itself."""
        self.residuals += [float(r) for r in solution.residual]
        self.steps = max(self.steps, solution.steps)
        self.approximation = str(solution.notes.get("approximation", self.approximation))
        # Of several groups of queries the slowest tells how hard the system was.
        self.history = max(self.history, tuple(solution.notes.get("residual_history", ())), key=len)
        smallest = solution.notes.get("smallest_curvature")
        if smallest is not None:
            known = self.smallest_curvature
            self.smallest_curvature = float(smallest) if known is None else min(known, float(smallest))

    def see_lost(self, solution: Solution, rows: Rows, member: FittedMember) -> None:
        """Keep the share <g, D (C + D)^-1 g> / |g|^2 of every query, where it is one inner product."""
        d = member.shift.uniform
        if d is None or solution.result is not Result.successful or "approximation" in solution.notes:
            return
        value, size = solution.value, rows.squared_norms().double()
        taken = value.quadratic() if isinstance(value, DualSolution) else value.rowwise(rows)
        self.lost += (d * taken.double()[size > 0] / size[size > 0]).tolist()

    def diagnostics(self, fitted: Attribution, n_queries: int) -> Diagnostics:
        """Everything that was written down, as the record that goes with the scores."""
        first, members = fitted.members[0], fitted.members
        return replace(
            self.of_method(fitted, fitted.problem, first.standing, first.derivatives.routes, n_queries),
            damping=sum(m.shift.damping for m in members) / len(members),
            members=len(members),
            effective_dimension=sum(map(_effective_dimension, members)) / len(members),
            lost_to_damping=float(torch.tensor(self.lost).median()) if self.lost else math.nan,
            approximation=self.approximation,
            residual_history=self.history,
            notes=tuple(dict.fromkeys(note for m in members for note in getattr(m.operator, "notes", ())))
            + self._truncation()
            + ((fitted.spec.scaling.note,) if fitted.spec.scaling.note else ()),
        )

    def see_truncated(self, truncated: Truncated, bound: Tensor) -> None:
        """Keep the ranks, and the largest bound seen on the error of a score."""
        self.ranks |= {k: max(r, self.ranks.get(k, 0)) for k, r in truncated.ranks.items()}
        self.bound = max(self.bound, float(bound.max()) if bound.numel() else 0.0)

    def _truncation(self) -> tuple[str, ...]:
        if not self.ranks:
            return ()
        kept = ", ".join(f"{name} {rank}" for name, rank in list(self.ranks.items())[:3])
        more = f" and {len(self.ranks) - 3} more" if len(self.ranks) > 3 else ""
        return (f"queries kept in low rank ({kept}{more}): no score is off by more than {self.bound:.2g} for it",)

    def of_method(
        self, fitted: Fitted, problem: Problem, look: StationarityCheck, routes: Mapping[str, str], n_queries: int
    ) -> Diagnostics:
        """The same for any method; what only some methods have is for the caller to add."""
        return Diagnostics(
            method=fitted.method,
            why=fitted.why,
            residual_max=self.residual_max,
            residual_mean=self.residual_mean,
            steps=self.steps,
            smallest_curvature=self.smallest_curvature,
            n_train=len(problem),
            n_queries=n_queries,
            parameters_used=look.used,
            parameters_total=look.total,
            gradient_shares=look.shares,
            relative_gradient=look.relative_gradient,
            gradient_examples=look.looked_at,
            mode=batch_norm_words(problem),
            deterministic=problem.data.determinism,
            routes=routes,
            seconds=self.seconds,
        )

    @property
    def residual_max(self) -> float:
        return max(self.residuals, default=math.nan)

    @property
    def residual_mean(self) -> float:
        return sum(self.residuals) / len(self.residuals) if self.residuals else math.nan


def _effective_dimension(member: FittedMember) -> float:
    """tr(C (C + D)^-1) where the eigenvalues have been paid for; NaN elsewhere."""
    operator, d = member.operator, member.shift.uniform
    paid = operator.has_eigen if isinstance(operator, Gram) else isinstance(operator, AbstractSpectral)
    if d is None or not paid or not isinstance(member.choice.solver, (Woodbury, Spectral)):
        return math.nan
    found = known(operator)
    return math.nan if found is None else found.sum(lambda x: effective(x, d))[0]


def labels_of(batch: Any, n: int) -> list[Any]:
    """One plain label per example where targets are numbers, else None for each."""
    if isinstance(batch, Mapping) and label_key(batch) is None:
        return [None] * n  # a text that is its own target
    targets = inputs_and_targets(batch)[2]
    if isinstance(targets, Tensor) and targets.shape[:1] == (n,) and targets.numel() == n:
        return list(targets.reshape(-1).tolist())
    return [None] * n


def batch_norm_words(problem: Problem) -> str:
    """Which layers behave differently in training, in words."""
    names = {type(m).__name__ for m in problem.model.modules()}
    parts = []
    if any("BatchNorm" in k for k in names):
        parts.append("batch norm uses its running statistics")
    if any("Dropout" in k for k in names):
        parts.append("dropout is off")
    return "eval mode" + (": " + ", ".join(parts) if parts else "")


def refuse_nonfinite(values: Tensor, at: Tensor, ids: Tensor) -> None:
    """Nothing is ranked around a NaN: scores `[q, n]` of queries `at` on training examples `ids` must be finite."""
    bad = (~torch.isfinite(values)).nonzero()
    if len(bad):
        raise NonFinite(
            f"Scores of queries {name_ids(sorted(set(at[bad[:, 0].cpu()].tolist())))} are NaN or infinite at training "
            f"indices {name_ids(sorted(set(ids[bad[:, 1].cpu()].tolist())))}; look at these examples "
            "or raise the damping."
        )

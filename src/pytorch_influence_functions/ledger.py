"""What is written down while scores are made: labels, residuals, routes, and how far the assumptions hold."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .diagnostics import Diagnostics
from .errors import NonFinite, name_ids
from .gradients import Derivatives, one_by_one, slopes
from .guard import undisturbed
from .objectives import inputs_and_targets
from .problem import Problem, sweep
from .solvers import Solution
from .world import World

if TYPE_CHECKING:
    from .attribution import Attribution, Member

# Examples on which the gradient at the trained weights is looked at.
_LOOK = 256
_SHARES = 3


@dataclass(frozen=True)
class Standing:
    """How the trained weights stand: is it a minimum, and which parameters carry the gradient?"""

    relative_gradient: float
    """|mean gradient of the objective| / mean |per-example gradient|: 0 at a minimum."""
    looked_at: int
    shares: Mapping[str, float]
    """Share of the squared per-example gradient norm by block; parameters left out are under "(left out)"."""
    used: int
    total: int

    @staticmethod
    def of(derivatives: Derivatives) -> Standing:
        """Look at a few evenly spaced examples."""
        problem, space = derivatives.problem, derivatives.space
        n = len(problem)
        some = torch.arange(n) if n <= _LOOK else torch.linspace(0, n - 1, _LOOK).long()
        total: Tensor | None = None
        norms = 0.0
        for slab in derivatives.stream(ids=some, label="looking at the gradient", world=World()):
            ones = torch.ones(1, len(slab.ids), dtype=slab.rows.dtype, device=slab.rows.device)
            part = slab.rows.combine(ones).flat()[0]
            total = part if total is None else total + part
            norms += float(slab.rows.squared_norms().double().sqrt().sum())
        assert total is not None
        mean = total / len(some)
        if not problem.weight_decay.is_zero:
            here = space.from_parameters({k: v.detach()[None] for k, v in space.values(problem.model).items()})
            mean = mean + here.scaled(space.decay).flat()[0]
        relative = float(mean.norm()) * len(some) / norms if norms > 0 else 0.0
        total_count = sum(p.numel() for p in problem.model.parameters())
        return Standing(relative, len(some), _shares(derivatives), space.size, total_count)


def _shares(derivatives: Derivatives) -> dict[str, float]:
    """Squared gradient norm by block over all floating-point parameters, whether they take part or not."""
    problem, model = derivatives.problem, derivatives.problem.model
    names = [k for k, p in model.named_parameters() if p.is_floating_point()]
    count = min(_SHARES, len(problem))
    ids, batch = next(iter(sweep(problem, ids=torch.arange(count), world=World())))
    with undisturbed(model, names):
        with torch.no_grad():
            outputs = derivatives.objective.outputs(model, batch)
        _, slope = slopes(derivatives.objective, outputs, batch, ids)
        rows = one_by_one(model, derivatives.objective, names, batch, slope)
    block_of = {p: b for b, spec in derivatives.space.blocks.items() for p in spec.parameters}
    sums: dict[str, float] = {}
    for name, value in rows.items():
        key = block_of.get(name, "(left out)")
        sums[key] = sums.get(key, 0.0) + float(value.double().square().sum())
    whole = sum(sums.values())
    return {k: v / whole if whole > 0 else 0.0 for k, v in sums.items()}


@dataclass(eq=False)
class Ledger:
    """Collects while scoring; read once at the end."""

    query_labels: dict[int, Any] = field(default_factory=dict)
    train_labels: dict[int, Any] = field(default_factory=dict)
    residuals: list[float] = field(default_factory=list)
    steps: int = 0
    smallest_curvature: float | None = None
    dampings: list[float] = field(default_factory=list)
    seconds: float = 0.0

    def see_queries(self, ids: Tensor, batch: Any) -> None:
        """Keep the queries' labels."""
        self.query_labels.update(zip(ids.tolist(), labels_of(batch, len(ids)), strict=True))

    def see_training(self, ids: Tensor, batch: Any) -> None:
        """Keep the training examples' labels."""
        self.train_labels.update(zip(ids.tolist(), labels_of(batch, len(ids)), strict=True))

    def see_solution(self, solution: Solution, member: Member) -> None:
        """Keep what the solver says of itself."""
        self.residuals += [float(r) for r in solution.residual]
        self.steps = max(self.steps, solution.steps)
        smallest = solution.notes.get("smallest_curvature")
        if smallest is not None:
            known = self.smallest_curvature
            self.smallest_curvature = float(smallest) if known is None else min(known, float(smallest))

    def diagnostics(self, fitted: Attribution, queries: int) -> Diagnostics:
        """Everything that was written down, as the record that goes with the scores."""
        first, problem = fitted.members[0], fitted.problem
        look = first.standing
        return Diagnostics(
            method=fitted.method,
            why=fitted.why,
            damping=sum(m.shift.damping for m in fitted.members) / len(fitted.members),
            residual_max=self.residual_max,
            residual_mean=self.residual_mean,
            steps=self.steps,
            smallest_curvature=self.smallest_curvature,
            n_train=len(problem),
            n_queries=queries,
            parameters_used=look.used,
            parameters_total=look.total,
            gradient_shares=look.shares,
            relative_gradient=look.relative_gradient,
            gradient_examples=look.looked_at,
            mode=batch_norm_words(problem),
            deterministic=problem.data.determinism,
            routes=first.derivatives.routes,
            members=len(fitted.members),
            seconds=self.seconds,
        )

    @property
    def residual_max(self) -> float:
        return max(self.residuals, default=math.nan)

    @property
    def residual_mean(self) -> float:
        return sum(self.residuals) / len(self.residuals) if self.residuals else math.nan


def labels_of(batch: Any, n: int) -> list[Any]:
    """One plain label per example where targets are numbers, else None for each."""
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

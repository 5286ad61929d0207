"""What is written down while scores are made: labels, residuals, routes, and how far the assumptions hold."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .diagnostics import Diagnostics
from .errors import NonFinite, name_ids
from .functional import weighted_gradient
from .gradients import Derivatives, one_by_one, slopes
from .guard import undisturbed
from .objectives import inputs_and_targets
from .objectives.base import label_key
from .operators import AbstractSpectral, Expansion, Gram
from .operators.density import known
from .problem import Problem, sweep
from .rows import Rows
from .scaling import rowwise
from .solvers import Result, Solution, Spectral, Woodbury
from .spectrum import effective
from .truncation import Truncated
from .world import World

if TYPE_CHECKING:
    from .attribution import Attribution
    from .fitting import Fitted
    from .member import Member

# Examples on which the gradient at the trained weights is looked at.
_LOOK = 128
# Examples whose own gradient's length is measured.
_NORMED = 32
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
        some = _spread(len(problem), _LOOK)
        mean = _mean_gradient(derivatives, some)
        if not problem.weight_decay.is_zero:
            here = space.from_parameters({k: v.detach()[None] for k, v in space.values(problem.model).items()})
            mean = mean + here.scaled(space.decay).flat()[0]
        # One backward pass per batch tells the mean; what is typical for one example, fewer of them tell as well.
        few = derivatives.stream(ids=_spread(len(problem), _NORMED), label="looking at the gradient", world=World())
        norms = torch.cat([slab.rows.squared_norms().double().sqrt() for slab in few])
        relative = float(mean.norm()) / float(norms.mean()) if float(norms.max()) > 0 else 0.0
        total_count = sum(p.numel() for p in problem.model.parameters())
        return Standing(relative, len(some), _shares(derivatives), space.size, total_count)


def _spread(n: int, most: int) -> Tensor:
    return torch.arange(n) if n <= most else torch.linspace(0, n - 1, most).long()


def _mean_gradient(derivatives: Derivatives, some: Tensor) -> Tensor:
    """The gradient of the mean loss over `some`, flat [P], by ordinary backward passes."""
    problem, space, objective = derivatives.problem, derivatives.space, derivatives.objective
    total: list[Tensor] = []
    for ids, batch in sweep(problem, ids=some, label="looking at the gradient", world=World()):
        with undisturbed(problem.model, space.names), torch.enable_grad():
            outputs = objective.outputs(problem.model, batch)
            objective.check(outputs.detach(), batch, ids)
            _, slope = slopes(objective, outputs, batch, ids)
            part = weighted_gradient(outputs, list(space.values(problem.model).values()), slope)
        total = part if not total else [a + b for a, b in zip(total, part, strict=True)]
    mean = {k: g[None] / len(some) for k, g in zip(space.names, total, strict=True)}
    return space.from_parameters(mean).flat()[0]


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

    def see_solution(self, solution: Solution, member: Member) -> None:
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

    def see_lost(self, solution: Solution, rows: Rows, member: Member) -> None:
        """Keep the share <g, D (C + D)^-1 g> / |g|^2 of every query, where it is one inner product."""
        d = member.shift.uniform
        if d is None or solution.result is not Result.successful or "approximation" in solution.notes:
            return
        value, size = solution.value, rows.squared_norms().double()
        taken = value.quadratic() if isinstance(value, Expansion) else rowwise(value, rows)
        self.lost += (d * taken.double()[size > 0] / size[size > 0]).tolist()

    def diagnostics(self, fitted: Attribution, queries: int) -> Diagnostics:
        """Everything that was written down, as the record that goes with the scores."""
        first, members = fitted.members[0], fitted.members
        return replace(
            self.of_method(fitted, fitted.problem, first.standing, first.derivatives.routes, queries),
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
        self, fitted: Fitted, problem: Problem, look: Standing, routes: Mapping[str, str], queries: int
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
            n_queries=queries,
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


def _effective_dimension(member: Member) -> float:
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

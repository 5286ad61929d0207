"""From a problem to scores: `Influence(...).fit(problem) -> Attribution`, `.score(queries) -> Scores`."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any, TypeAlias, final

import torch
from jaxtyping import Float
from torch import Tensor

from ..core.distributed import World, current
from ..core.errors import InvalidInput
from ..curvature.base import AbstractCurvature, Budget
from ..curvature.spectrum import Spectrum, spectrum_of
from ..damping.curve import DampingCurve, FromCurve
from ..damping.rules import AbstractDamping, as_damping
from ..gradients.per_example import Derivatives, GradientBatch
from ..gradients.products import Products
from ..gradients.projections import Gaussian
from ..linalg.dual_solution import DualSolution
from ..linalg.rows import Route, Rows
from ..objectives.base import AbstractObjective
from ..problem.data import Source
from ..problem.problem import Problem, sweep
from ..scaling.base import AbstractScaling, Raw, Solving
from ..scores.scores import Scores
from ..solvers.auto import Auto, Forecast, ProblemSize, forecast
from ..solvers.base import AbstractSolver
from ..solvers.cg import CG
from ..solvers.neumann import Neumann
from ..solvers.truncation import Truncation
from .checks import as_weights, check_parts, check_problem, check_top, check_weights_fit, in_queries
from .fitted_member import FittedMember, choice_of, fit_member, gradient_route, initialised, words_of
from .method import AbstractMethod, as_scores, resolved_measure, weights_of
from .run_log import RunLog, refuse_nonfinite
from .tokens import TokenScores, check_tokens
from .topk import TopK

Solved: TypeAlias = Rows | DualSolution

# Share of the memory budget that solved queries, with what the solver holds beside each, may take.
_QUERY_SHARE = 1 / 4
# Vectors an iterative solver holds per query beside the answer; a direct one holds none.
_ITERATED = 3
# Up to this many queries one forward-mode pass per query is cheaper than rows for layers without a rule.
_FORWARD_QUERIES = 8


@final
@dataclass(frozen=True)
class Influence(AbstractMethod):
    r"""A method: `score[q, i] = (1/N) <(C + lambda)^-1 grad m(q), grad loss(i)>`.

    Args:
        curvature: which matrix C is; `None` lets `Auto` choose.
        solver: how (C + lambda) x = b is solved.
        damping: `Relative(share)` of the mean eigenvalue, `Absolute(value)`, `FromTraining(lr, steps)` or a number;
            `None`: `default_damping(solver, curvature)`.
        preconditioner: a curvature whose damped inverse speeds up `CG` or `Neumann`.
        scaling: what becomes of the raw scores; `Leverage()` corrects the first-order underestimate.
        memory: the most bytes that curvature and solved queries may take, `Budget(bytes)` or a number.
        route: force one route for inner products; see `Route`.
        truncation: keep solved queries in low rank, with a certified bound on every score's error.
        projection: `Gaussian(k)` projects every gradient to k numbers first; `None`: none does.
        weights: one number per checkpoint that multiplies its scores before they are added up; `None`: their mean.

    The record's `repr` is the provenance carried by every result. Making one computes nothing.

    Reference: Koh & Liang (2017), "Understanding Black-box Predictions via Influence Functions".

    >>> Influence(damping=0.01).damping
    Absolute(value=0.01)
    """

    curvature: AbstractCurvature | None = None
    solver: AbstractSolver[Any] | Auto = field(default_factory=Auto)
    damping: AbstractDamping | float | None = None
    preconditioner: AbstractCurvature | None = None
    scaling: AbstractScaling = field(default_factory=Raw)
    memory: Budget | int = field(default_factory=Budget)
    route: Route | str | None = None
    truncation: Truncation | None = None
    weights: tuple[float, ...] | None = None
    projection: Gaussian | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "memory", Budget.of(self.memory))
        check_parts(self)
        object.__setattr__(self, "damping", None if self.damping is None else as_damping(self.damping))
        object.__setattr__(self, "route", Route.of(self.route))
        object.__setattr__(self, "weights", as_weights(self.weights))

    def fit(self, problem: Problem, n_queries: int = 1) -> Attribution:
        """Do the work that does not depend on the queries, once per checkpoint.

        `n_queries` is how many are expected; it only guides `Auto`.
        """
        start = time.perf_counter()
        check_problem(problem)
        check_weights_fit(self.weights, len(problem.checkpoints))
        members = tuple(fit_member(self, problem, c, n_queries) for c in (problem.checkpoints or (None,)))
        return Attribution(self, problem, members, time.perf_counter() - start)

    def forecast(self, problem: Problem, n_queries: int = 1) -> Forecast:
        """What `fit` and `score` would cost; runs one batch."""
        check_problem(problem)
        with weights_of(problem, problem.checkpoints[0] if problem.checkpoints else None):
            derivatives = Derivatives.of(problem, gradient_route(self))
            facts = ProblemSize.of(derivatives, n_queries)
        choice = choice_of(self, facts)
        times = max(1, len(problem.checkpoints))
        one = forecast(choice, facts, words_of(self, choice))
        return replace(one, passes=one.passes * times, seconds=one.seconds * times)


@dataclass(frozen=True, eq=False)
class Attribution:
    """A fitted method: curvature and solver are ready, any number of queries may follow."""

    spec: Influence
    problem: Problem
    members: tuple[FittedMember, ...]
    fit_seconds: float = 0.0

    @property
    def why(self) -> str:
        """Why this curvature and solver: `Auto`'s reason, or that they were asked for."""
        return self.members[0].choice.why

    @property
    def method(self) -> str:
        """The composition in use, as it would be written."""
        return words_of(self.spec, self.members[0].choice)

    def with_damping(self, damping: AbstractDamping | float) -> Attribution:
        """The same fit under another damping: nothing but the solver's own preparation is repeated."""
        spec = replace(self.spec, damping=damping)
        members = []
        for m in self.members:
            with weights_of(self.problem, m.checkpoint):
                members.append(initialised(spec, m))
        return Attribution(spec, self.problem, tuple(members), self.fit_seconds)

    def scores_over_damping(self, queries: Any, lambdas: Any, measure: Any = None) -> dict[float, Scores]:
        """Scores for every damping value in `lambdas` (absolute), without refitting."""
        try:
            values = [float(x) for x in lambdas]
        except (TypeError, ValueError) as cause:
            raise InvalidInput(
                f"path() takes several damping values, numbers such as [0.01, 0.1], got {lambdas!r}."
            ) from cause
        return {x: self.with_damping(x).score(queries, measure) for x in values}

    def damping_curve(self, held_out: Any = None, lambdas: Any = None, checkpoint: int = 0) -> DampingCurve:
        """The curve on which `FromCurve(held_out, lambdas)` would choose lambda, for one of the checkpoints."""
        member = self._member(checkpoint)
        with weights_of(self.problem, member.checkpoint):
            return FromCurve(held_out, lambdas).path(member)

    def spectrum(
        self,
        queries: Any = None,
        measure: Any = None,
        checkpoint: int = 0,
        steps: int = 30,
        probes: int = 8,
        seed: int = 0,
    ) -> Spectrum:
        """The curvature's spectrum beside the damping, and what damping leaves of the queries' gradients.

        Exact where the eigenvalues are at hand or one decomposition of the dual gives them; otherwise `steps` products
        with `probes` random vectors, with standard errors. See `Spectrum`.
        """
        member = self._member(checkpoint)
        with weights_of(self.problem, member.checkpoint):
            like = next(iter(member.derivatives.whole.values(self.problem.model).values()))
            lost = None if queries is None else self._lost(member, queries, measure)
            return spectrum_of(member.operator, member.shift, like, lost, steps, probes, seed)

    def score(self, queries: Any, measure: Any = None, top: int | None = None, batch_size: int | None = None) -> Scores:
        """Predicted change of the measure on every query when each training example is removed.

        Args:
            queries: a Dataset, DataLoader, tensors or arrays `(x, y)`.
            measure: what is measured on a query, an objective or loss; `None`: the training objective.
            top: keep only the k most helpful and k most harmful examples per query.

        Returns:
            `Scores` of shape (queries, N), averaged over the problem's checkpoints or summed with `weights`.

        Raises:
            SolveFailed: a solve did not converge; the message says why and what to change.
            NonFinite: a gradient or score is NaN or infinite; the indices are named.
        """
        start = time.perf_counter()
        check_top(top)
        with in_queries():
            source = Source.of(queries, self.problem.batch_size if batch_size is None else batch_size)
        objective = self._measure(measure, source)
        alone = len(self.members) == 1 and current().size == 1
        merged = TopK(len(source), top) if top is not None and alone else None
        total = None if merged is not None else torch.zeros(len(source), len(self.problem), dtype=torch.float64)
        ledger = RunLog()
        for weight, member in zip(self._weights, self.members, strict=True):
            with weights_of(self.problem, member.checkpoint):
                for at, ids, values in self._blocks(member, source, objective, ledger):
                    refuse_nonfinite(values, at, ids)
                    if merged is not None:
                        merged.add(at, ids, values if weight == 1.0 else values * weight)
                    elif total is not None:
                        total[at[:, None], ids[None]] += values.double().cpu() * weight
        if total is not None:
            total = current().all_sum(total)
        ledger.seconds = self.fit_seconds + time.perf_counter() - start
        return self._scores(total, merged, objective, source, ledger, top)

    def self_influence(self) -> Float[Tensor, " n"]:
        """Self-influence of every training example, (1/N) g_i^T (C + lambda)^-1 g_i, shape [N]; large = suspicious.

        Always >= 0 for a positive semidefinite curvature. Averaged over checkpoints.
        """
        total = torch.zeros(len(self.problem), dtype=torch.float64)
        for weight, member in zip(self._weights, self.members, strict=True):
            with weights_of(self.problem, member.checkpoint):
                total += self._own(member) * weight
        return total

    def token_scores(self, queries: Any, ids: Any, measure: Any = None) -> dict[int, Float[Tensor, "q l"]]:
        """Every token's share of the scores of a few training texts.

        A text's loss is a sum over the tokens it teaches, so its score is too: position t holds the part that teaching
        token t has. One forward-mode pass per query and text, exact.

        Args:
            queries, measure: as for `score`.
            ids: positions of the texts in the training dataset; each is visited once per group of queries.

        Returns:
            index -> float64 [queries, tokens], in the same units as `score`; a row adds up to the text's score (without
            the term of a weight decay that every example carries). Positions that do not count hold 0.

        Raises:
            InvalidInput: the training loss is not `TokenCrossEntropy`, gradients are projected or rescaled, an index is
                outside the data, or the model supports neither forward mode nor a double backward.

        Reference: Grosse et al. (2023), "Studying Large Language Model Generalization with Influence Functions", §5.
        """
        with in_queries():
            source = Source.of(queries, self.problem.batch_size)
        check_tokens(self.members[0].derivatives, self.spec.scaling)
        found, objective = TokenScores(self.problem, ids, len(source)), self._measure(measure, source)
        for weight, member in zip(self._weights, self.members, strict=True):
            with weights_of(self.problem, member.checkpoint):
                for at, solved in self._solved(member, source, objective, RunLog()):
                    found.add(member.derivatives, at, solved, weight)
        return found.values

    # ---------------------------------------------------------------- inner workings

    @property
    def _weights(self) -> tuple[float, ...]:
        """What each checkpoint's scores are multiplied by before they are added up."""
        return self.spec.weights or (1.0 / len(self.members),) * len(self.members)

    def _lost(self, member: FittedMember, queries: Any, measure: Any) -> Tensor:
        """<g, D (C + D)^-1 g> / |g|^2 for every query."""
        with in_queries():
            source = Source.of(queries, self.problem.batch_size)
        out = torch.zeros(len(source), dtype=torch.float64)
        objective = self._measure(measure, source)
        for slab in member.derivatives.stream(source, objective, label="query gradients", world=World()):
            for part in torch.split(torch.arange(len(slab.ids)), self._room(member)):
                rows = slab.rows.take(part)
                solved, size = member.solve(rows).unwrap(), rows.squared_norms().double()
                taken = solved.rowwise(member.shift.apply(rows)).double()
                out[slab.ids[part]] = torch.where(size > 0, taken / size, torch.zeros_like(size)).cpu()
        return out

    def _member(self, checkpoint: Any) -> FittedMember:
        if isinstance(checkpoint, bool) or not isinstance(checkpoint, int) or not 0 <= checkpoint < len(self.members):
            known = f"{len(self.members)} checkpoint{'' if len(self.members) == 1 else 's'}"
            raise InvalidInput(f"checkpoint={checkpoint!r} is none of the {known}; count from 0.")
        return self.members[checkpoint]

    def _own(self, member: FittedMember) -> Tensor:
        n = len(self.problem)
        out = torch.zeros(n, dtype=torch.float64)
        stored = member.stored
        if stored is not None:
            leverages = getattr(member.choice.solver, "leverages", None)
            if leverages is not None:
                return torch.as_tensor(leverages(member.state)).double().cpu()
        for slab in member.derivatives.stream(label="self-influence", world=World()):
            for part in torch.split(torch.arange(len(slab.ids)), self._room(member)):
                rows = slab.rows.take(part)
                out[slab.ids[part]] = member.choice.solver.quadratic(member.state, rows).double().cpu() / n
        return out

    def _measure(self, measure: Any, source: Source) -> AbstractObjective:
        return resolved_measure(self.problem, self.members[0].derivatives.objective, measure, source)

    def _room(self, member: FittedMember) -> int:
        """How many solved vectors fit the memory budget at once."""
        values = member.derivatives.whole.values(self.problem.model).values()
        each = member.derivatives.space.size * max(p.element_size() for p in values)
        if isinstance(member.choice.solver, (CG, Neumann)):
            each *= 1 + _ITERATED
        return max(1, int(Budget.of(self.spec.memory).bytes * _QUERY_SHARE / each))

    def _blocks(
        self, member: FittedMember, source: Source, objective: AbstractObjective, ledger: RunLog
    ) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """(query indices, training ids, scores) piece by piece: queries are solved once, the data streams past."""
        n = len(self.problem)
        for at, solved in self._solved(member, source, objective, ledger):
            constant = self._decay_term(member, solved)
            for ids, values in self._against_training(member, solved, len(at), ledger):
                yield at, ids, (values if constant is None else values + constant[:, None]) / n

    def _solved(
        self, member: FittedMember, source: Source, objective: AbstractObjective, ledger: RunLog
    ) -> Iterator[tuple[Tensor, Solved]]:
        """Query rows, solved in groups as large as memory allows."""
        for at, rows in self._groups(member, source, objective, ledger):
            solved = self._solve(member, rows, ledger)
            del rows  # while the data streams past, nobody holds the unsolved rows
            yield at, solved

    def _groups(
        self, member: FittedMember, source: Source, objective: AbstractObjective, ledger: RunLog
    ) -> Iterator[tuple[Tensor, Rows]]:
        """Query rows in groups of `_room`, whatever the batches: each group costs a pass over the training data."""
        room, filled = self._room(member), 0
        held: list[tuple[Tensor, Rows]] = []
        slabs = member.derivatives.stream(source, objective, label="query gradients", world=World())
        while True:
            with in_queries():
                slab = next(slabs, None)
            if slab is None:
                break
            ledger.see_queries(slab.ids, slab.batch)
            at, n = 0, len(slab.ids)
            while at < n:
                part = slice(at, at + min(n - at, room - filled))
                held.append((slab.ids[part], slab.rows.take(part)))
                at, filled = part.stop, filled + part.stop - part.start
                if filled == room:
                    yield _joined(held)
                    filled = 0
            del slab
        if held:
            yield _joined(held)

    def _solve(self, member: FittedMember, rows: Rows, ledger: RunLog) -> Solved:
        solution = member.solve(rows)
        ledger.see_solution(solution, member)
        ledger.see_lost(solution, rows, member)
        factors = self.spec.scaling.query_factors(rows)
        return solution.unwrap() if factors is None else solution.unwrap().scaled(factors)

    def _decay_term(self, member: FittedMember, solved: Solved) -> Tensor | None:
        """<x, weight decay * theta>: only where every example carries its own penalty."""
        if not self.problem.weight_decay.per_example or self.problem.weight_decay.is_zero:
            return None
        space = member.derivatives.space
        values = space.values(self.problem.model)
        here = space.from_parameters({k: v.detach()[None] for k, v in values.items()})
        return solved.inner(here.scaled(space.decay))[:, 0]

    def _against_training(
        self, member: FittedMember, solved: Solved, n_queries: int, ledger: RunLog
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """(training ids, <solved, training rows> [q, n]) over the training data, once."""
        stored, route, d = member.stored, Route.of(self.spec.route), member.derivatives
        world = current()
        if stored is not None and self.spec.scaling.first_order:
            self._see_labels(member, ledger)
            ids = torch.arange(len(stored))
            # Every rank holds all stored rows; one of them speaks.
            if world.rank == 0:
                yield ids, solved.inner(stored)
        elif isinstance(solved, Rows) and self._by_forward_mode(d, route, n_queries):
            yield from self._forward(d, solved, ledger)
        else:
            truncated = None
            if self.spec.truncation is not None and isinstance(solved, Rows):
                truncated = self.spec.truncation.of(solved)
                solved = truncated.rows
            for slab in self._training_rows(member):
                ledger.see_training(slab.ids, slab.batch)
                if truncated is not None:
                    ledger.see_truncated(truncated, truncated.bound(slab.rows) / len(self.problem))
                if isinstance(solved, DualSolution):
                    yield slab.ids, solved.inner(slab.rows, route)
                else:
                    yield slab.ids, slab.rows.inner(solved, route).T

    def _see_labels(self, member: FittedMember, ledger: RunLog) -> None:
        if not ledger.train_labels:
            for ids, batch in sweep(self.problem, label="labels", world=World()):
                ledger.see_training(ids, batch)

    def _training_rows(self, member: FittedMember) -> Iterator[GradientBatch]:
        solver, state = member.choice.solver, member.state
        solving = Solving(member.solve, lambda rows: solver.quadratic(state, rows), len(self.problem))
        return self.spec.scaling.rows(member.derivatives, solving)

    def _by_forward_mode(self, d: Derivatives, route: Route, n_queries: int) -> bool:
        if route is Route.FORWARD:
            if not self.spec.scaling.first_order:
                raise InvalidInput(
                    "route='forward' makes no rows, which this scaling needs; leave the route to 'auto'."
                )
            return True
        ruleless = bool(d.vmapped or d.looped) and d.projector is None
        return route is Route.AUTO and ruleless and n_queries <= _FORWARD_QUERIES and self.spec.scaling.first_order

    def _forward(self, d: Derivatives, solved: Rows, ledger: RunLog) -> Iterator[tuple[Tensor, Tensor]]:
        products: Products | None = None
        for ids, batch in sweep(self.problem, label="scoring (forward mode)"):
            products = products or Products.of(d, batch, len(ids))
            ledger.see_training(ids, batch)
            yield ids, products.losses_along(ids, batch, solved).T

    def _scores(
        self,
        total: Tensor | None,
        merged: TopK | None,
        objective: AbstractObjective,
        source: Source,
        ledger: RunLog,
        top: int | None,
    ) -> Scores:
        found = total if merged is None else merged
        assert found is not None
        diagnostics = ledger.diagnostics(self, len(source))
        scores = as_scores(self.problem, found, objective, source, ledger, diagnostics)
        return scores if top is None or merged is not None else scores.top(top)


def _joined(held: list[tuple[Tensor, Rows]]) -> tuple[Tensor, Rows]:
    """All parts as one, and the list emptied: it must not keep them alive."""
    ids, rows = torch.cat([i for i, _ in held]), Rows.cat([r for _, r in held])
    held.clear()
    return ids, rows

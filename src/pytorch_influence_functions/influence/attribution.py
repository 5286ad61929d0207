"""From a problem to scores: `Influence(...).fit(problem) -> Attribution`, `.score(queries) -> Scores`."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, final

import torch
from jaxtyping import Float
from torch import Tensor

from ..core.distributed import World, current
from ..core.errors import InvalidInput, NotLikelihood
from ..core.notebook import html_table
from ..core.records import Record
from ..core.validate import whole_number
from ..curvature.base import AbstractCurvature, Budget
from ..curvature.cost import ProblemSize
from ..curvature.spectrum import Spectrum, spectrum_of
from ..damping.curve import DampingCurve, FromCurve
from ..damping.rules import AbstractDamping, as_damping
from ..gradients.per_example import Derivatives
from ..gradients.projections import AbstractReduction
from ..linalg.rows import Route, Rows
from ..problem.agreement import agree_on_problem, entry, in_common
from ..problem.checkpoints import at_checkpoint
from ..problem.fitted_weights import FittedWeights
from ..problem.problem import Problem
from ..problem.working_precision import copied_bytes, in_working_precision
from ..scaling.base import AbstractScaling, Raw
from ..scores.diagnostics import Diagnostics
from ..scores.scores import Scores
from ..scores.top_tokens import TopTokens
from ..solvers.auto import Auto
from ..solvers.base import AbstractSolver
from ..solvers.forecast import Composition, Forecast, estimate_cost, time_product
from ..solvers.truncation import Truncation
from .abstract_attribution import AbstractAttribution
from .agreement import Units
from .assumptions import StationarityCheck, sample_size
from .averaging import CheckpointAverage, held_in_average
from .checks import (
    as_weights,
    check_parts,
    check_problem,
    check_projectable,
    check_top,
    check_units,
    check_weights_fit,
)
from .composing import chooses_curvature, compose
from .fitted_member import FittedMember
from .member_fits import ChangeDamping, FitMember
from .members import Members
from .method import AbstractMethod
from .parts import Parts
from .question import Question, take_sides
from .rounds import Rounds
from .run_log import RunLog
from .scoring import ScoringPass
from .tokens import TokenScores, check_tokens, checked_ids
from .top_tokens import TokenExtremes


@final
@dataclass(frozen=True, repr=False)
class Influence(Record, AbstractMethod):
    r"""A method: `score[q, i] = (1/N) <(C + lambda)^-1 grad m(q), grad loss(i)>`.

    Args:
        curvature: which matrix C is; `None` lets `Auto` choose.
        solver: how (C + lambda) x = b is solved.
        damping: `Relative(share)` of the mean eigenvalue, `PerDirection(share)`, `Absolute(value)`,
            `FromTraining(lr, steps)` or a number; `None`: the default of the choice, or of curvature and solver.
        preconditioner: a curvature whose damped inverse speeds up `CG` or `Neumann`.
        scaling: what becomes of the raw scores; `Leverage()` corrects the first-order underestimate.
        memory: the most that curvature, solver and solved queries may take: bytes, or words such as `"8GB"`.
        route: force one route for inner products; see `Route`.
        truncation: keep solved queries in low rank, with a certified bound on every score's error.
        projection: `Sketch(k)` makes k numbers of every gradient first, `TwoSided(k_in)` k_in x k_in of every layer's,
            the dense `Gaussian(k)` k again; `None`: none does.
        precision: `"bf16"`: forward and backward passes and the products of scoring are computed in bfloat16; sums and
            products with a curvature that a solver repeats in float32, eigendecompositions in float64; `None`: float32,
            or the model's precision where that is more. Weights in half precision are computed in float32, on a copy.
        weights: one number per checkpoint that multiplies its scores before they are added up; `None`: their mean.
        units: in which units the scores of several checkpoints are averaged: `"raw"`, as they are, or `"spread"` or
            `"final"`, each in units of the standard deviation of its query's row; see `ptif.methods.along`.

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
    memory: Budget | int | str = field(default_factory=Budget)
    route: Route | str | None = Route.AUTO
    truncation: Truncation | None = None
    weights: tuple[float, ...] | None = None
    projection: AbstractReduction | None = None
    precision: str | None = None
    units: Units | str = Units.RAW

    def __post_init__(self) -> None:
        object.__setattr__(self, "memory", Budget.of(self.memory))
        check_parts(self)
        object.__setattr__(self, "damping", None if self.damping is None else as_damping(self.damping))
        object.__setattr__(self, "route", Route.of(self.route))
        object.__setattr__(self, "weights", as_weights(self.weights))
        object.__setattr__(self, "units", Units.of(self.units))
        check_units(self)

    @entry
    def fit(self, problem: Problem, n_queries: int = 1) -> Attribution:
        """Do the work that does not depend on the queries, once per checkpoint.

        Args:
            problem: model, loss and training data.
            n_queries: how many are expected; it only guides `Auto`.
        """
        start = time.perf_counter()
        check_problem(problem)
        check_weights_fit(self.weights, len(problem.checkpoints))
        agree_on_problem(problem, self)
        given, problem = problem, in_working_precision(problem, self.precision)
        checkpoints, budget = problem.checkpoints or (None,), Budget.of(self.memory)
        # Of several checkpoints the last is the trained model. How gradients are taken, and with which composition, is
        # the same for all.
        with at_checkpoint(problem.model, checkpoints[-1]):
            derivatives = self._derivatives(problem)
            if self.curvature is not None and self.projection is None:
                self.curvature.check_size(derivatives, budget)
            stationarity = StationarityCheck.of(derivatives)
            if self.projection is not None:
                derivatives = derivatives.with_projection(self.projection)
        try:
            members = self._fit_members(derivatives, n_queries)
        except NotLikelihood as obstacle:
            # Of an example that the choice had not looked at. Processes that share the examples do not all meet it.
            if not chooses_curvature(self) or current().size > 1:
                raise
            members = self._fit_members(derivatives, n_queries, obstacle)
        fitted_at = FittedWeights.of(given)
        return Attribution(self, problem, members, stationarity, time.perf_counter() - start, fitted_at)

    def _fit_members(self, derivatives: Derivatives, n_queries: int, obstacle: NotLikelihood | None = None) -> Members:
        """Compose for the trained model, and fit every checkpoint with that."""
        problem, budget = derivatives.problem, Budget.of(self.memory)
        checkpoints = problem.checkpoints or (None,)
        with at_checkpoint(problem.model, checkpoints[-1]):
            composition = compose(self, derivatives, n_queries, obstacle=obstacle)
            check_projectable(self, problem, composition)
            current().agree(lambda: {"the choice for this problem": in_common(self.describe(composition))})
        rule, insists = self._damping_of(composition), self.preconditioner is not None
        fit_one = FitMember(checkpoints, derivatives, composition, rule, budget, insists)
        return Members.fit(fit_one, len(checkpoints), budget)

    @entry
    def forecast(self, problem: Problem, n_queries: int = 1, top: int | None = None) -> Forecast:
        """What `fit` and `score` would cost; runs one batch.

        Args:
            problem: model, loss and training data.
            n_queries: how many queries there will be.
            top: how many scores are kept of every query at either end, as in `score`; `None`: all.
        """
        check_problem(problem)
        check_top(top)
        given, problem = problem, in_working_precision(problem, self.precision)
        with at_checkpoint(problem.model, problem.checkpoints[0] if problem.checkpoints else None):
            start = time.perf_counter()
            derivatives = self._derivatives(problem)
            preparing = current().largest(time.perf_counter() - start)
            if self.projection is not None:
                derivatives = derivatives.with_projection(self.projection)
            size = replace(ProblemSize.of(derivatives, n_queries), top=top)
            composition = compose(self, derivatives, n_queries, size)
            rule, memory = self._damping_of(composition), Budget.of(self.memory)
            size = time_product(composition, derivatives, size, memory, rule)
        times = max(1, len(problem.checkpoints))
        solves, described = self.scaling.solves_per_example(size.columns), self.describe(composition)
        looked_at = sample_size(len(problem), derivatives.numbers or problem.space.size)
        costs = estimate_cost(composition, size, described, memory, rule, solves, looked_at, times)
        averaged = held_in_average(Units.of(self.units), times, n_queries, len(problem))
        held = costs.memory_bytes + copied_bytes(given, problem) + averaged
        return replace(costs, seconds=costs.seconds + preparing, memory_bytes=held)

    def _derivatives(self, problem: Problem) -> Derivatives:
        """How per-example gradients are taken, as far as the record forces that, and within its memory."""
        route = Route.of(self.route) if self.route in (Route.VMAP, Route.LOOP) else Route.AUTO
        return replace(Derivatives.of(problem, route), memory=Budget.of(self.memory).bytes)

    def _damping_of(self, composition: Composition) -> AbstractDamping:
        """The damping rule: the record's, or the solver's default."""
        return composition.default_damping if self.damping is None else as_damping(self.damping)

    def describe(self, composition: Composition) -> str:
        """The composition in use, as it would be written.

        Args:
            composition: curvature, solver and preconditioner, as they were asked for or chosen.
        """
        parts = [repr(composition.curvature), repr(composition.solver), f"damping={self._damping_of(composition)!r}"]
        optional = {
            "preconditioner": composition.preconditioner,
            "scaling": None if self.scaling == Raw() else self.scaling,
            "projection": self.projection,
            "weights": self.weights,
            "units": None if self.units is Units.RAW else Units.of(self.units).value,
            "truncation": self.truncation,
            "precision": self.precision,
        }
        parts += [f"{name}={value!r}" for name, value in optional.items() if value is not None]
        return f"Influence({', '.join(parts)})"


@dataclass(frozen=True, eq=False)
class Attribution(AbstractAttribution):
    """A fitted method: curvature and solver are ready, any number of queries may follow.

    `Influence(...).fit(problem)` makes one.

    Attributes:
        spec: the method.
        problem: model, loss and training data.
        members: the fitted curvature and solver, one per checkpoint; see `Members`.
        stationarity: how the last checkpoint's weights stand: is it a minimum?
        fit_seconds: how long the fit took.
        fitted_at: the model's weights then; those of now have to be the same, where there are no checkpoints.
        run_notes: what is told of the training run that the checkpoints come from, if they do.
    """

    spec: Influence
    problem: Problem
    members: Members
    stationarity: StationarityCheck
    fit_seconds: float = 0.0
    fitted_at: FittedWeights = FittedWeights()
    run_notes: tuple[str, ...] = ()

    @property
    def why(self) -> str:
        """Why this curvature and solver: `Auto`'s reason, or that they were asked for."""
        return self.members[0].composition.why

    @property
    def method(self) -> str:
        """The composition in use, as it would be written."""
        return self.spec.describe(self.members[0].composition)

    def __repr__(self) -> str:
        several = f", {len(self.members)} checkpoints" if len(self.members) > 1 else ""
        return f"Attribution({self.method}, {len(self.problem):,} examples{several})"

    def _repr_html_(self) -> str:
        dampings = ", ".join(f"{m.shift.damping:.3g}" for m in self.members[:8])
        rows = [("method", self.method), ("why", self.why), ("problem", repr(self.problem)), ("lambda", dampings)]
        rows += [("checkpoints", str(len(self.members)))] if len(self.members) > 1 else []
        rows += [("fit", f"{self.fit_seconds:.3g} s"), ("next", "score(queries), self_influence()")]
        return html_table(rows, title="Attribution")

    @entry
    def self_influence(self) -> Float[Tensor, " n"]:
        """Self-influence of every training example, (1/N) g_i^T (C + lambda)^-1 g_i, shape [N]; large = suspicious.

        Always >= 0 for a positive semidefinite curvature. Averaged over checkpoints as one row of scores, in `units`.
        Where a loader's sampler chose a part of the dataset, N is the whole dataset, and the examples that were left
        out hold 0.
        """
        self.fitted_at.check()
        everyone, row = torch.arange(len(self.problem)), torch.zeros(1, dtype=torch.long)
        average = CheckpointAverage(Units.of(self.spec.units), self._weights, 1, len(self.problem), World())
        for member in self.members:
            with at_checkpoint(self.problem.model, member.checkpoint):
                average.add(row, everyone, member.self_influence(Budget.of(self.spec.memory))[None])
            average.end_checkpoint()
        return self.problem.data.spread(average.result()[0])

    @entry
    def token_scores(self, queries: Any, ids: Any, measure: Any = None) -> dict[int, Float[Tensor, "q l"]]:
        """Every token's share of the scores of a few training texts.

        A text's loss is a sum over the tokens it teaches, so its score is too: position t holds the part that teaching
        token t has. One forward-mode pass per query and text, exact; where checkpoints are averaged in units of their
        spread, also one scoring pass per checkpoint, which measures it.

        Args:
            queries: as for `score`.
            ids: positions of the texts in the training dataset; each is visited once per group of queries.
            measure: as for `score`.

        Returns:
            index -> float64 [queries, tokens], in the same units as `score`; a row adds up to the text's score (without
            the term of a weight decay that every example carries). Positions that do not count hold 0.

        Raises:
            InvalidInput: the training loss is not `TokenCrossEntropy`, gradients are projected or rescaled, an index is
                outside the data, or the model supports neither forward mode nor a double backward.

        Reference: Grosse et al. (2023), "Studying Large Language Model Generalization with Influence Functions", §5.
        """
        question = self._question(queries, measure)
        check_tokens(self._derivatives, self.spec.scaling, "token_scores")
        tokens = TokenScores(self.problem, ids, len(question))
        self._follow(question, tokens.add)
        return tokens.everyones()

    @entry
    def top_tokens(
        self, queries: Any, k: int = 10, measure: Any = None, ids: Any = None, contrast: Any = None
    ) -> TopTokens:
        """The tokens of *all* training texts that help and harm each query most.

        The same numbers as `token_scores`, of every text: a pass over the texts for each query, forward in mode, that
        costs about as much as two or three of its forward passes; k tokens of either side are held. Where checkpoints
        are averaged, the sums of all tokens are held until the last of them.

        Args:
            queries, measure, contrast: as for `score`; queries that are pairs (`ptif.hf.query(against=…)`) are
                contrasted by themselves.
            k: how many of either side are kept for each query.
            ids: the texts that are looked at, as positions in the training dataset; `None`: all.

        Returns:
            `TopTokens`: `helpful(q, k)` and `harmful(q, k)` list tokens with `index`, `position`, `score`, `token` and
            `context`, `to_frame()` is a table, and `values`, `indices` and `positions` [queries, 2 k] are tensors.

        Raises:
            InvalidInput: as `token_scores`.
            TooLarge: several checkpoints, and too many tokens for the memory bound.
        """
        queries, contrast = take_sides(queries, contrast)
        question = self._question(queries, measure, None, None, None, contrast)
        objective = check_tokens(self._derivatives, self.spec.scaling, "top_tokens")
        data, several, room = self.problem.data, len(self.members) > 1, Budget.of(self.spec.memory).bytes
        some = None if ids is None else torch.tensor([data.index_of(i) for i in checked_ids(ids, len(data.whole))])
        extremes = TokenExtremes(self.problem, objective, question, whole_number("k", k), some, several, room)
        self._follow(question, extremes.add)
        return extremes.result()

    @entry
    def with_damping(self, damping: AbstractDamping | float) -> Attribution:
        """The same fit under another damping: nothing but the solver's own preparation is repeated.

        Args:
            damping: as for `Influence`.
        """
        self.fitted_at.check()
        rule = as_damping(damping)
        members = self.members.transform(ChangeDamping(self.problem.model, rule))
        return replace(self, spec=replace(self.spec, damping=rule), members=members)

    def scores_over_damping(self, queries: Any, lambdas: Any, measure: Any = None) -> dict[float, Scores]:
        """Scores for every damping value in `lambdas` (absolute), without refitting.

        Args:
            queries: as for `score`.
            lambdas: the dampings, as numbers.
            measure: as for `score`.
        """
        try:
            values = [float(x) for x in lambdas]
        except (TypeError, ValueError) as cause:
            raise InvalidInput(
                f"scores_over_damping() takes several damping values, numbers such as [0.01, 0.1], got {lambdas!r}."
            ) from cause
        return {x: self.with_damping(x).score(queries, measure) for x in values}

    @entry
    def damping_curve(self, held_out: Any = None, lambdas: Any = None, checkpoint: int = 0) -> DampingCurve:
        """The curve on which `FromCurve(held_out, lambdas)` would choose lambda, for one of the checkpoints.

        Args:
            held_out: as for `FromCurve`.
            lambdas: as for `FromCurve`.
            checkpoint: which of the problem's checkpoints, counted from 0.
        """
        member = self._member(checkpoint)
        with at_checkpoint(self.problem.model, member.checkpoint):
            return FromCurve(held_out, lambdas).path(member)

    @entry
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

        Args:
            queries: whose gradients are looked at, as for `score`; `None`: none.
            measure: as for `score`.
            checkpoint: which of the problem's checkpoints, counted from 0.
            steps: products with each random vector, where the eigenvalues are not at hand.
            probes: how many random vectors.
            seed: of the random vectors.
        """
        member = self._member(checkpoint)
        with at_checkpoint(self.problem.model, member.checkpoint):
            like = member.derivatives.whole.like(self.problem.model)
            shares = None
            if queries is not None:
                question = self._question(queries, measure)
                room = member.room(Budget.of(self.spec.memory))
                groups = ScoringPass(self.problem, question).query_groups(member.derivatives, room)
                shares = member.damped_shares(groups, len(question))
            return spectrum_of(member.operator, member.shift, like, shares, steps, probes, seed)

    # ---------------------------------------------------------------- inner workings

    @property
    def _weights(self) -> tuple[float, ...]:
        """What each checkpoint's scores are multiplied by before they are added up, as they are."""
        return self.spec.weights or (1.0 / len(self.members),) * len(self.members)

    @property
    def _rounds(self) -> Rounds:
        spec = self.spec
        return Rounds(
            self.problem,
            self.members,
            self._weights,
            Units.of(spec.units),
            Budget.of(spec.memory),
            spec.scaling,
            Route.of(spec.route),
            spec.truncation,
            None if spec.precision is None else torch.bfloat16,
        )

    def _follow(self, question: Question, add: Callable[[Derivatives, Tensor, Rows, Tensor], None]) -> None:
        """Give every checkpoint's solved queries to `add`, with what each query's parts are multiplied by."""
        scoring, rounds = ScoringPass(self.problem, question), self._rounds
        factors = rounds.factors(scoring)
        for k, member, query_ids, directions in rounds.directions(scoring):
            add(member.derivatives, query_ids, directions, factors[k])

    def _scored(self, question: Question, parts: Parts | None) -> tuple[ScoringPass, Callable[[RunLog], Diagnostics]]:
        rounds = self._rounds
        scoring = rounds.scored(question) if parts is None else rounds.scored_by_part(question, parts)
        return scoring, self._diagnostics

    def _question(self, *asked: Any) -> Question:
        self.fitted_at.check()
        return super()._question(*asked)

    @property
    def _derivatives(self) -> Derivatives:
        return self.members[0].derivatives

    def _member(self, checkpoint: Any) -> FittedMember:
        self.fitted_at.check()
        last = len(self.members) - 1
        return self.members[whole_number("checkpoint", checkpoint, 0, last, hint="checkpoints are counted from 0")]

    def _diagnostics(self, log: RunLog) -> Diagnostics:
        first, scaling, facts = self.members[0], self.spec.scaling, self.members.facts
        notes = dict.fromkeys(note for f in facts for note in f.notes)
        agreement = log.agreement.notes(Units.of(self.spec.units))
        return log.diagnostics(
            self.problem,
            self.stationarity,
            first.derivatives.routes,
            method=self.method,
            why=self.why,
            damping=sum(f.damping for f in facts) / len(facts),
            weight_decay=min(first.shift.decay.values(), default=0.0),
            weight_decay_most=max(first.shift.decay.values(), default=0.0),
            members=len(facts),
            effective_dimension=sum(f.effective_dimension for f in facts) / len(facts),
            needs_minimum=not self.run_notes,
            notes=(*self.run_notes, *notes, *log.notes(), *agreement, *((scaling.note,) if scaling.note else ())),
        )
